#include "ops/plan.h"

#include <atomic>
#include <cstring>

namespace fastprune {
namespace {

constexpr size_t kKeptTranslations = 4;
constexpr int64_t kProbes = 32;

int64_t make_plan(const Tensor& row_ptr, const Tensor& offset, const Tensor& transposed_row_ptr,
                  const Tensor& transposed_offset, std::vector<int64_t> shape) {
  STD_TORCH_CHECK(shape.size() == 6, "make_plan: shape: expected 6 values, got ", shape.size());
  auto plan = std::make_shared<Plan>(
      PatternShape{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]}, row_ptr, offset,
      transposed_row_ptr, transposed_offset);
  return register_plan(std::move(plan));
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

void check_plan_shape(const PatternShape& has, const PatternShape& shape, const char* op) {
  STD_TORCH_CHECK(has.rows == shape.rows && has.groups == shape.groups &&
                      has.depth == shape.depth && has.taps == shape.taps,
                  op, ": plan: expected one for ", shape.rows, " rows of ", shape.depth, " x ",
                  shape.taps, " in ", shape.groups, " groups, got ", has.rows, " rows of ",
                  has.depth, " x ", has.taps, " in ", has.groups);
}

std::shared_ptr<Plan> find_plan(int64_t id, const PatternShape& shape, const char* op) {
  auto plan = live_plan<Plan>(id, op);
  check_plan_shape(plan->shape(), shape, op);
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
    probes_.push_back(
        Probe{p.row_of(b, place % p.rows) * p.cols() + b * p.block_cols() + p.offset[entry], 0});
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
    to->windows.push_back(end, entries);
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

bool Plan::follow(const void* weight, int64_t version, DType dtype) {
  const bool read_anew = version >= 0 && (version & kReadAnew) != 0;
  if (read_anew) version -= kReadAnew;
  bool same = version >= 0 && source_.weight == weight && source_.version == version &&
              source_.dtype == dtype;
  // The version counter does not see changes through weight.data.
  for (const Probe& probe : probes_) {
    same = same && probe.bits == widened_bits(weight, dtype, probe.at);
  }
  source_ = Source{weight, version, dtype};
  if (!same) forget_values();
  return same && read_anew;
}

void Plan::forget_values() {
  forward_.values = transposed_.values = nullptr;
  forms_.forget_values();
  for (Probe& probe : probes_) probe.bits = widened_bits(source_.weight, source_.dtype, probe.at);
}

template <typename T, typename Read, typename Same>
std::shared_ptr<const T> Plan::refreshed(std::shared_ptr<const T> kept, bool compare,
                                         const Read& read, const Same& same) {
  if (kept != nullptr && !compare) return kept;
  std::shared_ptr<const T> made = read();
  if (compare) {
    if (kept != nullptr && same(*kept, *made)) return kept;
    forget_values();  // of the other forms one cannot know
  }
  return made;
}

std::shared_ptr<const BitmapWeight> Plan::bitmap(const Tensor& weight, int64_t version,
                                                 const char* op) {
  const DType dtype = dtype_of(weight, op, "weight");
  const void* from = weight.const_data_ptr();
  const std::lock_guard<std::mutex> lock(mutex_);
  const bool compare = follow(from, version, dtype);
  const auto form = refreshed(
      forms_.bitmap(), compare, [&] { return forms_.read_bitmap(forward_.view, dtype, from); },
      [](const BitmapWeight& a, const BitmapWeight& b) { return a.same_values(b); });
  forms_.keep(form);
  return form;
}

std::shared_ptr<const PairsWeight> Plan::pairs(bool transposed, const Tensor& weight,
                                               int64_t version, const char* op) {
  const DType dtype = dtype_of(weight, op, "weight");
  const void* from = weight.const_data_ptr();
  const std::lock_guard<std::mutex> lock(mutex_);
  const bool compare = follow(from, version, dtype);
  const auto form = refreshed(
      forms_.pairs(transposed), compare,
      [&] { return forms_.read_pairs(forward_.view, transposed, from); },
      [](const PairsWeight& a, const PairsWeight& b) { return a.same_values(b); });
  forms_.keep(transposed, form);
  return form;
}

Shared Plan::values(bool transposed, const Tensor& weight, int64_t version, const char* op) {
  if (transposed) this->transposed();  // before the lock
  const DType dtype = dtype_of(weight, op, "weight");
  const void* from = weight.const_data_ptr();
  const std::lock_guard<std::mutex> lock(mutex_);
  const bool compare = follow(from, version, dtype);
  const int64_t bytes = forward_.view.nnz * (dtype == DType::f64 ? 8 : 4);
  Direction& direction = transposed ? transposed_ : forward_;
  direction.values = refreshed(
      direction.values, compare, [&] { return read_values(transposed, dtype, from, bytes, op); },
      [&](const Scratch& a, const Scratch& b) {
        return std::memcmp(a.as<void>(), b.as<void>(), static_cast<size_t>(bytes)) == 0;
      });
  return direction.values;
}

Shared Plan::read_values(bool transposed, DType dtype, const void* weight, int64_t bytes,
                         const char* op) {
  const PatternView& p = forward_.view;
  auto data = std::make_shared<const Scratch>(bytes);
  if (!transposed) {
    const std::vector<int64_t>& cut = forward_.windows.row_end();
    for_each_range(static_cast<int64_t>(cut.size()), 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t i = begin; i < end; ++i) {
        FASTPRUNE_PICK(gather_values)
        (p, dtype, weight, data->as<void>(), i == 0 ? 0 : cut[static_cast<size_t>(i - 1)],
         cut[static_cast<size_t>(i)]);
      }
    });
    return data;
  }
  const PatternView& t = transposed_.view;
  std::atomic<bool> agree{true};
  for_each_range(t.groups * t.blocks(), t.rows * 16, [&](int64_t begin, int64_t end, void* cursor) {
    if (!FASTPRUNE_PICK(gather_transposed_values)(p, t, dtype, weight, data->as<void>(),
                                                  static_cast<int64_t*>(cursor), !transpose_agrees_,
                                                  begin, end)) {
      agree = false;
    }
  });
  STD_TORCH_CHECK(agree.load(), op,
                  ": plan: expected transposed_offset to be the transpose of offset");
  transpose_agrees_ = true;
  return data;
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
  return (transposed ? transposed_ : forward_).windows.balanced(parts);
}

int64_t Plan::bytes() {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t total = forms_.bytes();
  for (const Direction* d : {&forward_, &transposed_}) {
    if (d->row_ptr == nullptr) continue;
    const PatternView& v = d->view;
    total += v.nnz * 2 + v.blocks() * v.rows * 16;
    if (d->values != nullptr) total += v.nnz * (source_.dtype == DType::f64 ? 8 : 4);
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
