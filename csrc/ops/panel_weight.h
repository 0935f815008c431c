// A prepared weight (kernels/cuda/panel.h) as tensors, and what linear and convolution share around
// it.
#pragma once

#include "kernels/cuda/masked_linear.h"
#include "kernels/cuda/pattern.h"
#include "ops/cuda_op.h"
#include "ops/product.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

struct PanelWeight {
  PatternView pattern;  // of the prepared direction; its arrays are read no more
  Tensor entries, bounds, order;

  PanelWeightView view() const {
    return PanelWeightView{const_cast<void*>(entries.const_data_ptr()),
                           static_cast<uint2*>(const_cast<void*>(bounds.const_data_ptr())),
                           static_cast<int32_t*>(const_cast<void*>(order.const_data_ptr()))};
  }
};

// `weight`: dense, on the pattern's device.
inline PanelWeight prepare_panel(const CudaCall& call, const PatternView& pattern, bool transposed,
                                 const PatternView* match, const Tensor& weight_in,
                                 const PanelLayout& layout, const char* op) {
  const DType dtype = dtype_of(weight_in, op, "weight");
  const Tensor weight = dense(weight_in);
  STD_TORCH_CHECK(pattern.rows < (int64_t{1} << 31), op, ": weight: expected fewer than 2^31 rows");
  if (match != nullptr) {
    STD_TORCH_CHECK(match->nnz == pattern.nnz, op, ": transposed_offset: expected the ", match->nnz,
                    " entries of offset, got ", pattern.nnz);
  }
  const int64_t bytes =
      checked_product(panel_entries(pattern, layout), panel_entry_bytes(dtype), op);
  PanelWeight made{
      pattern, torch::stable::new_empty(weight, {bytes}, ScalarType::Byte),
      torch::stable::new_empty(weight, {2 * panel_bounds(pattern, layout)}, ScalarType::Int),
      torch::stable::new_empty(weight, {panel_windows(pattern) * kPanelWindow}, ScalarType::Int)};
  const PanelWeightArgs args{pattern,
                             transposed,
                             match == nullptr ? nullptr : match->row_ptr,
                             match == nullptr ? nullptr : match->offset,
                             match == nullptr ? 1 : match->block_depth,
                             dtype,
                             weight.const_data_ptr(),
                             layout,
                             made.view(),
                             call.fault()};
  check_launch(prepare_panel_weight(args, call.limits(), call.stream()), op);
  return made;
}

// A dense gradient, with zeros where the pattern has no entry.
inline void keep_entries(const CudaCall& call, const PatternView& pattern, Tensor& grad,
                         const char* op) {
  check_launch(keep_pattern(pattern, dtype_of(grad, op, "weight_grad"), grad.mutable_data_ptr(),
                            call.fault(), call.limits(), call.stream()),
               op);
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
