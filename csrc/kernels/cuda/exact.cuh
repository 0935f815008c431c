// Elements of a product from present weights alone, for kernels (bits.h).
#pragma once

#include "kernels/cuda/bits.h"
#include "kernels/cuda/elements.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// One element of y before the bias, by a whole warp; every lane gets it.
template <typename T>
__device__ __forceinline__ Accumulator<T> exact_element(const ExactRows& e, int64_t n,
                                                        int64_t output) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t row_words = (e.mask.cols + 31) / 32;
  const T* weight = static_cast<const T*>(e.weight);
  Accumulator<T> sum = 0;
  if (e.transposed) {
    const T* x = static_cast<const T*>(e.x) + n * e.mask.rows;
    for (int64_t r = lane; r < e.mask.rows; r += 32) {
      if ((e.mask.words[r * row_words + output / 32] >> (output % 32) & 1u) != 0) {
        sum += widen(weight[r * e.mask.cols + output]) * widen(x[r]);
      }
    }
  } else {
    const T* x = static_cast<const T*>(e.x) + n * e.mask.cols;
    for (int64_t j = lane; j < row_words; j += 32) {
      for (uint32_t bits = e.mask.words[output * row_words + j]; bits != 0; bits &= bits - 1) {
        const int64_t c = 32 * j + __ffs(static_cast<int>(bits)) - 1;
        sum += widen(weight[output * e.mask.cols + c]) * widen(x[c]);
      }
    }
  }
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  return sum;
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
