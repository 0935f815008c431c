// Packed patterns as tensors, checked at every call, and the values that a product reads.
#pragma once

#include <cstdint>

#include "kernels/cpu/pattern.h"
#include "ops/common.h"

namespace fastprune {

// A weight's shape as the kernels see it, and how its two patterns are blocked.
struct PatternShape {
  int64_t rows, groups, depth, taps;
  int64_t block_depth, transposed_block_depth;
};

// Checks the tensors of one pattern against its shape: dtypes, lengths, and every bound and offset.
PatternView checked_pattern(const Tensor& row_ptr, const Tensor& offset, const PatternShape& shape,
                            bool transposed, const char* op);

// The weight's values at the pattern's entries, in the accumulator type.
Tensor forward_values(const PatternView& forward, const Tensor& weight, const char* op);
Tensor transposed_values(const PatternView& forward, const PatternView& transposed,
                         const Tensor& weight, const char* op);
// The dense gradient, `weight_sizes` shaped, from the values at the entries: zero elsewhere.
void scatter_to_dense(const PatternView& forward, DType dtype, const Tensor& values,
                      Tensor& weight_grad);

// Bias in the accumulator type, or nothing; checked against the number of rows.
std::optional<Tensor> checked_bias(const std::optional<Tensor>& bias, int64_t rows,
                                   ScalarType dtype, const char* op);

// How a product is cut into items: tiles, times row ranges where tiles alone leave threads idle.
struct Cuts {
  int64_t tiles, parts, rows;
  int64_t items() const { return tiles * parts; }
  int64_t rows_per_part() const { return (rows + parts - 1) / parts; }
  int64_t row_begin(int64_t part) const { return rows * part / parts; }
};
Cuts cut_product(int64_t points, int64_t tile, int64_t rows);
// One part per thread, for weight gradients: a part walks all points itself, in order.
Cuts cut_rows(int64_t rows);

}  // namespace fastprune
