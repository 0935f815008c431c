// A linear product for batches up to about a hundred: loaded as sparse, computed as dense.
//
// What is kept or left out is a word of 4 bytes of a row: two neighbouring elements of 16 bits (an
// absent one beside a present one is stored as 0), or one float32. A band is 32 rows, two strips of
// 16; a group is 64 words of each of them, 128 or 64 columns. A warp multiplies a group in eight
// steps: a step is one matrix fragment of either strip (warp.h), four words to a lane. So a lane
// owns 32 words of each strip in a group, and bit 4 * step + register of its head for that strip
// says which are kept. The kept words of a group follow each other by (lane, strip, bit): a lane
// finds its own with one running sum over the lanes, then reads on.
//
// Zeros are not what absent weights are where an activation is infinite or NaN: rows of x that hold
// one are found on the way, and computed from present weights alone (ExactRows) at the end.
#pragma once

#include "kernels/cuda/bits.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

constexpr int64_t kStripRows = 16, kBandRows = 32;
constexpr int64_t kGroupWords = 64;  // of a row
constexpr int64_t kHeadWords = 64;   // of a group
constexpr int64_t kTilesMaxBatch = 128;
constexpr int64_t kPieceBytes = 16;  // groups of values begin at whole pieces

struct TilesView {
  int64_t rows, cols, word_elements;  // 2 of 16 bits, or 1 of float32
  const uint32_t* heads;  // bands() * groups() * kHeadWords: for group g of band b, bits of lane i
                          // for strip s at [(b * groups() + g) * kHeadWords + 2 * i + s]
  const int64_t* start;   // bands() * groups() + 1: first pieces of the groups' values
  int64_t bands() const { return (rows + kBandRows - 1) / kBandRows; }
  int64_t group_cols() const { return kGroupWords * word_elements; }
  int64_t groups() const { return (cols + group_cols() - 1) / group_cols(); }
};

// Where a lane's word `bit` of a strip is: the row, and the word of that row's 64.
struct WordPlace {
  int row, word;
};
#if defined(__CUDACC__)
__host__ __device__
#endif
    inline WordPlace word_place(int lane, int bit) {
  return {lane / 4 + 8 * (bit % 2), 8 * (bit / 4) + 4 * (bit / 2 % 2) + lane % 4};
}

// heads, and the pieces that each group's values take. transposed: the mask's columns are the
// view's rows.
cudaError_t tiles_heads(const TilesView& view, const BitMatrix& mask, bool transposed,
                        uint32_t* heads, uint32_t* pieces, cudaStream_t stream);
// The most bytes that values can take.
int64_t tiles_value_bytes(const TilesView& view, int64_t nnz);
// values <- the weight's, which is of the mask's size, where the mask keeps it; float32 is rounded
// to tf32. `values` is aligned to 16 bytes.
cudaError_t tiles_values(const TilesView& view, DType dtype, const BitMatrix& mask, bool transposed,
                         const void* weight, void* values, const DeviceLimits& limits,
                         cudaStream_t stream);

struct TilesArgs {
  TilesView weight;
  DType dtype;  // f32: computed as tf32; not f64
  const void* values;
  ExactRows exact;  // also holds batch, x and the dense weight
  Finish finish;
  void* y;          // batch x rows
  float* partial;   // tiles_cut().partials values
  uint32_t* flags;  // tiles_cut().flags values
};

// How a product is cut: by its sizes alone, so that sums do not depend on the GPU.
struct TilesCut {
  int columns;  // blocks of 8 activation rows that a warp holds: 1, 2, 4 or 8
  int64_t row_blocks, splits, batch_blocks;
  int64_t partials, flags;
};
TilesCut tiles_cut(const TilesView& view, int64_t batch);
// Whether a block fits the GPU.
bool tiles_fit(DType dtype, int64_t batch, const DeviceLimits& limits);

cudaError_t tiles_product(const TilesArgs& args, cudaStream_t stream);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
