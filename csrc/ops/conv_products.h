// The three products of a convolution, given a pattern that was checked: what the ops that take raw
// patterns and those that take plans share.
#pragma once

#include "ops/masked_conv2d.h"
#include "ops/product.h"

namespace fastprune {

Tensor conv_forward(const MaskedConv2dCall& c, const ConvWeight& weight, const Tensor& x,
                    const Epilogue& epilogue, Layout layout);
// `weight` in transposed order.
Tensor conv_input_grad(const MaskedConv2dCall& c, const ConvWeight& weight, const Tensor& grad,
                       Layout layout);
// The gradient at the mask, as a dense tensor.
Tensor conv_weight_grad(const MaskedConv2dCall& c, const ConvWeight& weight, const Tensor& grad,
                        const Tensor& x);

}  // namespace fastprune
