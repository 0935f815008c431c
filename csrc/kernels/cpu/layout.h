// Activations between their layouts, and what acts on them element by element in either one.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/scalar_types.h"

namespace fastprune {

// y = relu?(x * scale[c] + shift[c]) over outer x channels x inner elements.
struct AffineArgs {
  DType dtype;  // of x and y
  int64_t channels, inner;
  const void *scale, *shift;  // accumulator type, one value per channel
  bool relu;
  const void* x;
  void* y;
};

FASTPRUNE_PER_ISA(
    // to[j * rows + i] = from[i * cols + j] for all i and j in [begin, end).
    void transpose_matrix(DType dtype, const void* from, int64_t rows, int64_t cols, void* to,
                          int64_t begin, int64_t end);
    // The planes (outer * channels of them, of `inner` elements) in [begin, end).
    void affine(const AffineArgs& args, int64_t begin, int64_t end);)

}  // namespace fastprune
