// A linear product for batches up to about a hundred: loaded as sparse, computed as dense.
//
// The weight is cut into strips of 16 rows, a strip into groups of four 16 x 16 tiles, 64 columns.
// A tile's bits and values are in the order in which tensor cores want it (warp.h): lane i of a
// warp owns 8 of its elements, byte q of its word of a group says which of them tile q keeps, and
// the kept values of a strip follow each other by (tile, lane, element). A warp finds a lane's
// values by summing the bytes' counts, once for four tiles, and fills up with zeros in registers.
//
// Zeros are not what absent weights are where an activation is infinite or NaN: rows of x that hold
// one are found on the way, and computed from present weights alone (ExactRows) at the end.
#pragma once

#include "kernels/cuda/bits.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

constexpr int64_t kStripRows = 16, kGroupCols = 64;
constexpr int64_t kTilesMaxBatch = 128;
constexpr int64_t kTilesTail = 16;  // bytes behind the values that copies may read

struct TilesView {
  int64_t rows, cols;
  const uint32_t* words;  // strips() * groups() * 32: of group g of strip s from [(s * groups() +
                          // g) * 32]
  const int64_t* start;   // strips() * groups() + 1: first values of the groups
  int64_t strips() const { return (rows + kStripRows - 1) / kStripRows; }
  int64_t groups() const { return (cols + kGroupCols - 1) / kGroupCols; }
};

// Row and column in a tile of a lane's element e: for 16-bit elements (one 16 x 16 fragment), and
// for float32 as tf32 (two of 16 x 8).
struct TilePlace {
  int row, col;
};
#if defined(__CUDACC__)
__host__ __device__
#endif
    inline TilePlace tile_place(int lane, int e, bool tf32) {
  const int g = lane / 4, t = lane % 4;
  if (tf32) return {g + 8 * (e % 2), 8 * (e / 4) + t + 4 * (e / 2 % 2)};
  return {g + 8 * (e / 2 % 2), 2 * t + e % 2 + 8 * (e / 4)};
}

// words, and the kept elements of each group. `tf32` fits the form to float32 weights.
cudaError_t tiles_words(const BitMatrix& mask, bool tf32, uint32_t* words, uint32_t* counts,
                        cudaStream_t stream);
// values <- the weight's: element (r, c) is weight[r * row_stride + c * col_stride]; float32 is
// rounded to tf32. `values` is aligned to 16 bytes and kTilesTail longer than what it holds.
cudaError_t tiles_values(const TilesView& view, DType dtype, const void* weight, int64_t row_stride,
                         int64_t col_stride, void* values, const DeviceLimits& limits,
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
