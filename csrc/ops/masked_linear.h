// Torch side of masked_linear: y = x (W * M)^T + b and its gradients.
#pragma once

#include "ops/pattern.h"

namespace fastprune {

// The arguments that the three entries share, checked once for each call.
struct MaskedLinearCall {
  PatternShape shape;
  DType dtype;
  int64_t batch;
};

// One set of checks for every device and direction: `input` is x (or the gradient of y, where
// `cols` are then the weight's rows), `name` what the caller calls it.
MaskedLinearCall validate_masked_linear(const Tensor& input, const char* name, const Tensor& weight,
                                        int64_t block_depth, int64_t transposed_block_depth,
                                        bool input_has_rows, const char* op);

}  // namespace fastprune
