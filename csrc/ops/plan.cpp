#include "ops/plan.h"

#include <atomic>
#include <cstring>
#include <unordered_map>

namespace fastprune {
namespace {

constexpr size_t kKeptTranslations = 4;
constexpr int64_t kProbes = 32;

struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<Plan>> plans;
  int64_t next = 1;
};
// Never destroyed: layers may be released after static destructors have begun.
Registry& registry() {
  static Registry* const all = new Registry;
  return *all;
}

std::shared_ptr<Plan> lookup(int64_t id) {
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  const auto found = r.plans.find(id);
  return found == r.plans.end() ? nullptr : found->second;
}

int64_t make_plan(const Tensor& row_ptr, const Tensor& offset, const Tensor& transposed_row_ptr,
                  const Tensor& transposed_offset, std::vector<int64_t> shape) {
  STD_TORCH_CHECK(shape.size() == 6, "make_plan: shape: expected 6 values, got ", shape.size());
  auto plan = std::make_shared<Plan>(
      PatternShape{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]}, row_ptr, offset,
      transposed_row_ptr, transposed_offset);
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  r.plans.emplace(r.next, std::move(plan));
  return r.next++;
}

// The bits of a weight element as the accumulator type holds it.
uint64_t widened_bits(const void* weight, DType dtype, int64_t i) {
  uint64_t bits = 0;
  switch (dtype) {
    case DType::f64:
      std::memcpy(&bits, static_cast<const char*>(weight) + 8 * i, 8);
      return bits;
    case DType::f32:
      std::memcpy(&bits, static_cast<const char*>(weight) + 4 * i, 4);
      return bits;
    case DType::bf16:
      return float_to_bits(widen(static_cast<const BFloat16*>(weight)[i]));
    default:
      return float_to_bits(widen(static_cast<const Float16*>(weight)[i]));
  }
}

}  // namespace

bool release_plan(int64_t id) {
  std::shared_ptr<Plan> plan;  // destroyed after the lock is gone
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  const auto found = r.plans.find(id);
  if (found == r.plans.end()) return false;
  plan = std::move(found->second);
  r.plans.erase(found);
  return true;
}

int64_t plan_bytes(int64_t id) {
  const std::shared_ptr<Plan> plan = lookup(id);
  return plan == nullptr ? -1 : plan->bytes();
}

std::shared_ptr<Plan> find_plan(int64_t id, const PatternShape& shape, const char* op) {
  std::shared_ptr<Plan> plan = lookup(id);
  STD_TORCH_CHECK(plan != nullptr, op, ": plan: expected the number of a live plan, got ", id);
  const PatternShape& has = plan->shape();
  STD_TORCH_CHECK(has.rows == shape.rows && has.groups == shape.groups &&
                      has.depth == shape.depth && has.taps == shape.taps,
                  op, ": plan: expected one for ", shape.rows, " rows of ", shape.depth, " x ",
                  shape.taps, " in ", shape.groups, " groups, got ", has.rows, " rows of ",
                  has.depth, " x ", has.taps, " in ", has.groups);
  return plan;
}

Plan::Plan(const PatternShape& shape, const Tensor& row_ptr, const Tensor& offset,
           const Tensor& transposed_row_ptr, const Tensor& transposed_offset)
    : shape_(shape),
      transposed_row_ptr_(transposed_row_ptr),
      transposed_offset_(transposed_offset) {
  sort(checked_pattern(row_ptr, offset, shape, false, "make_plan"), &forward_);
  // Entries whose values tell whether the weight changed behind its version counter.
  const PatternView& p = forward_.view;
  const int64_t places = p.blocks() * p.rows;
  for (int64_t i = 0, place = 0; i < kProbes && i < p.nnz; ++i) {
    const int64_t entry = i * p.nnz / (kProbes < p.nnz ? kProbes : p.nnz);
    while (place + 1 < places && p.row_ptr[place + 1] <= entry) ++place;
    const int64_t b = place / p.rows;
    probes_.push_back(Probe{
        entry, p.row_of(b, place % p.rows) * p.cols() + b * p.block_cols() + p.offset[entry]});
  }
}

void Plan::sort(const PatternView& from, Direction* to) {
  const int64_t places = from.blocks() * from.rows;
  to->row_ptr = std::make_unique<Scratch>((places + 1) * 8);
  to->offset = std::make_unique<Scratch>(from.nnz * 2);
  to->row_at = std::make_unique<Scratch>(places * 4);
  to->place_of = std::make_unique<Scratch>(places * 4);
  FASTPRUNE_PICK(sort_rows)
  (from, SortedBuffers{to->row_ptr->as<int64_t>(), to->offset->as<int16_t>(),
                       to->row_at->as<int32_t>(), to->place_of->as<int32_t>()});
  to->view = from;
  to->view.row_ptr = to->row_ptr->as<int64_t>();
  to->view.offset = to->offset->as<int16_t>();
  to->view.row_at = to->row_at->as<int32_t>();
  to->view.place_of = to->place_of->as<int32_t>();
  const int64_t rows_per_group = from.rows / from.groups;
  int64_t entries = 0;
  for (int64_t row = 0; row < from.rows;) {
    const int64_t group_end = (row / rows_per_group + 1) * rows_per_group;
    const int64_t end = row + kRowWindow < group_end ? row + kRowWindow : group_end;
    for (int64_t b = 0; b < from.blocks(); ++b) {
      entries += from.row_ptr[b * from.rows + end] - from.row_ptr[b * from.rows + row];
    }
    to->window_row.push_back(end);
    to->window_end.push_back(entries);
    row = end;
  }
}

const PatternView& Plan::transposed() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (transposed_.row_ptr == nullptr) {
    const PatternView view =
        checked_pattern(transposed_row_ptr_, transposed_offset_, shape_, true, "make_plan");
    STD_TORCH_CHECK(view.nnz == forward_.view.nnz, "make_plan: transposed_offset: expected the ",
                    forward_.view.nnz, " entries of offset, got ", view.nnz);
    Direction made;  // whole or not at all: memory may run out
    sort(view, &made);
    transposed_ = std::move(made);
  }
  return transposed_.view;
}

bool Plan::current(const Values& v, const void* weight, int64_t version, DType dtype) const {
  if (v.data == nullptr || version < 0 || v.source != weight || v.version != version ||
      v.dtype != dtype) {
    return false;
  }
  // The version counter does not see changes through weight.data.
  const Values& f = forward_.values;
  if (f.data == nullptr) return true;
  bool same = true;
  for (const Probe& probe : probes_) {
    uint64_t kept = 0;
    const int64_t size = dtype == DType::f64 ? 8 : 4;
    std::memcpy(&kept, f.data->as<char>() + size * probe.entry, static_cast<size_t>(size));
    same = same && kept == widened_bits(weight, dtype, probe.weight);
  }
  return same;
}

Shared Plan::values(bool transposed, const Tensor& weight, int64_t version, const char* op) {
  const bool read_anew = version >= 0 && (version & kReadAnew) != 0;
  if (read_anew) version -= kReadAnew;
  if (transposed) this->transposed();  // before the lock
  const DType dtype = dtype_of(weight, op, "weight");
  const void* from = weight.const_data_ptr();
  const int64_t size = dtype == DType::f64 ? 8 : 4;
  const std::lock_guard<std::mutex> lock(mutex_);
  const PatternView& p = forward_.view;
  // The probes look at the forward values: those come first, whatever is asked for.
  const bool known = current(forward_.values, from, version, dtype);
  if (!known || read_anew) {
    auto data = std::make_shared<const Scratch>(p.nnz * size);
    const std::vector<int64_t>& cut = forward_.window_row;
    for_each_range(static_cast<int64_t>(cut.size()), 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t i = begin; i < end; ++i) {
        FASTPRUNE_PICK(gather_values)
        (p, dtype, from, data->as<void>(), i == 0 ? 0 : cut[static_cast<size_t>(i - 1)],
         cut[static_cast<size_t>(i)]);
      }
    });
    const bool same = known && std::memcmp(data->as<void>(), forward_.values.data->as<void>(),
                                           static_cast<size_t>(p.nnz * size)) == 0;
    if (!same) {
      forward_.values = Values{from, version, dtype, data};
      transposed_.values = Values{};
    }
  }
  if (!transposed) return forward_.values.data;
  if (!current(transposed_.values, from, version, dtype)) {
    const PatternView& t = transposed_.view;
    auto data = std::make_shared<const Scratch>(t.nnz * size);
    std::atomic<bool> agree{true};
    for_each_range(
        t.groups * t.blocks(), t.rows * 16, [&](int64_t begin, int64_t end, void* cursor) {
          if (!FASTPRUNE_PICK(gather_transposed_values)(
                  p, t, dtype, from, data->as<void>(), static_cast<int64_t*>(cursor), begin, end)) {
            agree = false;
          }
        });
    STD_TORCH_CHECK(agree.load(), op,
                    ": plan: expected transposed_offset to be the transpose of offset");
    transposed_.values = Values{from, version, dtype, data};
  }
  return transposed_.values.data;
}

std::shared_ptr<const Translation> Plan::translation(
    bool transposed, std::vector<int64_t> key, const std::function<void(Translation*)>& make) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto& kept = (transposed ? transposed_ : forward_).translations;
  for (const auto& t : kept) {
    if (t->key == key) return t;
  }
  auto made = std::make_shared<Translation>();
  make(made.get());
  made->key = std::move(key);
  if (kept.size() == kKeptTranslations) kept.erase(kept.begin());
  kept.push_back(made);
  return made;
}

std::vector<int64_t> Plan::balanced(bool transposed, int64_t parts) {
  const Direction& d = transposed ? transposed_ : forward_;
  std::vector<int64_t> bounds{0};
  size_t w = 0;
  for (int64_t part = 1; part < parts; ++part) {
    const double wanted =
        static_cast<double>(d.view.nnz) * static_cast<double>(part) / static_cast<double>(parts);
    while (w < d.window_end.size() && static_cast<double>(d.window_end[w]) <= wanted) ++w;
    // The window that crosses the bound goes to the side where more of it lies.
    if (w < d.window_end.size()) {
      const double before = w == 0 ? 0 : static_cast<double>(d.window_end[w - 1]);
      if (2 * wanted > before + static_cast<double>(d.window_end[w])) ++w;
    }
    bounds.push_back(w == 0 ? 0 : d.window_row[w - 1]);
  }
  bounds.push_back(d.view.rows);
  return bounds;
}

int64_t Plan::bytes() {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t total = 0;
  for (const Direction* d : {&forward_, &transposed_}) {
    if (d->row_ptr == nullptr) continue;
    const PatternView& v = d->view;
    total += v.nnz * 2 + v.blocks() * v.rows * 16;
    if (d->values.data != nullptr) total += v.nnz * (d->values.dtype == DType::f64 ? 8 : 4);
    total += static_cast<int64_t>(d->translations.size()) * v.nnz * 2;
  }
  return total;
}

}  // namespace fastprune

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def(
      "make_plan(Tensor row_ptr, Tensor offset, Tensor transposed_row_ptr, "
      "Tensor transposed_offset, int[] shape) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("make_plan", TORCH_BOX(&fastprune::make_plan));
}
