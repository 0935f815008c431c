// Products of a block's samples with a matrix, for mon_splitting.cu.
#pragma once

#include "kernels/cuda/device.h"
#include "kernels/cuda/mon_splitting.h"
#include "kernels/cuda/warp.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

constexpr int kMonThreads = 512, kMonWarps = kMonThreads / 32;

// Rows of a packed matrix are aligned: four at a time.
FASTPRUNE_HOST_DEVICE inline int64_t mon_pitch(int64_t n) { return (n + 3) / 4 * 4; }
// Partial sums of a dense product: threads that have no rows of their own share the columns.
FASTPRUNE_HOST_DEVICE inline int mon_groups(int64_t n) {
  const int64_t quads = mon_pitch(n) / 4;
  return quads > kMonThreads ? 1 : static_cast<int>(kMonThreads / quads);
}
// Elements of each sample that a block keeps: x, z, u, what is between A and A^T, the product.
FASTPRUNE_HOST_DEVICE inline int64_t mon_tile_elements(int64_t n) {
  return (4 + mon_groups(n)) * mon_pitch(n);
}

#if defined(FASTPRUNE_EMULATED) || defined(__CUDACC__)

template <typename T, int kT>
struct MonTile {
  Lanes<T, kT>*x, *z, *u, *between, *y;

  __device__ __forceinline__ MonTile(void* memory, int64_t n) {
    const int64_t pitch = mon_pitch(n);
    x = static_cast<Lanes<T, kT>*>(memory);
    z = x + pitch;
    u = z + pitch;
    between = u + pitch;
    y = between + pitch;
  }
};

// The products of x, group by group. packed: column by column, rows up to the pitch.
template <typename T, int kT>
__device__ __forceinline__ void multiply_dense(const T* packed, int n, const Lanes<T, kT>* x,
                                               Lanes<T, kT>* y) {
  const int pitch = static_cast<int>(mon_pitch(n)), quads = pitch / 4, groups = mon_groups(n);
  const int me = static_cast<int>(threadIdx.x);
  const int group = groups == 1 ? 0 : me / quads;
  if (group >= groups) return;
  for (int quad = me - group * quads; quad < quads; quad += kMonThreads) {
    T sum[4][kT] = {};
    const T* column = packed + static_cast<int64_t>(group) * pitch + 4 * quad;
    const int64_t step = static_cast<int64_t>(groups) * pitch;
#pragma unroll 4
    for (int k = group; k < n; k += groups, column += step) {
      const Lanes<T, 4> w = *reinterpret_cast<const Lanes<T, 4>*>(column);
      const Lanes<T, kT> v = x[k];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int t = 0; t < kT; ++t) sum[r][t] += w.at[r] * v.at[t];
      }
    }
    Lanes<T, kT>* to = y + group * pitch + 4 * quad;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      Lanes<T, kT> v;
#pragma unroll
      for (int t = 0; t < kT; ++t) v.at[t] = sum[r][t];
      to[r] = v;
    }
  }
}

// Four lanes to a row. add: to what the same lanes left in y. All threads of the block take part.
template <typename T, int kT>
__device__ __forceinline__ void multiply_sparse(const MonSparse& m, int n, const Lanes<T, kT>* x,
                                                Lanes<T, kT>* y, bool add, uint32_t* fault) {
  const T* values = static_cast<const T*>(m.values);
  const int me = static_cast<int>(threadIdx.x), part = me & 3;
  const int rows = static_cast<int>(blockDim.x) / 4;
  for (int first = 0; first < n; first += rows) {
    const int row = first + me / 4;
    T sum[kT] = {};
    for (int64_t block = 0; row < n && block < m.blocks; ++block) {
      const int64_t begin = m.row_ptr[block * n + row], end = m.row_ptr[block * n + row + 1];
      const int64_t base = block * m.block_depth;
      if (begin < 0 || begin > end || end > m.entries) {
        report(fault, kBadRowPtr);
        continue;
      }
      const int64_t depth = n - base < m.block_depth ? n - base : m.block_depth;
      for (int64_t e = begin + part; e < end; e += 4) {
        const int offset = m.offset[e];
        if (offset < 0 || offset >= depth) {
          report(fault, kBadOffset);
          continue;
        }
        const T w = values[e];
        const Lanes<T, kT> v = x[base + offset];
#pragma unroll
        for (int t = 0; t < kT; ++t) sum[t] += w * v.at[t];
      }
    }
#pragma unroll
    for (int t = 0; t < kT; ++t) {
      sum[t] += __shfl_xor_sync(kAllLanes, sum[t], 1);
      sum[t] += __shfl_xor_sync(kAllLanes, sum[t], 2);
    }
    if (row < n && part == 0) {
      Lanes<T, kT> v;
#pragma unroll
      for (int t = 0; t < kT; ++t) v.at[t] = add ? y[row].at[t] + sum[t] : sum[t];
      y[row] = v;
    }
  }
}

// W without its diagonal: x to y, of one group. A barrier must follow.
template <typename T, int kT>
__device__ __forceinline__ void multiply_factors(const MonSplittingArgs& a,
                                                 const MonTile<T, kT>& tile) {
  const int n = static_cast<int>(a.n);
  if (a.down.row_ptr != nullptr) {
    multiply_sparse(a.down, n, tile.x, tile.between, false, a.fault);
    __syncthreads();
    multiply_sparse(a.up, n, tile.between, tile.y, false, a.fault);
  }
  if (a.single.row_ptr != nullptr) {
    multiply_sparse(a.single, n, tile.x, tile.y, a.down.row_ptr != nullptr, a.fault);
  }
  if (a.down.row_ptr == nullptr && a.single.row_ptr == nullptr) {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
      tile.y[i] = {};
    }
  }
}

#endif

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
