// The convolution products on CUDA cores: a weight prepared once for a geometry, and multiplied as
// often as it stays.
#pragma once

#include <vector>

#include "kernels/cuda/masked_conv2d.h"
#include "ops/masked_conv2d.h"
#include "ops/panel_weight.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// A convolution's weight in the form that calls of one geometry read (all sizes of MaskedConv2dCall
// but its dtype included). Kept by a plan for as long as weight, pattern and geometry stay.
struct ConvPanelWeight {
  PanelWeight panel;
  ConvTile tile;
  std::vector<ConvAxisPart> y, x;  // the classes along either axis: their products are apart
  bool covers;                     // whether those write every pixel of the result
};

// `pattern`: of the direction, `transposed` for the input gradient; `match`: the forward pattern
// that a transposed one must agree with, or null where it is known to.
ConvPanelWeight prepare_conv2d(const CudaCall& call, const MaskedConv2dCall& c,
                               const PatternView& pattern, bool transposed,
                               const PatternView* match, const Tensor& weight, const char* op);
// y of x, or, with the transposed pattern, the gradient of x from that of y. The residual: of the
// result's sizes and dtype; only where all pixels are covered.
Tensor conv2d_product(const CudaCall& call, const MaskedConv2dCall& c,
                      const ConvPanelWeight& weight, bool transposed, const Tensor& source,
                      const Epilogue& epilogue, const char* op);
// The gradient at the mask, as a dense tensor.
Tensor conv2d_weight_grad(const CudaCall& call, const MaskedConv2dCall& c,
                          const PatternView& pattern, const Tensor& grad, const Tensor& x,
                          const char* op);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
