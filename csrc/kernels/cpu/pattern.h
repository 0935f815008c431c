// Packed sparsity patterns: what the sparse products read instead of a mask.
//
// A weight is seen as `rows` x (`depth` * `taps`): a linear layer has taps = 1, a convolution
// taps = KH * KW and depth = input channels of a group. The depth is cut into blocks, small enough
// that one block of activations stays in the L1 cache; entries are ordered by (block, row, offset).
// An entry is 16 bits: its position inside the block, channel_in_block * taps + tap.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/scalar_types.h"

namespace fastprune {

struct PatternView {
  int64_t rows;         // of all groups together
  int64_t groups;       // rows / groups consecutive rows read the same channels
  int64_t depth;        // channels that one row reads
  int64_t taps;         // kernel positions per channel
  int64_t block_depth;  // channels per block
  int64_t nnz;          // number of entries
  const int64_t*
      row_ptr;            // blocks() * rows + 1 bounds: entries of place i of b from [b * rows + i]
  const int16_t* offset;  // nnz positions inside their block
  // A plan (ops/plan.h) sorts the rows of each block by length; place i of block b then holds row
  // row_at[b * rows + i], and row r stands at place place_of[b * rows + r]. Null: i is row i.
  const int32_t* row_at = nullptr;
  const int32_t* place_of = nullptr;

  FASTPRUNE_HOST_DEVICE int64_t blocks() const {
    return depth == 0 ? 0 : (depth + block_depth - 1) / block_depth;
  }
  FASTPRUNE_HOST_DEVICE int64_t cols() const { return depth * taps; }
  FASTPRUNE_HOST_DEVICE int64_t block_cols() const { return block_depth * taps; }
  FASTPRUNE_HOST_DEVICE int64_t row_of(int64_t b, int64_t place) const {
    return row_at == nullptr ? place : row_at[b * rows + place];
  }
  FASTPRUNE_HOST_DEVICE int64_t place(int64_t b, int64_t row) const {
    return place_of == nullptr ? row : place_of[b * rows + row];
  }
  // Channels of block b; the last block may be short.
  FASTPRUNE_HOST_DEVICE int64_t depth_of(int64_t b) const {
    const int64_t left = depth - b * block_depth;
    return left < block_depth ? left : block_depth;
  }
};

// Sorted rows stay inside windows of this many rows of one group: [k * kRowWindow, (k + 1) *
// kRowWindow) counted from the group's first row. Work is cut over threads at window bounds.
constexpr int64_t kRowWindow = 64;

// Exact n / divisor for 0 <= n, divisor < 2^15 by one multiplication: the error of the rounded-up
// reciprocal, below n / 2^32, never reaches the 1 / divisor that would carry.
class SmallDivider {
 public:
  explicit SmallDivider(int64_t divisor)
      : reciprocal_(((uint64_t{1} << 32) + static_cast<uint64_t>(divisor) - 1) /
                    static_cast<uint64_t>(divisor)) {}
  int64_t operator()(int64_t n) const {
    return static_cast<int64_t>((static_cast<uint64_t>(n) * reciprocal_) >> 32);
  }

 private:
  uint64_t reciprocal_;
};

// The same for a pattern under construction.
struct PatternBuffers {
  int64_t* row_ptr;
  int16_t* offset;
};

// The same for its sorted copy.
struct SortedBuffers {
  int64_t* row_ptr;
  int16_t* offset;
  int32_t *row_at, *place_of;
};

// The kernels below also take the transposed pattern of the weight, read by the input gradient: its
// rows are the input channels (of all groups), its depth the output channels of a group.
FASTPRUNE_PER_ISA(
    // Writes the entry counts of (b, r) to row_ptr[b * rows + r + 1], for both patterns, then sums
    // them up. mask: rows x cols bytes, 0 or 1. The views need no row_ptr, offset or nnz yet.
    void count_entries(const PatternView& forward, const PatternView& transposed,
                       const uint8_t* mask, int64_t* row_ptr, int64_t* transposed_row_ptr);
    // Writes the entries. cursor: scratch for blocks * rows values of the larger pattern.
    void write_entries(const PatternView& forward, const PatternView& transposed,
                       const uint8_t* mask, PatternBuffers out, PatternBuffers transposed_out,
                       int64_t* cursor);
    // True when every bound and offset is in range: what a product needs to be memory safe.
    bool pattern_is_valid(const PatternView& pattern);
    // Copies a pattern, its rows in each block and window ordered by falling length; equal lengths
    // keep their order.
    void sort_rows(const PatternView& pattern, SortedBuffers out);
    // values[i] = weight at entry i, for the rows [begin, end), cut at windows if sorted.
    void gather_values(const PatternView& forward, DType dtype, const void* weight, void* values,
                       int64_t begin, int64_t end);
    // The same in the order of the transposed pattern, for its (group, block) items [begin, end).
    // cursor: scratch for 2 * transposed.rows values. If `checked`: false when the two patterns do
    // not describe the same mask, and nothing outside `values` was touched; the others are known
    // to.
    bool gather_transposed_values(const PatternView& forward, const PatternView& transposed,
                                  DType dtype, const void* weight, void* values, int64_t* cursor,
                                  bool checked, int64_t begin, int64_t end);
    // weight_grad (dense, rows x cols) = values at the entries, 0 elsewhere; rows [begin, end), cut
    // at windows if sorted.
    void scatter_values(const PatternView& forward, DType dtype, const void* values,
                        void* weight_grad, int64_t begin, int64_t end);
    // out[i] = values[i] where mask[i], else an exact 0, for i in [begin, end).
    void apply_mask(DType dtype, const void* values, const uint8_t* mask, void* out, int64_t begin,
                    int64_t end);
    // Keeps the entries whose tap is marked, for strided input gradients. Returns their number.
    int64_t filter_taps(const PatternView& pattern, DType dtype, const void* values,
                        const uint8_t* keep_tap, PatternBuffers out, void* out_values);)

}  // namespace fastprune
