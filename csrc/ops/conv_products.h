// The three products of a convolution, given a pattern that was checked: what the ops that take raw
// patterns and those that take plans share.
#pragma once

#include "ops/masked_conv2d.h"
#include "ops/product.h"

namespace fastprune {

// True for a 4-d tensor stored (channel, y, x, batch) without gaps, and not also contiguous.
bool is_batch_last(const Tensor& t);
// An uninitialized tensor of these sizes.
Tensor new_activations(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w,
                       bool batch_last);

Tensor conv_forward(const MaskedConv2dCall& c, const ConvWeight& weight, const Tensor& x,
                    const Epilogue& epilogue, Layout layout);
// `weight` in transposed order.
Tensor conv_input_grad(const MaskedConv2dCall& c, const ConvWeight& weight, const Tensor& grad,
                       Layout layout);
// The gradient at the mask, as a dense tensor.
Tensor conv_weight_grad(const MaskedConv2dCall& c, const ConvWeight& weight, const Tensor& grad,
                        const Tensor& x);

}  // namespace fastprune
