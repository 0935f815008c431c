// y = x (W * M)^T + b for an unstructured mask, and its gradients, over packed patterns.
#pragma once

#include "kernels/cpu/pattern.h"

namespace fastprune {

// The product y[n, r] = sum over the entries (r, c) of values * x[n, c], plus bias[r]. The input
// gradient is the same product with the transposed pattern and x = grad of y.
struct MaskedLinearArgs {
  PatternView pattern;
  DType dtype;  // of x and y
  int64_t batch;
  const void* x;       // batch x pattern.cols(), contiguous
  const void* values;  // accumulator type (float, or double for f64), in the pattern's order
  const void* bias;    // pattern.rows values of the accumulator type, or null
  void* y;             // batch x pattern.rows, contiguous
  bool x_transposed, y_transposed;  // stored cols x batch, rows x batch instead
  const void* residual;             // added to the rounded result, stored as y; or null
  bool relu;                        // then applied
};

// values_grad[e] = sum over the batch of grad[n, r] * x[n, c] at the entries (r, c).
struct MaskedLinearWeightGradArgs {
  PatternView pattern;
  DType dtype;  // of grad and x
  int64_t batch;
  const void* grad;                    // batch x pattern.rows, contiguous
  const void* x;                       // batch x pattern.cols(), contiguous
  void* values_grad;                   // accumulator type, zero at the start
  bool grad_transposed, x_transposed;  // stored rows x batch, cols x batch instead
};

FASTPRUNE_PER_ISA(
    // Tiles of activations: tile t covers batch entries from t * masked_linear_tile(dtype).
    int64_t masked_linear_tile(DType dtype);
    // Bytes of scratch, aligned to 64, for `rows` rows of the product (or of the weight gradient).
    int64_t masked_linear_scratch(const PatternView& pattern, DType dtype, int64_t rows);
    // Rows [row_begin, row_end) of y for one tile.
    void masked_linear(const MaskedLinearArgs& args, int64_t tile, int64_t row_begin,
                       int64_t row_end, void* scratch);
    // The entries of the rows [row_begin, row_end), over the whole batch in order.
    void masked_linear_weight_grad(const MaskedLinearWeightGradArgs& args, int64_t row_begin,
                                   int64_t row_end, void* scratch);)

}  // namespace fastprune
