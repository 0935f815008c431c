// How kernels report bad data.
#pragma once

#include "kernels/cuda/cuda.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// Bad data that only the GPU has seen. A kernel skips it and leaves a mark; the next op raises.
enum Fault : uint32_t {
  kNoFault = 0,
  kBadRowPtr = 1,  // bounds of a packed pattern
  kBadOffset = 2,  // an entry outside its block
  kBadMatch = 3,   // two patterns that describe different masks
  kNanScore = 4,   // of a selection whose result nobody has read yet
  kTooFew = 5,     // fewer candidates than a selection was to keep
};

// The mark: one word in memory that the host sees without synchronising. Never freed.
cudaError_t fault_mark(uint32_t** mark);

#if defined(__CUDACC__) || defined(FASTPRUNE_EMULATED)
__device__ __forceinline__ void report(uint32_t* mark, Fault fault) {
  *reinterpret_cast<volatile uint32_t*>(mark) = fault;
}
#endif

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
