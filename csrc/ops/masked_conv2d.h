// Torch side of masked_conv2d: convolution with an unstructured mask, and its gradients.
#pragma once

#include "ops/pattern.h"

namespace fastprune {

// stride, padding, dilation: (height, width).
struct ConvGeometry {
  int64_t stride[2], padding[2], dilation[2], groups;
};

// Named sizes of one call, checked against each other.
struct MaskedConv2dCall {
  PatternShape shape;
  ConvGeometry geometry;
  DType dtype;
  int64_t batch, channels, height, width;  // of x
  int64_t kernel_height, kernel_width;
  int64_t out_height, out_width;  // of y
};

using Pair = torch::headeronly::HeaderOnlyArrayRef<int64_t>;

// The checks of every device and direction: sizes of x and the weight's shape in, named sizes out.
MaskedConv2dCall validate_masked_conv2d(const Tensor& typed, Pair x_sizes, Pair weight_sizes,
                                        Pair stride, Pair padding, Pair dilation, int64_t groups,
                                        int64_t block_depth, int64_t transposed_block_depth,
                                        const char* op);
// The gradient of y, against the sizes of the call.
void check_output_grad(const Tensor& grad, const MaskedConv2dCall& c, const char* op);

}  // namespace fastprune
