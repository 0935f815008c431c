#include "kernels/cuda/global_topk_mask.h"

#include "ops/cuda_op.h"
#include "ops/global_topk_mask.h"
#include "ops/topk_selection.h"  // kTopkOp

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr const char* kOp = kTopkOp;
constexpr size_t kLayersAtOnce = 64;  // a histogram each, 64 KB

template <typename T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

bool aligned_to(const void* p, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

bool aligned_factor(const void* p, DType dtype) {
  return aligned_to(p, dtype == DType::f32 || dtype == DType::f64 ? 16 : 8);
}

class Call {
 public:
  Call(TopkCall call, const std::vector<Tensor>& values, const std::vector<Tensor>& other,
       bool with_status)
      : call_(std::move(call)), device_(values[0], kOp), like_(values[0]) {
    STD_TORCH_CHECK(!call_.lamp, kOp,
                    ": score: on CUDA expected scores of LAMP made beforehand, with 'identity', "
                    "got 'lamp'");
    for (size_t i = 0; i < values.size(); ++i) {
      TopkTensor& t = call_.tensors[i];
      if (t.values_strides != nullptr) t.values = dense_copy(values[i]);
      if (t.other_strides != nullptr) t.other = dense_copy(other[i]);
    }
    const int64_t words[] = {2};
    status_ = torch::stable::new_empty(like_, {words, 1}, ScalarType::Long);
    mark_ = with_status ? nullptr : device_.fault();
  }

  void run() {
    switch (call_.scope) {
      case TopkScope::global:
        select_global();
        break;
      case TopkScope::layer:
        select_layers();
        break;
      case TopkScope::neuron:
        select_rows();
        break;
      case TopkScope::filter:
        select_filters();
        break;
      case TopkScope::row:
        STD_TORCH_CHECK(false, kOp, ": scope: 'row' has no CUDA kernel");
    }
    if (!status_begun_) {  // nothing to select from
      check_launch(topk_clear_status(data_of<int64_t>(status_), device_.stream()), kOp);
    }
  }

  std::vector<Tensor> masks() const { return call_.masks; }
  Tensor status() const { return status_; }

 private:
  const void* dense_copy(const Tensor& t) {
    call_.held.push_back(dense(t));
    return call_.held.back().const_data_ptr();
  }

  // Memory of this call on the device; torch's allocator keeps it from others until the stream is
  // done with it.
  void* scratch(int64_t bytes) {
    const int64_t sizes[] = {bytes};
    call_.held.push_back(torch::stable::new_empty(like_, {sizes, 1}, ScalarType::Byte));
    return data_of<void>(call_.held.back());
  }

  uint8_t* mask(size_t selection, size_t i) const {
    return data_of<uint8_t>(call_.masks[selection * call_.tensors.size() + i]);
  }

  // For one launcher after another: the first begins the status.
  TopkScoring scoring(bool wide) {
    const bool more = status_begun_;
    status_begun_ = true;
    return {call_.score, wide, call_.scaled, call_.packed, call_.seed, data_of<int64_t>(status_),
            more,        mark_};
  }

  TopkSource source(size_t i, uint32_t problem) const {
    const TopkTensor& t = call_.tensors[i];
    TopkSource s{t.values, t.other,       t.within,
                 t.numel,  t.first,       t.scale,
                 0,        problem,       static_cast<uint32_t>(i),
                 t.dtype,  t.other_dtype, 0};
    bool aligned = aligned_factor(t.values, t.dtype) && aligned_to(t.within, 4);
    if (t.other != nullptr) aligned &= aligned_factor(t.other, t.other_dtype);
    s.aligned = aligned ? 1 : 0;  // masks are fresh memory
    return s;
  }

  void select(const TopkSelections& of) {
    check_launch(
        topk_select(of, scratch(topk_select_scratch(of)), device_.limits(), device_.stream()), kOp);
  }

  void select_global() {
    std::vector<TopkSource> sources;
    std::vector<uint8_t*> masks;
    bool wide = false;
    for (size_t c = 0; c < call_.counts.size(); ++c) {
      for (size_t i = 0; i < call_.tensors.size(); ++i) {
        if (call_.tensors[i].numel == 0) continue;
        wide |= is_wide(call_.score, call_.tensors[i]);
        masks.push_back(mask(c, i));
        if (c == 0) sources.push_back(source(i, 0));
      }
    }
    if (sources.empty()) return;
    select({scoring(wide), sources.data(), static_cast<int64_t>(sources.size()), masks.data(),
            call_.counts.data(), 1, static_cast<int64_t>(call_.counts.size()), false});
  }

  void select_layers() {
    std::vector<TopkSource> sources;
    std::vector<uint8_t*> masks;
    std::vector<int64_t> counts;
    bool wide = false;
    const auto flush = [&] {
      const int64_t n = static_cast<int64_t>(sources.size());
      if (n > 0)
        select({scoring(wide), sources.data(), n, masks.data(), counts.data(), n, 1, true});
      sources.clear();
      masks.clear();
      counts.clear();
      wide = false;
    };
    for (size_t i = 0; i < call_.tensors.size(); ++i) {
      if (call_.tensors[i].numel == 0) continue;
      wide |= is_wide(call_.score, call_.tensors[i]);
      sources.push_back(source(i, static_cast<uint32_t>(sources.size())));
      masks.push_back(mask(0, i));
      counts.push_back(call_.counts[i]);
      if (sources.size() == kLayersAtOnce) flush();
    }
    flush();
  }

  // The tensors as rows; those without elements only where the norms of nothing are wanted.
  struct Rows {
    std::vector<TopkSource> sources;
    std::vector<int64_t> cols, firsts;  // firsts: of all tensors
    std::vector<size_t> tensors;
    int64_t n_rows = 0;
    bool wide = false;
  };

  Rows rows(bool empty_too) const {
    Rows result;
    for (size_t i = 0; i < call_.tensors.size(); ++i) {
      const int64_t cols = call_.cols(i);
      STD_TORCH_CHECK(cols < int64_t{1} << 32, kOp, ": values[", i,
                      "]: expected rows of less than 2^32 elements, got ", cols);
      result.firsts.push_back(result.n_rows);
      if (call_.rows[i] > 0 && (empty_too || cols > 0)) {
        result.wide |= is_wide(call_.score, call_.tensors[i]);
        result.sources.push_back(source(i, 0));
        result.sources.back().first_tile = static_cast<uint32_t>(result.n_rows);
        result.cols.push_back(cols);
        result.tensors.push_back(i);
      }
      result.n_rows += call_.rows[i];
    }
    STD_TORCH_CHECK(result.n_rows < int64_t{1} << 32, kOp,
                    ": values: expected less than 2^32 rows, got ", result.n_rows);
    return result;
  }

  void select_rows() {
    const Rows all = rows(false);
    if (all.sources.empty()) return;
    std::vector<uint8_t*> masks;
    std::vector<int64_t> counts;
    for (size_t i : all.tensors) {
      // Rows need not begin at whole bytes of bits.
      masks.push_back(call_.packed
                          ? static_cast<uint8_t*>(scratch((call_.tensors[i].numel + 15) / 16 * 16))
                          : mask(0, i));
      counts.push_back(call_.counts[i]);
    }
    const TopkRows of{scoring(all.wide), all.sources.data(),
                      static_cast<int64_t>(all.sources.size()), all.n_rows, all.cols.data()};
    check_launch(topk_rows(of, masks.data(), counts.data(), scratch(topk_rows_scratch(of)),
                           device_.limits(), device_.stream()),
                 kOp);
    for (size_t n = 0; call_.packed && n < masks.size(); ++n) {
      const size_t i = all.tensors[n];
      expand(masks[n], 1, mask(0, i), call_.tensors[i].numel);
    }
  }

  void expand(const uint8_t* kept, int64_t cols, uint8_t* to, int64_t numel) {
    check_launch(
        topk_expand_rows(kept, cols, call_.packed, to, numel, device_.limits(), device_.stream()),
        kOp);
  }

  // The filters' norms are a selection of their own: one float64 score per filter.
  void select_filters() {
    const Rows all = rows(true);
    if (all.sources.empty()) return;
    const size_t selections = call_.counts.size();
    double* norms = static_cast<double*>(scratch(all.n_rows * 8));
    uint8_t* alive = static_cast<uint8_t*>(scratch(all.n_rows));
    const TopkRows of{scoring(true), all.sources.data(), static_cast<int64_t>(all.sources.size()),
                      all.n_rows, all.cols.data()};
    check_launch(topk_filter_norms(of, norms, alive, scratch(topk_rows_scratch(of)),
                                   device_.limits(), device_.stream()),
                 kOp);
    std::vector<TopkSource> sources;
    std::vector<uint8_t*> masks, kept;
    for (size_t c = 0; c < selections; ++c) {
      kept.push_back(static_cast<uint8_t*>(scratch(all.n_rows)));
      for (size_t i : all.tensors) masks.push_back(kept[c] + all.firsts[i]);
    }
    for (size_t i : all.tensors) {
      const int64_t first = all.firsts[i];
      const bool restricted = call_.tensors[i].within != nullptr;
      TopkSource norm{};
      norm.values = norms + first;
      norm.within = restricted ? alive + first : nullptr;
      norm.numel = call_.rows[i];
      norm.scale = 1.0;
      norm.index = static_cast<uint32_t>(i);
      norm.dtype = norm.other_dtype = DType::f64;
      norm.aligned = first % 4 == 0 ? 1 : 0;
      sources.push_back(norm);
    }
    TopkScoring by_norm = scoring(true);
    by_norm.score = TopkScore::identity;
    by_norm.scaled = by_norm.packed = false;
    select({by_norm, sources.data(), static_cast<int64_t>(sources.size()), masks.data(),
            call_.counts.data(), 1, static_cast<int64_t>(selections), false});
    for (size_t c = 0; c < selections; ++c) {
      for (size_t i : all.tensors) {
        if (call_.tensors[i].numel == 0) continue;
        expand(kept[c] + all.firsts[i], call_.cols(i), mask(c, i), call_.tensors[i].numel);
      }
    }
  }

  TopkCall call_;
  CudaCall device_;
  Tensor like_, status_;
  uint32_t* mark_;
  bool status_begun_ = false;
};

std::vector<Tensor> select_cuda(const std::vector<Tensor>& values, const std::vector<Tensor>& other,
                                const std::vector<Tensor>& within,
                                const std::vector<int64_t>& counts, const TopkOptions& options,
                                bool with_status) {
  Call call(validate_global_topk_mask(values, other, within, counts, options), values, other,
            with_status);
  call.run();
  std::vector<Tensor> result = call.masks();
  if (with_status) result.push_back(call.status());
  return result;
}

// Bad data raises at the next call on a CUDA device.
std::vector<Tensor> global_topk_mask_cuda(const std::vector<Tensor>& values,
                                          const std::vector<Tensor>& other,
                                          const std::vector<Tensor>& within,
                                          const std::vector<int64_t>& counts, StringHandle scope,
                                          StringHandle score, const std::vector<double>& scale,
                                          int64_t seed, bool packed) {
  return select_cuda(values, other, within, counts,
                     {take_string(scope), take_string(score), scale, seed, packed}, false);
}

// Bad data is left to the caller, who looks at the last tensor (TopkScoring::status).
std::vector<Tensor> global_topk_mask_status_cuda(
    const std::vector<Tensor>& values, const std::vector<Tensor>& other,
    const std::vector<Tensor>& within, const std::vector<int64_t>& counts, StringHandle scope,
    StringHandle score, const std::vector<double>& scale, int64_t seed, bool packed) {
  return select_cuda(values, other, within, counts,
                     {take_string(scope), take_string(score), scale, seed, packed}, true);
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE

FASTPRUNE_CUDA_IMPL(m) {
  m.impl("global_topk_mask",
         TORCH_BOX(&fastprune::FASTPRUNE_CUDA_NAMESPACE::global_topk_mask_cuda));
  m.impl("global_topk_mask_status",
         TORCH_BOX(&fastprune::FASTPRUNE_CUDA_NAMESPACE::global_topk_mask_status_cuda));
}
