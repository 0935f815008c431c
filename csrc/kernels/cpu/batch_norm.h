// Batch normalization in training, with the ReLU after it, channel by channel: a channel's elements
// are read from the L2 cache after the first pass, in either layout.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/scalar_types.h"

namespace fastprune {

// Channel c is `pieces` runs of `length` elements; run i starts at c * channel_stride +
// i * piece_stride.
struct ChannelRuns {
  int64_t pieces, length, channel_stride, piece_stride;
  int64_t count() const { return pieces * length; }
};

// y = relu?((x - mean) * invstd * weight + bias), with the mean and biased variance of each
// channel.
struct BatchNormArgs {
  DType dtype;  // of x and y
  ChannelRuns runs;
  double eps;
  bool relu;
  const void* x;
  const void *weight, *bias;  // accumulator type, per channel; or null for 1 and 0
  void* y;
  void *mean, *variance, *invstd;  // accumulator type, written
};

struct BatchNormGradArgs {
  DType dtype;  // of x, y_grad and x_grad
  ChannelRuns runs;
  bool relu;
  const void *x, *y_grad;
  const void *weight, *bias;  // as above
  const void *mean, *invstd;  // as written above
  void* x_grad;
  void *weight_grad, *bias_grad;  // accumulator type, written
};

FASTPRUNE_PER_ISA(
    // The channels [begin, end).
    void batch_norm(const BatchNormArgs& args, int64_t begin, int64_t end);
    void batch_norm_grad(const BatchNormGradArgs& args, int64_t begin, int64_t end);)

}  // namespace fastprune
