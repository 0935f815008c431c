// Torch side of masked_linear: y = x (W * M)^T + b and its gradients.
#pragma once

#include "ops/product.h"

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
// The checks of the weight gradient.
MaskedLinearCall validate_masked_linear_weight_grad(const Tensor& grad, const Tensor& x,
                                                    int64_t block_depth, const char* op);

// The products behind the ops that take raw patterns and those that take plans. `transposed`: the
// weight's order is that of the transposed pattern (input gradient).
Tensor linear_product(const LinearWeight& weight, bool transposed, DType dtype, const Tensor& x,
                      const Epilogue& epilogue, Layout layout);
// The gradient at the mask, as a dense tensor.
Tensor linear_weight_grad(const LinearWeight& weight, DType dtype, const Tensor& grad,
                          const Tensor& x);

}  // namespace fastprune
