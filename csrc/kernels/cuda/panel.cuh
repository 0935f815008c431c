// The inner loop of the CUDA-core products: entries against a panel in shared memory, and what a
// block of threads shares in doing so. For panel.h.
//
// A warp owns up to R rows, a lane C columns of the tile (batch entries, or output pixels); the
// sums stay in registers over all panels. Per entry: half a 16-byte load of entries, that all lanes
// share; one addition of the lane's place; C / 4 wide loads from shared memory; C FMAs. Shared
// memory, 128 bytes per clock, is the bound.
#pragma once

#include "kernels/cuda/elements.h"
#include "kernels/cuda/panel.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

constexpr int kPanelThreads = 32 * kPanelWarps;

template <typename T>
struct PanelEntry;
template <>
struct alignas(8) PanelEntry<float> {
  float value;
  int32_t offset;  // bytes
};
template <>
struct alignas(16) PanelEntry<double> {
  double value;
  int64_t offset;
};

#if defined(__CUDACC__) || defined(FASTPRUNE_EMULATED)

template <typename T>
__device__ __forceinline__ void store_entry(PanelEntry<T>* to, T value, int32_t offset) {
  *to = PanelEntry<T>{value, offset};
}

// Two neighbouring entries, the first at an even place.
template <typename T>
struct EntryPair {
  T value[2];
  int32_t offset[2];
};
__device__ __forceinline__ EntryPair<float> load_pair(const PanelEntry<float>* at) {
  const uint4 q = __ldg(reinterpret_cast<const uint4*>(at));
  return {{__uint_as_float(q.x), __uint_as_float(q.z)},
          {static_cast<int32_t>(q.y), static_cast<int32_t>(q.w)}};
}
__device__ __forceinline__ EntryPair<double> load_pair(const PanelEntry<double>* at) {
  return {{at[0].value, at[1].value},
          {static_cast<int32_t>(at[0].offset), static_cast<int32_t>(at[1].offset)}};
}
__device__ __forceinline__ EntryPair<float> load_single(const PanelEntry<float>* at) {
  const uint2 q = __ldg(reinterpret_cast<const uint2*>(at));
  return {{__uint_as_float(q.x), 0}, {static_cast<int32_t>(q.y), 0}};
}
__device__ __forceinline__ EntryPair<double> load_single(const PanelEntry<double>* at) {
  return {{at[0].value, 0}, {static_cast<int32_t>(at[0].offset), 0}};
}

// An element of a tensor whose type is known at run time only: outside of the inner loops.
template <typename T>
__device__ __forceinline__ T load_element(DType dtype, const void* from, int64_t i) {
  if constexpr (sizeof(T) == 8) {
    return static_cast<const T*>(from)[i];
  } else {
    if (dtype == DType::f32) return static_cast<const float*>(from)[i];
    if (dtype == DType::bf16) return widen(static_cast<const BFloat16*>(from)[i]);
    return widen(static_cast<const Float16*>(from)[i]);
  }
}

// The rows of a block's warps, and where their entries of the part at hand lie. In shared memory:
// registers are what the kernels are short of. Two rows of each window to a warp, a long one with a
// short.
template <int R>
struct alignas(16) WarpRows {
  int32_t row[kPanelWarps][R];  // -1: none
  uint2 bound[kPanelWarps][R];
  volatile int marks[2];
  // Where the block stands: row window and batch entry or tile.
  int64_t first_window, first_column;

  // All threads; row[] may be read by the own warp from then on.
  __device__ void start(const int32_t* order, int64_t first, int64_t end_window, int rows,
                        int64_t column) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    if (lane < R) {
      const int64_t window = first + lane / 2;
      const int place = (lane / 2) % 2 == 0 ? warp : kPanelWarps - 1 - warp;
      const int at = lane % 2 == 0 ? place : kPanelWindow - 1 - place;
      const bool there = lane < rows && window < end_window;
      row[warp][lane] = there ? order[window * kPanelWindow + at] : -1;
    }
    if (threadIdx.x < 2) marks[threadIdx.x] = -1;
    if (threadIdx.x == 0) {
      first_window = first;
      first_column = column;
    }
    __syncthreads();
  }

  // The bounds of a part. Returns whether any row of the block has entries in it: panel and all of
  // the others are skipped. Past it, nobody reads the panel before. Two marks in turn: a warp can
  // be one part ahead of another that still reads.
  __device__ bool enter(int part, const uint2* bounds) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    __syncwarp();
    if (lane < R) {
      const int32_t r = row[warp][lane];
      const uint2 here = r < 0 ? make_uint2(0, 0) : bounds[r];
      bound[warp][lane] = here;
      if (here.y != 0) marks[part & 1] = part;
    }
    __syncthreads();
    return marks[part & 1] == part;
  }
};

// sum[c] += value * panel for `count` entries. Panel: load(offset, x), C elements of this lane.
template <int C, typename T, typename Panel>
__device__ __forceinline__ void multiply_entries(const PanelEntry<T>* entries, int count,
                                                 const Panel& panel, T (&sum)[C]) {
  const auto add = [&](T value, int32_t offset) {
    T x[C];
    panel.load(offset, x);
#pragma unroll
    for (int c = 0; c < C; ++c) sum[c] += value * x[c];
  };
#pragma unroll 1
  for (int left = count >> 2; left > 0; --left) {
    const EntryPair<T> a = load_pair(entries), b = load_pair(entries + 2);
    add(a.value[0], a.offset[0]);
    add(a.value[1], a.offset[1]);
    add(b.value[0], b.offset[0]);
    add(b.value[1], b.offset[1]);
    entries += 4;
  }
  if ((count & 2) != 0) {
    const EntryPair<T> a = load_pair(entries);
    add(a.value[0], a.offset[0]);
    add(a.value[1], a.offset[1]);
    entries += 2;
  }
  if ((count & 1) != 0) {
    const EntryPair<T> a = load_single(entries);
    add(a.value[0], a.offset[0]);
  }
}

// The entries of the warp's first `rows` rows in one part.
template <int R, int C, typename T, typename Panel>
__device__ __forceinline__ void multiply_rows(const PanelEntry<T>* entries,
                                              const WarpRows<R>& warp_rows, int rows,
                                              const Panel& panel, T (&sum)[R][C]) {
  const int warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (r >= rows) break;
    const uint2 bound = warp_rows.bound[warp][r];
    multiply_entries<C>(entries + int64_t{4} * bound.x, static_cast<int>(bound.y), panel, sum[r]);
  }
}

#endif

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
