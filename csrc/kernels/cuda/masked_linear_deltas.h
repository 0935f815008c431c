// A linear product for few activation rows: values and the gaps between their columns,
// streamed once at the speed of memory.
//
// A row is cut into segments of kSegmentCols columns, a segment into units of 8 entries. An entry
// is a code and a value: code d >= 1: the next kept column is d further; code 0: 255 further, and
// nothing there (what fills the last unit up, too). Before a segment's first column stands -1.
#pragma once

#include "kernels/cuda/bits.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

constexpr int64_t kSegmentCols = 4096;
constexpr int64_t kUnit = 8;
constexpr int64_t kDeltasMaxBatch = 32;  // one pass over the weight serves 16, or 8 of float32

struct DeltasView {
  int64_t rows, cols;
  const uint8_t* codes;    // units * kUnit, aligned to 16 bytes
  const int64_t* segment;  // rows * segments() + 1 bounds in units: segment s of row r from
                           // [r * segments() + s]
  const int32_t* bound;    // groups + 1: the rows of each block, of about the same work
  int64_t groups;
  int64_t segments() const { return (cols + kSegmentCols - 1) / kSegmentCols; }
  // More than any group has rows.
  int64_t most_rows() const { return 2 * ((rows + groups - 1) / groups) + 2; }
};

// Units that suffice for nnz entries: a segment wastes at most one in filling up and two in skips.
inline int64_t deltas_units(int64_t rows, int64_t cols, int64_t nnz) {
  return nnz / kUnit + rows * ((cols + kSegmentCols - 1) / kSegmentCols) * 3;
}
// Blocks of a product; the cuts change no result.
int64_t deltas_groups(int64_t rows, const DeviceLimits& limits);

// counts[r * segments + s] <- units of a segment; its running sums are the bounds.
cudaError_t deltas_count(const BitMatrix& mask, uint32_t* counts, cudaStream_t stream);
// Writes codes and bound; segment is there.
cudaError_t deltas_codes(const BitMatrix& mask, const DeltasView& view, uint8_t* codes,
                         int32_t* bound, cudaStream_t stream);
// values <- the weight's, in the order of the codes: element (r, c) is weight[r * row_stride +
// c * col_stride]. `values` is aligned to 16 bytes.
cudaError_t deltas_values(const DeltasView& view, DType dtype, const void* weight,
                          int64_t row_stride, int64_t col_stride, void* values,
                          const DeviceLimits& limits, cudaStream_t stream);

struct DeltasArgs {
  DeltasView weight;
  DType dtype;  // not f64
  const void* values;
  int64_t batch;
  const void* x;  // batch x cols
  Finish finish;
  void* y;  // batch x rows
};
cudaError_t deltas_product(const DeltasArgs& args, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
