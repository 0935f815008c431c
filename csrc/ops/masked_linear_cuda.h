// The linear products on CUDA cores: a weight prepared once, and multiplied as often as it stays.
#pragma once

#include "ops/masked_linear.h"
#include "ops/panel_weight.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// A linear weight in the form that products of `batch` entries read. Kept by a plan for as long as
// weight, pattern and tile (linear_tile of the batch) stay.
struct LinearPanelWeight {
  PanelWeight panel;
  LinearTile tile;
};

// `pattern`: of the direction; `match`: the forward pattern that a transposed one must agree with,
// or null where it is known to.
LinearPanelWeight prepare_linear(const CudaCall& call, const PatternView& pattern, bool transposed,
                                 const PatternView* match, const Tensor& weight, int64_t batch,
                                 const char* op);
// y for an x of (batch, depth). The residual: of y's sizes and dtype.
Tensor linear_product(const CudaCall& call, const LinearPanelWeight& weight, const Tensor& x,
                      const Epilogue& epilogue, const char* op);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
