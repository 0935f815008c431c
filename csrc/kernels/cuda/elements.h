// Elements of activations and results: what every product asks of them on the way in and out.
#pragma once

#include "kernels/cuda/cuda.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

#if defined(FASTPRUNE_EMULATED) || defined(__CUDACC__)

// An infinity or a NaN.
__device__ __forceinline__ bool not_finite(float x) {
  return (__float_as_uint(x) & 0x7f800000u) == 0x7f800000u;
}
__device__ __forceinline__ bool not_finite(double x) {
  return (__double_as_longlong(x) & 0x7ff0000000000000ll) == 0x7ff0000000000000ll;
}
__device__ __forceinline__ bool not_finite(BFloat16 x) { return (x.bits & 0x7f80u) == 0x7f80u; }
__device__ __forceinline__ bool not_finite(Float16 x) { return (x.bits & 0x7c00u) == 0x7c00u; }

// One result, finished: rounded, then the residual added and rounded, then ReLU, as the separate
// layers would.
template <typename S>
__device__ __forceinline__ void finish(Accumulator<S> sum, S* to, const S* residual, bool relu) {
  S y = narrow<S>(sum);
  if (residual != nullptr) y = narrow<S>(widen(y) + widen(*residual));
  if (relu) y = narrow<S>(widen(y) < 0 ? 0 : widen(y));  // a NaN stays
  *to = y;
}
// The same for result i of arrays.
template <typename S>
__device__ __forceinline__ void finish(Accumulator<S> sum, void* to, const void* residual,
                                       bool relu, int64_t i) {
  finish<S>(sum, static_cast<S*>(to) + i,
            residual == nullptr ? nullptr : static_cast<const S*>(residual) + i, relu);
}

#endif

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
