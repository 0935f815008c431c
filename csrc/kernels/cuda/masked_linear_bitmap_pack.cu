// Weights into the tiles of masked_linear_bitmap.h.
#include "kernels/cuda/tiles.cuh"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// A warp per group.
__global__ void words_kernel(BitMatrix mask, int64_t strips, int64_t groups, bool tf32,
                             uint32_t* words, uint32_t* counts) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= strips * groups) return;
  const int64_t row_words = (mask.cols + 31) / 32;
  uint32_t word = 0;
  for (int e = 0; e < 32; ++e) {
    const TilePlace place = tile_place(lane, e % 8, tf32);
    const int64_t r = i / groups * kStripRows + place.row;
    const int64_t c = i % groups * kGroupCols + e / 8 * 16 + place.col;
    if (r < mask.rows && c < mask.cols) {
      word |= (mask.words[r * row_words + c / 32] >> (c % 32) & 1u) << e;
    }
  }
  words[i * 32 + lane] = word;
  const unsigned count = __reduce_add_sync(kAllLanes, static_cast<unsigned>(__popc(word)));
  if (lane == 0) counts[i] = count;
}

template <typename T>
__device__ __forceinline__ T kept_value(T x) {
  return x;
}
template <>
__device__ __forceinline__ float kept_value<float>(float x) {
  return __uint_as_float(to_tf32(x));
}

// A warp per group.
template <typename T>
__global__ void values_kernel(TilesView w, int64_t strips, int64_t groups, const T* weight,
                              int64_t row_stride, int64_t col_stride, T* values) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
       i < strips * groups; i += step) {
    const uint32_t word = w.words[i * 32 + lane];
    const GroupStarts starts = group_starts(word);
    T* to = values + w.start[i];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      int at = starts.at[q];
      for (int e = 0; e < 8; ++e) {
        if ((word >> (8 * q + e) & 1u) == 0) continue;
        const TilePlace place = tile_place(lane, e, sizeof(T) == 4);
        const int64_t r = i / groups * kStripRows + place.row;
        const int64_t c = i % groups * kGroupCols + 16 * q + place.col;
        to[at++] = kept_value(weight[r * row_stride + c * col_stride]);
      }
    }
  }
}

}  // namespace

cudaError_t tiles_words(const BitMatrix& mask, bool tf32, uint32_t* words, uint32_t* counts,
                        cudaStream_t stream) {
  const TilesView v{mask.rows, mask.cols, nullptr, nullptr};
  const int64_t n = v.strips() * v.groups();
  return launch(words_kernel, dim3(static_cast<unsigned>((n + kWarps - 1) / kWarps)),
                dim3(kThreads), 0, stream, mask, v.strips(), v.groups(), tf32, words, counts);
}

cudaError_t tiles_values(const TilesView& view, DType dtype, const void* weight, int64_t row_stride,
                         int64_t col_stride, void* values, const DeviceLimits& limits,
                         cudaStream_t stream) {
  const int64_t wanted = (view.strips() * view.groups() + kWarps - 1) / kWarps;
  const int64_t most = int64_t{16} * limits.multiprocessors;
  const dim3 grid(static_cast<unsigned>(wanted < most ? wanted : most));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return launch(values_kernel<T>, grid, dim3(kThreads), 0, stream, view, view.strips(),
                  view.groups(), static_cast<const T*>(weight), row_stride, col_stride,
                  static_cast<T*>(values));
  };
  return dtype == DType::f32 ? run(0.0f) : run(uint16_t{0});
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
