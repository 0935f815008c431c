// Weights into the groups of masked_linear_bitmap.h.
#include "kernels/cuda/masked_linear_bitmap.h"
#include "kernels/cuda/warp.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// The mask of a view: rows and columns are the view's.
struct Kept {
  const uint32_t* words;
  int64_t rows, cols, row_words;
  bool transposed;

  __device__ uint32_t operator()(int64_t r, int64_t c) const {
    if (r >= rows || c >= cols) return 0;
    const int64_t i = transposed ? c : r, j = transposed ? r : c;
    return words[i * row_words + j / 32] >> (j % 32) & 1u;
  }
};

// First element of a lane's word.
struct ElementPlace {
  int64_t row, col;
};
__device__ __forceinline__ ElementPlace element_place(int64_t band, int64_t group, int strip,
                                                      int lane, int bit, int word_elements) {
  const WordPlace place = word_place(lane, bit);
  return {band * kBandRows + strip * kStripRows + place.row,
          (group * kGroupWords + place.word) * word_elements};
}

// A warp per group.
__global__ void heads_kernel(Kept kept, int64_t bands, int64_t groups, int word_elements,
                             uint32_t* heads, uint32_t* pieces) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= bands * groups) return;
  int count = 0;
  for (int strip = 0; strip < 2; ++strip) {
    uint32_t head = 0;
    for (int bit = 0; bit < 32; ++bit) {
      const ElementPlace at =
          element_place(i / groups, i % groups, strip, lane, bit, word_elements);
      uint32_t any = kept(at.row, at.col);
      if (word_elements == 2) any |= kept(at.row, at.col + 1);
      head |= any << bit;
    }
    heads[i * kHeadWords + 2 * lane + strip] = head;
    count += __popc(head);
  }
  const unsigned all = __reduce_add_sync(kAllLanes, static_cast<unsigned>(count));
  if (lane == 0) pieces[i] = (all + 3) / 4;
}

__device__ __forceinline__ uint32_t stored_bits(float x) { return to_tf32(x); }
__device__ __forceinline__ uint32_t stored_bits(uint16_t x) { return x; }

// A warp per group.
template <typename T>
__global__ void values_kernel(TilesView w, int64_t bands, int64_t groups, Kept kept,
                              const T* weight, int64_t row_stride, int64_t col_stride,
                              uint32_t* values) {
  constexpr int kElements = 4 / static_cast<int>(sizeof(T));
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; i < bands * groups;
       i += step) {
    const uint32_t heads[2] = {w.heads[i * kHeadWords + 2 * lane],
                               w.heads[i * kHeadWords + 2 * lane + 1]};
    const auto count = static_cast<uint32_t>(__popc(heads[0]) + __popc(heads[1]));
    uint32_t* to = values + w.start[i] * (kPieceBytes / 4);
    uint32_t at = sum_before_lane(count);
    const uint32_t all = __shfl_sync(kAllLanes, at + count, 31);
    // The last piece, whole: it is copied so.
    if (all + static_cast<uint32_t>(lane) < (all + 3) / 4 * 4) to[all + lane] = 0;
    for (int strip = 0; strip < 2; ++strip) {
      for (int bit = 0; bit < 32; ++bit) {
        if ((heads[strip] >> bit & 1u) == 0) continue;
        const ElementPlace place =
            element_place(i / groups, i % groups, strip, lane, bit, kElements);
        uint32_t word = 0;
        for (int e = 0; e < kElements; ++e) {
          if (kept(place.row, place.col + e) == 0) continue;
          const T value = weight[place.row * row_stride + (place.col + e) * col_stride];
          word |= stored_bits(value) << (16 * e);
        }
        to[at++] = word;
      }
    }
  }
}

Kept kept_of(const TilesView& view, const BitMatrix& mask, bool transposed) {
  return Kept{mask.words, view.rows, view.cols, mask.row_words(), transposed};
}

}  // namespace

int64_t tiles_value_bytes(const TilesView& view, int64_t nnz) {
  const int64_t groups = view.bands() * view.groups();
  const int64_t dense = groups * kBandRows * kGroupWords, sparse = nnz + 3 * groups;
  return 4 * (sparse < dense ? sparse : dense);
}

cudaError_t tiles_heads(const TilesView& view, const BitMatrix& mask, bool transposed,
                        uint32_t* heads, uint32_t* pieces, cudaStream_t stream) {
  const int64_t n = view.bands() * view.groups();
  return launch(heads_kernel, dim3(static_cast<unsigned>((n + kWarps - 1) / kWarps)),
                dim3(kThreads), 0, stream, kept_of(view, mask, transposed), view.bands(),
                view.groups(), static_cast<int>(view.word_elements), heads, pieces);
}

cudaError_t tiles_values(const TilesView& view, DType dtype, const BitMatrix& mask, bool transposed,
                         const void* weight, void* values, const DeviceLimits& limits,
                         cudaStream_t stream) {
  const int64_t wanted = (view.bands() * view.groups() + kWarps - 1) / kWarps;
  const int64_t most = int64_t{16} * limits.multiprocessors;
  const dim3 grid(static_cast<unsigned>(wanted < most ? wanted : most));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return launch(values_kernel<T>, grid, dim3(kThreads), 0, stream, view, view.bands(),
                  view.groups(), kept_of(view, mask, transposed), static_cast<const T*>(weight),
                  transposed ? int64_t{1} : mask.cols, transposed ? mask.cols : int64_t{1},
                  static_cast<uint32_t*>(values));
  };
  return dtype == DType::f32 ? run(0.0f) : run(uint16_t{0});
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
