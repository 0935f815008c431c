#include "ops/global_topk_mask.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "ops/topk_lamp.h"
#include "ops/topk_selection.h"

namespace fastprune {
namespace {

constexpr const char* kOp = kTopkOp;
constexpr int64_t kDirect = 16384;   // so few elements are selected from a copy of their keys
constexpr int64_t kLongRow = 65536;  // longer rows are selected from one at a time

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

// How a tensor that is not contiguous is walked; null where a contiguous copy serves better: one
// that is contiguous already (no copy), or of very many dimensions.
std::unique_ptr<TopkStrides> strides_of(const Tensor& t) {
  if (t.numel() == 0 || t.is_contiguous()) return nullptr;
  auto result = std::make_unique<TopkStrides>();
  int dims = 0;
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    if (dims > 0 && result->strides[dims - 1] == strides[d] * sizes[d]) {  // one longer dimension
      result->sizes[dims - 1] *= sizes[d];
      result->strides[dims - 1] = strides[d];
      continue;
    }
    if (dims == kTopkDims) return nullptr;
    result->sizes[dims] = sizes[d];
    result->strides[dims++] = strides[d];
  }
  result->dims = dims;
  return dims == 0 ? nullptr : std::move(result);
}

// Of the rows of tensor i, whose counts begin at *first; moves that on.
void check_row_counts(const TopkCall& call, size_t i, int64_t* first) {
  const int64_t begin = *first, given = static_cast<int64_t>(call.counts.size());
  STD_TORCH_CHECK(!__builtin_add_overflow(begin, call.rows[i], first), kOp,
                  ": values: the number of rows does not fit 64 bits");
  for (int64_t r = begin; r < std::min(*first, given); ++r) {
    STD_TORCH_CHECK(call.counts[r] >= 0 && call.counts[r] <= call.cols(i), kOp, ": counts[", r,
                    "]: expected 0 to ", call.cols(i), " kept of a row of values[", i, "], got ",
                    call.counts[r]);
  }
}

const char* element(std::string& text, const char* name, size_t i) {
  text = std::string(name) + "[" + std::to_string(i) + "]";
  return text.c_str();
}

}  // namespace

std::vector<TopkTensor> TopkCall::masked(size_t selection) const {
  std::vector<TopkTensor> result = tensors;
  for (size_t i = 0; i < result.size(); ++i) {
    const Tensor& mask = masks[selection * result.size() + i];
    result[i].mask = const_cast<uint8_t*>(static_cast<const uint8_t*>(mask.const_data_ptr()));
  }
  return result;
}

TopkCall validate_global_topk_mask(const std::vector<Tensor>& values,
                                   const std::vector<Tensor>& other,
                                   const std::vector<Tensor>& within,
                                   const std::vector<int64_t>& counts, const TopkOptions& options) {
  TopkCall call;
  const std::string &scope = options.scope, &score = options.score;
  call.scope = static_cast<TopkScope>(
      index_of(scope, {"global", "layer", "neuron", "filter", "row"}, "scope"));
  const int kind = index_of(
      score, {"identity", "magnitude", "product", "saliency", "square", "noise", "lamp"}, "score");
  call.lamp = kind > static_cast<int>(TopkScore::noise);
  call.score = call.lamp ? TopkScore::magnitude : static_cast<TopkScore>(kind);
  call.packed = options.packed;
  call.seed = static_cast<uint64_t>(options.seed);
  const bool needs_other = call.score == TopkScore::product || call.score == TopkScore::saliency;
  const bool each_row = call.scope == TopkScope::row;
  const bool by_row =
      call.scope == TopkScope::neuron || call.scope == TopkScope::filter || each_row;
  const bool per_tensor = call.scope == TopkScope::layer || call.scope == TopkScope::neuron;
  STD_TORCH_CHECK(!values.empty(), kOp, ": values: expected at least one tensor, got none");
  STD_TORCH_CHECK(other.empty() != needs_other, kOp, ": other: expected ",
                  needs_other ? "one tensor for each of values" : "none", " with score '", score,
                  "', got ", other.size());
  STD_TORCH_CHECK(!call.lamp || !by_row, kOp,
                  ": scope: expected global or layer with score 'lamp', got '", scope, "'");
  check_companions(values, other, "other");
  check_companions(values, within, "within");
  if (per_tensor) {
    STD_TORCH_CHECK(counts.size() == values.size(), kOp, ": counts: expected ", values.size(),
                    " with scope '", scope, "', got ", counts.size());
  } else if (!each_row) {
    STD_TORCH_CHECK(!counts.empty(), kOp, ": counts: expected at least one with scope '", scope,
                    "', got none");
  }
  call.counts = counts;
  const size_t selections = per_tensor || each_row ? 1 : counts.size();
  STD_TORCH_CHECK(options.scale.empty() || options.scale.size() == values.size(), kOp,
                  ": scale: expected one for each of values, got ", options.scale.size());
  STD_TORCH_CHECK(options.scale.empty() || !call.lamp, kOp,
                  ": scale: expected none with score 'lamp'");
  for (size_t i = 0; i < options.scale.size(); ++i) {
    STD_TORCH_CHECK(std::isfinite(options.scale[i]), kOp, ": scale[", i,
                    "]: expected a finite number, got ", options.scale[i]);
    call.scaled |= options.scale[i] != 1.0;
  }

  int64_t row_count = 0;
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
    t.first = total;
    if (!options.scale.empty()) t.scale = options.scale[i];
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
    if (each_row) check_row_counts(call, i, &row_count);
    most += call.scope == TopkScope::filter ? call.rows[i] : t.numel;
  }
  STD_TORCH_CHECK(!each_row || row_count == static_cast<int64_t>(counts.size()), kOp,
                  ": counts: expected ", row_count, ", one per row, got ", counts.size());
  for (size_t c = 0; !per_tensor && !each_row && c < counts.size(); ++c) {
    STD_TORCH_CHECK(counts[c] >= 0 && counts[c] <= most, kOp, ": counts[", c, "]: expected 0 to ",
                    most, call.scope == TopkScope::filter ? " filters" : " elements", ", got ",
                    counts[c]);
  }

  for (size_t i = 0; i < values.size(); ++i) {
    TopkTensor& t = call.tensors[i];
    const auto hold = [&](const Tensor& tensor) {
      call.held.push_back(dense(tensor));
      return call.held.back().const_data_ptr();
    };
    const auto factor = [&](const Tensor& tensor, const TopkStrides*& strides) {
      call.strides.push_back(strides_of(tensor));
      strides = call.strides.back().get();
      if (strides == nullptr) return hold(tensor);
      call.held.push_back(tensor);
      return tensor.const_data_ptr();
    };
    if (call.score != TopkScore::noise) {
      t.values = factor(values[i], t.values_strides);
      if (needs_other) t.other = factor(other[i], t.other_strides);
    }
    if (!within.empty()) {
      // An empty tensor has no storage, but it is not a missing restriction: no row is a candidate.
      static const uint8_t kNothing = 0;
      t.within = static_cast<const uint8_t*>(hold(within[i]));
      if (t.within == nullptr) t.within = &kNothing;
    }
  }
  for (size_t n = 0; n < selections * values.size(); ++n) {
    const Tensor& like = values[n % values.size()];
    const int64_t bytes[] = {(like.numel() + 7) / 8};
    call.masks.push_back(call.packed
                             ? torch::stable::new_empty(like, {bytes, 1}, ScalarType::Byte)
                             : torch::stable::new_empty(like, like.sizes(), ScalarType::Bool));
  }
  for (const Tensor& mask : call.masks) {
    if (mask.is_cpu()) advise_huge_pages(mask);
  }
  call.tensors = call.masked(0);
  return call;
}

namespace {

void fail_few(int64_t count, int64_t candidates, const std::string& where) {
  STD_TORCH_CHECK(count <= candidates, kOp, ": counts: expected at most the ", candidates,
                  " candidates of ", where, ", got ", count);
}

// Selects ks[i] of the spans' elements into the masks of problems[i], which differ in them only.
// where: of what, for a message.
void select(std::vector<TopkProblem> problems, const std::vector<TopkSpan>& spans,
            const std::vector<int64_t>& ks, const std::string& where) {
  int64_t elements = 0, candidates = 0;
  bool wide = false;
  const TopkTensor* tensors = problems[0].tensors;
  for (const TopkSpan& s : spans) {
    wide |= is_wide(problems[0].score, tensors[s.tensor]);
    elements += s.end - s.begin;
  }
  for (TopkProblem& p : problems) p.wide = wide;
  if (elements <= kDirect) {
    const Scratch scratch(FASTPRUNE_PICK(topk_direct_scratch)(wide, elements));
    for (size_t i = 0; i < ks.size(); ++i) {
      const TopkStatus status = FASTPRUNE_PICK(topk_direct)(
          problems[i], spans.data(), static_cast<int64_t>(spans.size()), ks[i], scratch.as<void>());
      if (status.kind == TopkStatus::has_nan) fail_nan(spans[status.span].tensor);
      if (status.kind == TopkStatus::too_few) fail_few(ks[i], status.candidates, where);
    }
    return;
  }
  for (const TopkSpan& s : spans) {
    const uint8_t* within = tensors[s.tensor].within;
    candidates += within == nullptr ? s.end - s.begin
                                    : FASTPRUNE_PICK(topk_count)(within + s.begin, s.end - s.begin);
  }
  std::vector<Selection> selections;
  for (size_t i = 0; i < ks.size(); ++i) {
    fail_few(ks[i], candidates, where);
    selections.emplace_back(problems[i], spans, ks[i], candidates);
  }
  Selection::run(selections);
}

void select_layers(const TopkCall& call) {
  for (size_t i = 0; i < call.tensors.size(); ++i) {
    if (call.lamp) {
      const std::vector<TopkTensor> alone{call.tensors[i]};
      LampSelection lamp(call.problem(alone), 1, static_cast<int64_t>(i));
      fail_few(call.counts[i], lamp.candidates(), "values[" + std::to_string(i) + "]");
      lamp.run(alone, call.counts[i]);
      continue;
    }
    select({call.problem(call.tensors)}, {{static_cast<int64_t>(i), 0, call.tensors[i].numel}},
           {call.counts[i]}, "values[" + std::to_string(i) + "]");
  }
}

std::vector<TopkSpan> whole(const std::vector<TopkTensor>& tensors) {
  std::vector<TopkSpan> spans;
  for (size_t i = 0; i < tensors.size(); ++i) {
    spans.push_back({static_cast<int64_t>(i), 0, tensors[i].numel});
  }
  return spans;
}

void select_global(const TopkCall& call) {
  std::vector<std::vector<TopkTensor>> tensors;
  for (size_t c = 0; c < call.counts.size(); ++c) tensors.push_back(call.masked(c));
  if (call.lamp) {
    LampSelection lamp(call.problem(tensors[0]), call.tensors.size());
    for (int64_t k : call.counts) fail_few(k, lamp.candidates(), "all values");
    for (size_t c = 0; c < call.counts.size(); ++c) lamp.run(tensors[c], call.counts[c]);
    return;
  }
  std::vector<TopkProblem> problems;
  for (const auto& of : tensors) problems.push_back(call.problem(of));
  select(problems, whole(call.tensors), call.counts, "all values");
}

// A mask of bytes, for the rows of a tensor that need not begin at whole words of bits.
struct RowMask {
  explicit RowMask(const TopkTensor& t, bool packed) : bytes(packed ? t.numel : 0) {
    mask = packed ? bytes.as<uint8_t>() : t.mask;
  }
  Scratch bytes;
  uint8_t* mask;
};

void pack_mask(const uint8_t* bytes, int64_t n, uint8_t* bits) {
  for_each_range((n + 7) / 8, 0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t b = begin; b < end; ++b) {
      unsigned byte = 0;
      for (int64_t j = 8 * b; j < std::min(8 * b + 8, n); ++j) {
        byte |= static_cast<unsigned>(bytes[j] != 0) << (j % 8);
      }
      bits[b] = static_cast<uint8_t>(byte);
    }
  });
}

// counts: what each row keeps, the n-th row counts[n * step].
void select_rows(const TopkCall& call, int64_t i, const int64_t* counts, int64_t step) {
  const int64_t rows = call.rows[i], cols = call.cols(i);
  const RowMask out(call.tensors[i], call.packed);
  std::vector<TopkTensor> tensors = call.tensors;
  tensors[i].mask = out.mask;
  TopkProblem problem = call.problem(tensors);
  problem.packed = false;
  problem.wide = is_wide(call.score, tensors[i]);
  const auto where = [&](int64_t row) {
    return "row " + std::to_string(row) + " of values[" + std::to_string(i) + "]";
  };
  if (cols > kLongRow) {
    for (int64_t r = 0; r < rows; ++r) {
      select({problem}, {{i, r * cols, (r + 1) * cols}}, {counts[r * step]}, where(r));
    }
  } else {
    TopkStatus worst{TopkStatus::ok, rows, 0};
    std::mutex mutex;
    for_each_range(rows, FASTPRUNE_PICK(topk_direct_scratch)(problem.wide, cols),
                   [&](int64_t begin, int64_t end, void* scratch) {
                     TopkStatus status{TopkStatus::ok, 0, 0};
                     const int64_t together = step == 0 ? end - begin : 1;
                     for (int64_t r = begin; r < end && status.kind == TopkStatus::ok;
                          r += together) {
                       status = FASTPRUNE_PICK(topk_rows)(problem, i, cols, r, r + together,
                                                          counts[r * step], scratch);
                     }
                     const std::lock_guard<std::mutex> lock(mutex);
                     if (status.kind != TopkStatus::ok && status.span < worst.span) worst = status;
                   });
    if (worst.kind == TopkStatus::has_nan) fail_nan(i);
    if (worst.kind == TopkStatus::too_few) {
      fail_few(counts[worst.span * step], worst.candidates, where(worst.span));
    }
  }
  if (call.packed) pack_mask(out.mask, tensors[i].numel, call.tensors[i].mask);
}

// The filters' norms are a selection problem of their own: one float64 score per filter.
void select_filters(const TopkCall& call) {
  const TopkProblem problem = call.problem(call.tensors);
  const size_t n = call.tensors.size(), selections = call.counts.size();
  std::vector<Scratch> memory;
  std::vector<std::vector<TopkTensor>> filters(selections);
  for (size_t i = 0; i < n; ++i) {
    const int64_t rows = call.rows[i], cols = call.cols(i);
    memory.emplace_back(checked_product(rows, static_cast<int64_t>(9 + selections), kOp));
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
    for (size_t c = 0; c < selections; ++c) {
      filters[c].push_back({norms, nullptr, within == nullptr ? nullptr : alive,
                            alive + (c + 1) * rows, rows, DType::f64, DType::f64});
    }
  }
  std::vector<TopkProblem> problems;
  for (const auto& of : filters) problems.push_back({of.data(), TopkScore::identity, true});
  select(problems, whole(filters[0]), call.counts, "all filters");
  for (size_t c = 0; c < selections; ++c) {
    const std::vector<TopkTensor> tensors = call.masked(c);
    for (size_t i = 0; i < n; ++i) {
      const RowMask out(tensors[i], call.packed);
      const int64_t cols = call.cols(i);
      for (int64_t r = 0; r < call.rows[i]; ++r) {
        std::fill_n(out.mask + r * cols, cols, filters[c][i].mask[r]);
      }
      if (call.packed) pack_mask(out.mask, tensors[i].numel, tensors[i].mask);
    }
  }
}

// Strings arrive as handles: the conversion to std::string of torch 2.11 to 2.13 leaks each one.
std::vector<Tensor> global_topk_mask_cpu(const std::vector<Tensor>& values,
                                         const std::vector<Tensor>& other,
                                         const std::vector<Tensor>& within,
                                         const std::vector<int64_t>& counts, StringHandle scope,
                                         StringHandle score, const std::vector<double>& scale,
                                         int64_t seed, bool packed) {
  const TopkCall call = validate_global_topk_mask(
      values, other, within, counts, {take_string(scope), take_string(score), scale, seed, packed});
  check_cpu(values[0], kOp, "values[0]");
  switch (call.scope) {
    case TopkScope::global:
      select_global(call);
      break;
    case TopkScope::layer:
      select_layers(call);
      break;
    case TopkScope::neuron:
      for (size_t i = 0; i < call.tensors.size(); ++i) {
        select_rows(call, static_cast<int64_t>(i), &call.counts[i], 0);
      }
      break;
    case TopkScope::row: {
      const int64_t* counts = call.counts.data();
      for (size_t i = 0; i < call.tensors.size(); ++i) {
        select_rows(call, static_cast<int64_t>(i), counts, 1);
        counts += call.rows[i];
      }
      break;
    }
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
      "str score, float[] scale=[], int seed=0, bool packed=False) -> Tensor[]");
  // On CUDA: the masks and, last, int64 (2,): the first tensor with a NaN score and the first
  // selection with too few candidates, or INT64_MAX.
  m.def(
      "global_topk_mask_status(Tensor[] values, Tensor[] other, Tensor[] within, int[] counts, str "
      "scope, str score, float[] scale=[], int seed=0, bool packed=False) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("global_topk_mask", TORCH_BOX(&fastprune::global_topk_mask_cpu));
}
