// How a warp finds its values in the tiles of masked_linear_bitmap.h.
#pragma once

#include "kernels/cuda/masked_linear_bitmap.h"
#include "kernels/cuda/warp.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// The number of bits in each byte.
__device__ __forceinline__ uint32_t byte_counts(uint32_t word) {
  word -= word >> 1 & 0x55555555u;
  word = (word & 0x33333333u) + (word >> 2 & 0x33333333u);
  return (word + (word >> 4)) & 0x0f0f0f0fu;
}

// Where a lane's values begin in each of a group's four tiles, in values from the group's first.
struct GroupStarts {
  int at[4];
};
__device__ __forceinline__ GroupStarts group_starts(uint32_t word) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t counts = byte_counts(word);
  // Before a lane stand at most 31 * 8 = 248 values of a tile: a byte. All lanes may hold 256.
  uint32_t before = __shfl_up_sync(kAllLanes, counts, 1);
  if (lane == 0) before = 0;
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, before, static_cast<unsigned>(o));
    if (lane >= o) before += other;
  }
  const uint32_t last = __shfl_sync(kAllLanes, before, 31);
  const uint32_t last_counts = __shfl_sync(kAllLanes, counts, 31);
  GroupStarts starts;
  int tile = 0;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    starts.at[q] = tile + static_cast<int>(before >> (8 * q) & 255u);
    tile += static_cast<int>((last >> (8 * q) & 255u) + (last_counts >> (8 * q) & 255u));
  }
  return starts;
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
