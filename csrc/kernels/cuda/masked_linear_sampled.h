// The weight gradient of a linear layer at its mask alone, in float32, on CUDA cores:
// out[i][j] = sum over n of grad[n][i] x[n][j] where (i, j) is kept, else 0.
//
// The pattern is cut into units of eight entries of one row inside one panel of columns. Eight
// lanes own a unit, each an eighth of a slice of the batch: for every entry they read its column of
// x from shared memory and multiply it with the row's grad, which stays in registers. Seven
// shuffles per unit then leave the sum of entry i in lane i, where it stays over all slices.
//
// Every sum is made in the same order whatever the GPU and the cut: per slice of 64, eight terms in
// each lane, lanes in pairs; slices in turn.
#pragma once

#include "kernels/cuda/bits.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

constexpr int kSampledSlice = 64;  // batch entries
constexpr int kSampledUnit = 8;    // entries

// How a pattern is cut, by its size, its number of entries and the GPU alone.
struct SampledShape {
  int64_t rows, cols;
  int panel_cols;  // a multiple of 32
  int64_t panels;
  int64_t row_chunks;   // of 32 rows
  int units_per_group;  // of eight lanes
  int64_t blocks;       // of threads: the most that units can need
  int64_t units;        // room for
};
SampledShape sampled_shape(int64_t rows, int64_t cols, int64_t nnz, const DeviceLimits& limits);

// The units, by panel and row. The first unit of a panel is the first of a block of threads.
struct SampledIndex {
  int32_t* row;       // units values
  uint4* columns;     // units values: eight columns of the panel, 16 bits each; the last repeats
  int64_t* first;     // panels + 1 values
  int64_t* end;       // panels values
  int64_t* of_chunk;  // panels * row_chunks values; scratch of build_sampled_index
};
cudaError_t build_sampled_index(const BitMatrix& bits, const SampledShape& shape,
                                const SampledIndex& index, const DeviceLimits& limits,
                                cudaStream_t stream);

// to[slice][column][n] <- from, zero past the batch: slices of kSampledSlice batch entries.
struct SlicesArgs {
  const float* from;  // batch x columns
  int64_t batch_stride, column_stride, batch, columns;
  float* to;
};
inline int64_t sampled_slices(int64_t batch) { return (batch + kSampledSlice - 1) / kSampledSlice; }
cudaError_t write_slices(const SlicesArgs& args, cudaStream_t stream);

struct SampledArgs {
  SampledShape shape;
  SampledIndex index;
  int64_t slices;
  const float *x, *grad;  // as write_slices leaves them, 16-byte aligned
  bool more;              // whether `out` holds the sums of earlier slices
  float* out;             // rows x cols; written at the mask only
};
cudaError_t sampled_weight_grad(const SampledArgs& args, cudaStream_t stream);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
