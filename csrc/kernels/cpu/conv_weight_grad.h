// The whole weight gradient of a convolution whose activations have the batch innermost: dot
// products of a channel of x with a channel of the output's gradient, shifted by each tap.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/scalar_types.h"

namespace fastprune {

// x is stored (channel, y, x, batch), the gradient (row, out y, out x, batch), without gaps.
struct ConvWeightGradArgs {
  DType dtype;  // f32 or f64
  int64_t batch, channels, height, width;
  int64_t rows, out_height, out_width;
  int64_t kernel_height, kernel_width, groups;
  int64_t stride[2], padding[2], dilation[2];
  const void *grad, *x;
  void* weight_grad;  // (rows, channels / groups, kernel_height, kernel_width), all written
  int64_t tile_rows, tile_channels;  // of one item, multiples of 4; the result's bits do not depend
                                     // on them
  int64_t taps() const { return kernel_height * kernel_width; }
};

FASTPRUNE_PER_ISA(
    // Independent parts: a tile of rows by a tile of channels of one group.
    int64_t conv_weight_grad_items(const ConvWeightGradArgs& args);
    // Bytes that one worker needs.
    int64_t conv_weight_grad_scratch(const ConvWeightGradArgs& args);
    // The items [begin, end).
    void conv_weight_grad(const ConvWeightGradArgs& args, int64_t begin, int64_t end,
                          void* scratch);)

}  // namespace fastprune
