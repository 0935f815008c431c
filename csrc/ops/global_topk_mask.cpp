#include "ops/global_topk_mask.h"

#include <algorithm>
#include <cmath>
#include <mutex>

namespace fastprune {
namespace {

constexpr const char* kOp = "global_topk_mask";
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
  STD_TORCH_CHECK(counts.size() == expected, kOp, ": counts: expected ", expected,
                  " with scope '", scope, "', got ", counts.size());
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
      STD_TORCH_CHECK(counts[i] >= 0 && (counts[i] <= units || call.rows[i] == 0), kOp,
                      ": counts[", i, "]: expected 0 to ", units, " kept of values[", i, "]",
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

[[noreturn]] void fail_nan(int64_t tensor) {
  STD_TORCH_CHECK(false, kOp, ": values[", tensor, "]: a candidate's score is NaN");
}

// Exactly k of the elements of some spans.
class Selection {
 public:
  // candidates: elements of the spans that are inside `within`; k is at most that.
  Selection(const TopkProblem& problem, const std::vector<TopkSpan>& spans, int64_t k,
            int64_t candidates)
      : problem_(problem), k_(k), candidates_(candidates) {
    for (const TopkSpan& s : spans) {
      elements_ += s.end - s.begin;
      for (int64_t at = s.begin; at < s.end; at += kTopkChunk) {
        chunks_.push_back({{s.tensor, at, std::min(at + kTopkChunk, s.end)}, 0, 0, 0, 0, 0, false});
      }
    }
  }

  void run() {
    const int64_t lowest = topk_lowest_key(problem_.wide), highest = topk_highest_key(problem_.wide);
    int64_t capacity = 0;
    TopkBracket bracket{{lowest, lowest, lowest, lowest}};  // every candidate is above
    if (k_ == 0) {
      bracket = {{highest, highest, highest, highest}};
    } else if (k_ < candidates_) {
      bracket = guess(capacity);
    }
    while (!decide(bracket, capacity)) {
      // The counts of the pass say on which side of the bracket, or where in it, the threshold is.
      int64_t lo = bracket.bounds[2] + 1, hi = bracket.bounds[1];
      int64_t above = above_ + top_, inside = inside_;
      if (k_ <= above_) {
        lo = bracket.bounds[0] + 1, hi = highest, above = 0, inside = above_;
      } else if (k_ > above_ + top_ + inside_ + bottom_) {
        above = above_ + top_ + inside_ + bottom_;
        lo = lowest + 1, hi = bracket.bounds[3], inside = candidates_ - above;
      }
      bracket = refine(lo, hi, above, inside, capacity);
    }
  }

 private:
  template <typename F>
  void for_each_worker(const F& f) const {
    const int64_t n = static_cast<int64_t>(chunks_.size()), workers = std::min(n, thread_count());
    for_each_range(workers, 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t w = begin; w < end; ++w) f(w, n * w / workers, n * (w + 1) / workers);
    });
  }

  // A bracket that holds the k-th largest key with high probability.
  TopkBracket guess(int64_t& capacity) const {
    const double n = static_cast<double>(candidates_);
    // Larger samples cost more, but leave fewer candidates to rank.
    const double size = std::clamp(0.7 * std::cbrt(n * n), 1024.0, 65536.0);
    const int64_t wanted = std::min<int64_t>(
        elements_ / 8, static_cast<int64_t>(size * static_cast<double>(elements_) / n));
    const int64_t key_bytes = problem_.wide ? 8 : 4;
    const Scratch keys((wanted + 64) * key_bytes), scratch((wanted / 2 + 64) * key_bytes);
    const int64_t found =
        FASTPRUNE_PICK(topk_sample)(problem_, chunks_.data(),
                                    static_cast<int64_t>(chunks_.size()), elements_, wanted,
                                    keys.as<void>());
    const double share = static_cast<double>(k_) / n, s = static_cast<double>(found);
    const double slack = 4.0 * std::sqrt(s * share * (1.0 - share)) + 3.0;
    const int64_t hi_rank = static_cast<int64_t>(std::floor(s * share - slack));
    const int64_t lo_rank = static_cast<int64_t>(std::ceil(s * share + slack));
    TopkThreshold hi{topk_highest_key(problem_.wide), 0, 0};
    TopkThreshold lo{topk_lowest_key(problem_.wide) + 1, 0, 0};
    const auto select = FASTPRUNE_PICK(topk_select);
    if (hi_rank >= 1) {
      hi = select(problem_.wide, keys.as<void>(), found, hi_rank, scratch.as<void>());
    }
    if (lo_rank <= found) {
      lo = select(problem_.wide, keys.as<void>(), found, lo_rank, scratch.as<void>());
    }
    capacity = static_cast<int64_t>(3.0 * slack * n / (s + 1.0)) + 4096;
    if (lo.key == hi.key) return {{lo.key, lo.key, lo.key, lo.key - 1}};
    constexpr int64_t kMassed = 8;  // so many equal samples: a value to count, not to collect
    const bool top = hi.equal >= kMassed, bottom = lo.equal >= kMassed;
    return {{hi.key, hi.key - (top ? 1 : 0), lo.key - (bottom ? 0 : 1), lo.key - 1}};
  }

  // Narrows [lo, hi], which holds the k-th largest key, until few elements or one key are left.
  TopkBracket refine(int64_t lo, int64_t hi, int64_t above, int64_t inside,
                     int64_t& capacity) const {
    const int64_t few = std::max<int64_t>(65536, elements_ / 64);
    while (lo < hi && inside > few) {
      std::vector<int64_t> histogram(kTopkBins);
      std::mutex mutex;
      for_each_worker([&](int64_t, int64_t begin, int64_t end) {
        std::vector<int64_t> part(kTopkBins);
        FASTPRUNE_PICK(topk_histogram)(problem_, chunks_.data(), begin, end, lo, hi, part.data());
        const std::lock_guard<std::mutex> lock(mutex);
        for (int64_t b = 0; b < kTopkBins; ++b) histogram[b] += part[b];
      });
      inside = topk_narrow(histogram.data(), k_, lo, hi, above);
    }
    capacity = lo == hi ? 0 : inside + 64;  // a single key is counted, not collected
    if (lo == hi) return {{lo, lo, lo, lo - 1}};
    return {{hi, hi, lo - 1, lo - 1}};
  }

  // One pass over the factors that counts the classes of the bracket and, if the threshold lies
  // where the bracket says, completes the masks. False: it does not.
  bool decide(const TopkBracket& bracket, int64_t capacity) {
    const int64_t workers = std::min<int64_t>(static_cast<int64_t>(chunks_.size()), thread_count());
    const int64_t key_bytes = problem_.wide ? 8 : 4;
    // Any worker may meet all of them; pages that none touches are never backed by memory.
    const Scratch keys(checked_product(checked_product(workers, capacity, kOp), key_bytes, kOp));
    const Scratch positions(checked_product(workers, capacity, kOp) * 2);
    std::vector<int64_t> first_chunk(static_cast<size_t>(workers) + 1);
    for_each_worker([&](int64_t w, int64_t begin, int64_t end) {
      first_chunk[w + 1] = end;
      FASTPRUNE_PICK(topk_filter)
      (problem_, chunks_.data(), begin, end, bracket,
       {keys.as<char>() + w * capacity * key_bytes, positions.as<uint16_t>() + w * capacity,
        capacity});
    });
    above_ = top_ = inside_ = bottom_ = 0;
    for (const TopkChunk& c : chunks_) {
      if (c.has_nan) fail_nan(c.span.tensor);
      above_ += c.above, top_ += c.top, inside_ += c.inside, bottom_ += c.bottom;
    }
    const int64_t after_top = above_ + top_, after_inside = after_top + inside_;
    if (k_ == after_top) return true;
    if (k_ < above_ || k_ > after_inside + bottom_) return false;
    if (k_ < after_top) {
      settle(&TopkChunk::top, bracket.bounds[0], k_ - above_, true);
      return true;
    }
    // Bring the workers' candidates together; `first` counts from the common start from here on.
    int64_t used = 0;
    for (int64_t w = 0; w < workers; ++w) {
      int64_t found = 0;
      for (int64_t c = first_chunk[w]; c < first_chunk[w + 1]; ++c) {
        found += chunks_[c].inside;
        chunks_[c].first += used;
      }
      if (found + 64 > capacity && found > 0) return false;
      std::copy_n(keys.as<char>() + w * capacity * key_bytes, found * key_bytes,
                  keys.as<char>() + used * key_bytes);
      std::copy_n(positions.as<uint16_t>() + w * capacity, found, positions.as<uint16_t>() + used);
      used += found;
    }
    TopkThreshold threshold{topk_lowest_key(problem_.wide), 0, 0};
    int64_t ties = 0;
    if (k_ < after_inside) {
      const Scratch scratch((used / 2 + 64) * key_bytes);
      threshold = FASTPRUNE_PICK(topk_select)(problem_.wide, keys.as<void>(), used,
                                              k_ - after_top, scratch.as<void>());
      ties = k_ - after_top - threshold.above;
    }
    FASTPRUNE_PICK(topk_accept)
    (problem_, chunks_.data(), static_cast<int64_t>(chunks_.size()),
     {keys.as<void>(), positions.as<uint16_t>(), used}, threshold.key, ties);
    if (k_ > after_inside) settle(&TopkChunk::bottom, bracket.bounds[3] + 1, k_ - after_inside, false);
    return true;
  }

  // The first `ties` elements of a massed key are kept; `kept` says what their masks hold now.
  void settle(int64_t TopkChunk::*members, int64_t key, int64_t ties, bool kept) const {
    std::vector<std::pair<const TopkChunk*, int64_t>> work;
    for (const TopkChunk& c : chunks_) {
      const int64_t share = std::min(c.*members, ties);
      ties -= share;
      if (share != (kept ? c.*members : 0)) work.emplace_back(&c, share);
    }
    for_each_range(static_cast<int64_t>(work.size()), 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t i = begin; i < end; ++i) {
        FASTPRUNE_PICK(topk_settle_ties)(problem_, *work[i].first, key, work[i].second);
      }
    });
  }

  TopkProblem problem_;
  int64_t k_, candidates_, elements_ = 0;
  std::vector<TopkChunk> chunks_;
  int64_t above_ = 0, top_ = 0, inside_ = 0, bottom_ = 0;
};

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
    candidates += within == nullptr
                      ? s.end - s.begin
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
  const TopkCall call = validate_global_topk_mask(values, other, within, counts,
                                                  take_string(scope), take_string(score));
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
