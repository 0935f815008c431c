#include "ops/global_topk_mask.h"

#include <algorithm>
#include <mutex>

#include "ops/topk_selection.h"

namespace fastprune {
namespace {

constexpr const char* kOp = kTopkOp;
constexpr int64_t kDirect = 16384;   // so few elements are selected from a copy of their keys
constexpr int64_t kLongRow = 65536;  // longer rows are selected from one at a time

bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

std::string shape_text(const Tensor& t) {
  std::string text = "(";
  for (int64_t size : t.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

int index_of(const std::string& name, std::initializer_list<const char*> names,
             const char* argument) {
  int i = 0;
  std::string expected;
  for (const char* n : names) {
    if (name == n) return i;
    expected += (i++ == 0 ? "" : ", ") + std::string(n);
  }
  STD_TORCH_CHECK(false, kOp, ": ", argument, ": expected one of ", expected, ", got '", name, "'");
}

void check_companions(const std::vector<Tensor>& values, const std::vector<Tensor>& tensors,
                      const char* name) {
  if (tensors.empty()) return;
  STD_TORCH_CHECK(tensors.size() == values.size(), kOp, ": ", name, ": expected ", values.size(),
                  " tensors, one for each of values, got ", tensors.size());
  for (size_t i = 0; i < values.size(); ++i) {
    STD_TORCH_CHECK(same_shape(tensors[i], values[i]), kOp, ": ", name, "[", i,
                    "]: expected the shape ", shape_text(values[i]), " of values[", i, "], got ",
                    shape_text(tensors[i]));
    STD_TORCH_CHECK(tensors[i].device() == values[i].device(), kOp, ": ", name, "[", i,
                    "]: expected the device of values[", i, "]");
  }
}

const char* element(std::string& text, const char* name, size_t i) {
  text = std::string(name) + "[" + std::to_string(i) + "]";
  return text.c_str();
}

}  // namespace

TopkCall validate_global_topk_mask(const std::vector<Tensor>& values,
                                   const std::vector<Tensor>& other,
                                   const std::vector<Tensor>& within,
                                   const std::vector<int64_t>& counts, const std::string& scope,
                                   const std::string& score) {
  TopkCall call;
  call.scope =
      static_cast<TopkScope>(index_of(scope, {"global", "layer", "neuron", "filter"}, "scope"));
  call.score = static_cast<TopkScore>(
      index_of(score, {"identity", "magnitude", "product", "saliency", "square"}, "score"));
  const bool needs_other = call.score == TopkScore::product || call.score == TopkScore::saliency;
  const bool by_row = call.scope == TopkScope::neuron || call.scope == TopkScope::filter;
  const bool per_tensor = call.scope == TopkScope::layer || call.scope == TopkScope::neuron;
  STD_TORCH_CHECK(!values.empty(), kOp, ": values: expected at least one tensor, got none");
  STD_TORCH_CHECK(other.empty() != needs_other, kOp, ": other: expected ",
                  needs_other ? "one tensor for each of values" : "none", " with score '", score,
                  "', got ", other.size());
  check_companions(values, other, "other");
  check_companions(values, within, "within");
  const size_t expected = per_tensor ? values.size() : 1;
  STD_TORCH_CHECK(counts.size() == expected, kOp, ": counts: expected ", expected, " with scope '",
                  scope, "', got ", counts.size());
  call.counts = counts;

  int64_t total = 0, most = 0;  // elements so far; units that counts[0] chooses from
  std::string name;
  for (size_t i = 0; i < values.size(); ++i) {
    STD_TORCH_CHECK(values[i].device() == values[0].device(), kOp, ": values[", i,
                    "]: expected the device of values[0]");
    TopkTensor t{};
    t.dtype = dtype_of(values[i], kOp, element(name, "values", i));
    if (needs_other) t.other_dtype = dtype_of(other[i], kOp, element(name, "other", i));
    if (!within.empty()) {
      check_dtype(within[i], ScalarType::Bool, kOp, element(name, "within", i));
    }
    STD_TORCH_CHECK(!by_row || values[i].dim() > 0, kOp, ": values[", i,
                    "]: expected at least 1 dimension with scope '", scope, "', got a scalar");
    t.numel = values[i].numel();
    call.rows.push_back(by_row ? values[i].size(0) : 1);
    STD_TORCH_CHECK(!__builtin_add_overflow(total, t.numel, &total), kOp,
                    ": values: the number of elements does not fit 64 bits");
    call.tensors.push_back(t);
    if (per_tensor) {
      const int64_t units = call.scope == TopkScope::layer ? t.numel : call.cols(i);
      STD_TORCH_CHECK(counts[i] >= 0 && (counts[i] <= units || call.rows[i] == 0), kOp, ": counts[",
                      i, "]: expected 0 to ", units, " kept of values[", i, "]",
                      by_row ? " in each row" : "", ", got ", counts[i]);
    }
    most += call.scope == TopkScope::filter ? call.rows[i] : t.numel;
  }
  STD_TORCH_CHECK(per_tensor || (counts[0] >= 0 && counts[0] <= most), kOp,
                  ": counts[0]: expected 0 to ", most,
                  call.scope == TopkScope::filter ? " filters" : " elements", ", got ", counts[0]);

  for (size_t i = 0; i < values.size(); ++i) {
    TopkTensor& t = call.tensors[i];
    const auto hold = [&](const Tensor& tensor) {
      call.held.push_back(dense(tensor));
      return call.held.back().const_data_ptr();
    };
    t.values = hold(values[i]);
    if (needs_other) t.other = hold(other[i]);
    if (!within.empty()) {
      // An empty tensor has no storage, but it is not a missing restriction: no row is a candidate.
      static const uint8_t kNothing = 0;
      t.within = static_cast<const uint8_t*>(hold(within[i]));
      if (t.within == nullptr) t.within = &kNothing;
    }
    call.masks.push_back(torch::stable::new_empty(values[i], values[i].sizes(), ScalarType::Bool));
    t.mask = static_cast<uint8_t*>(call.masks.back().mutable_data_ptr());
  }
  return call;
}

namespace {

bool is_wide(const TopkTensor& t) {
  return t.dtype == DType::f64 || (t.other != nullptr && t.other_dtype == DType::f64);
}

void fail_few(int64_t count, int64_t candidates, const std::string& where) {
  STD_TORCH_CHECK(count <= candidates, kOp, ": counts: expected at most the ", candidates,
                  " candidates of ", where, ", got ", count);
}

// Selects k of the spans' elements. where: of what, for a message.
void select(const std::vector<TopkTensor>& tensors, TopkScore score,
            const std::vector<TopkSpan>& spans, int64_t k, const std::string& where) {
  TopkProblem problem{tensors.data(), score, false};
  int64_t elements = 0, candidates = 0;
  for (const TopkSpan& s : spans) {
    problem.wide |= is_wide(tensors[s.tensor]);
    elements += s.end - s.begin;
  }
  if (elements <= kDirect) {
    const Scratch scratch(FASTPRUNE_PICK(topk_direct_scratch)(problem.wide, elements));
    const TopkStatus status = FASTPRUNE_PICK(topk_direct)(
        problem, spans.data(), static_cast<int64_t>(spans.size()), k, scratch.as<void>());
    if (status.kind == TopkStatus::has_nan) fail_nan(spans[status.span].tensor);
    if (status.kind == TopkStatus::too_few) fail_few(k, status.candidates, where);
    return;
  }
  for (const TopkSpan& s : spans) {
    const uint8_t* within = tensors[s.tensor].within;
    candidates += within == nullptr ? s.end - s.begin
                                    : FASTPRUNE_PICK(topk_count)(within + s.begin, s.end - s.begin);
  }
  fail_few(k, candidates, where);
  Selection(problem, spans, k, candidates).run();
}

void select_whole(const std::vector<TopkTensor>& tensors, TopkScore score, int64_t k,
                  const std::string& where) {
  std::vector<TopkSpan> spans;
  for (size_t i = 0; i < tensors.size(); ++i) {
    spans.push_back({static_cast<int64_t>(i), 0, tensors[i].numel});
  }
  select(tensors, score, spans, k, where);
}

void select_rows(const TopkCall& call, int64_t i) {
  const TopkTensor& t = call.tensors[i];
  const int64_t rows = call.rows[i], cols = call.cols(i), k = call.counts[i];
  const auto where = [&](int64_t row) {
    return "row " + std::to_string(row) + " of values[" + std::to_string(i) + "]";
  };
  if (cols > kLongRow) {
    for (int64_t r = 0; r < rows; ++r) {
      select(call.tensors, call.score, {{i, r * cols, (r + 1) * cols}}, k, where(r));
    }
    return;
  }
  const TopkProblem problem{call.tensors.data(), call.score, is_wide(t)};
  TopkStatus worst{TopkStatus::ok, rows, 0};
  std::mutex mutex;
  for_each_range(rows, FASTPRUNE_PICK(topk_direct_scratch)(problem.wide, cols),
                 [&](int64_t begin, int64_t end, void* scratch) {
                   const TopkStatus status =
                       FASTPRUNE_PICK(topk_rows)(problem, i, cols, begin, end, k, scratch);
                   const std::lock_guard<std::mutex> lock(mutex);
                   if (status.kind != TopkStatus::ok && status.span < worst.span) worst = status;
                 });
  if (worst.kind == TopkStatus::has_nan) fail_nan(i);
  if (worst.kind == TopkStatus::too_few) fail_few(k, worst.candidates, where(worst.span));
}

// The filters' norms are a selection problem of their own: one float64 score per filter.
void select_filters(const TopkCall& call) {
  const TopkProblem problem{call.tensors.data(), call.score, false};
  std::vector<Scratch> memory;
  std::vector<TopkTensor> filters;
  for (size_t i = 0; i < call.tensors.size(); ++i) {
    const int64_t rows = call.rows[i], cols = call.cols(i);
    memory.emplace_back(checked_product(rows, 10, kOp));
    double* norms = memory.back().as<double>();
    uint8_t* alive = reinterpret_cast<uint8_t*>(norms + rows);
    const uint8_t* within = call.tensors[i].within;
    for_each_range(rows, 0, [&](int64_t begin, int64_t end, void*) {
      FASTPRUNE_PICK(topk_norms)
      (problem, static_cast<int64_t>(i), cols, begin, end, norms);
      for (int64_t r = begin; within != nullptr && r < end; ++r) {
        alive[r] = FASTPRUNE_PICK(topk_count)(within + r * cols, cols) > 0 ? 1 : 0;
      }
    });
    filters.push_back({norms, nullptr, within == nullptr ? nullptr : alive, alive + rows, rows,
                       DType::f64, DType::f64});
  }
  select_whole(filters, TopkScore::identity, call.counts[0], "all filters");
  for (size_t i = 0; i < call.tensors.size(); ++i) {
    const int64_t cols = call.cols(i);
    for (int64_t r = 0; r < call.rows[i]; ++r) {
      std::fill_n(call.tensors[i].mask + r * cols, cols, filters[i].mask[r]);
    }
  }
}

std::string take_string(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

// Strings arrive as handles: the conversion to std::string of torch 2.11 to 2.13 leaks each one.
std::vector<Tensor> global_topk_mask_cpu(const std::vector<Tensor>& values,
                                         const std::vector<Tensor>& other,
                                         const std::vector<Tensor>& within,
                                         const std::vector<int64_t>& counts, StringHandle scope,
                                         StringHandle score) {
  const TopkCall call = validate_global_topk_mask(values, other, within, counts, take_string(scope),
                                                  take_string(score));
  check_cpu(values[0], kOp, "values[0]");
  switch (call.scope) {
    case TopkScope::global:
      select_whole(call.tensors, call.score, call.counts[0], "all values");
      break;
    case TopkScope::layer:
      for (size_t i = 0; i < call.tensors.size(); ++i) {
        select(call.tensors, call.score, {{static_cast<int64_t>(i), 0, call.tensors[i].numel}},
               call.counts[i], "values[" + std::to_string(i) + "]");
      }
      break;
    case TopkScope::neuron:
      for (size_t i = 0; i < call.tensors.size(); ++i) select_rows(call, static_cast<int64_t>(i));
      break;
    case TopkScope::filter:
      select_filters(call);
      break;
  }
  return call.masks;
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def(
      "global_topk_mask(Tensor[] values, Tensor[] other, Tensor[] within, int[] counts, str scope, "
      "str score) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("global_topk_mask", TORCH_BOX(&fastprune::global_topk_mask_cpu));
}
