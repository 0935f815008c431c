// The product in bfloat16 for processors that multiply bfloat16 in pairs (vdpbf16ps).
//
// As in panel.h, a row's sums over a tile of batch entries take one column of a panel in L1 per
// weight; here two weights at a time, whose columns are interleaved on the fly, so that panel,
// offsets and values are half as wide and two products cost one instruction. Rows are cut into
// blocks of columns and filled up to groups of eight entries with zeros that read a column of
// zeros: no activation is read but by a weight that exists.
#pragma once

#include "kernels/cpu/masked_linear.h"

namespace fastprune {

constexpr int64_t kPairsGroup = 8;      // entries of a group
constexpr int64_t kPairsStride = 16;    // elements of a group
constexpr int64_t kPairsMaxShift = 12;  // largest width_shift: offsets are 16 bits
constexpr int kPairsTile = 32;          // batch entries

struct PairsView {
  int64_t rows, cols;
  int width_shift;  // blocks of 1 << width_shift columns
  const int64_t*
      group_ptr;          // blocks() * rows + 1: groups of place i of block b from [b * rows + i]
  const int32_t* row_at;  // the row at each place; rows stay inside windows of kRowWindow
  // Of each group eight offsets (8 * column in the block; 8 * width means no weight), then the
  // eight values in bfloat16.
  const uint16_t* entries;
  int64_t width() const { return int64_t{1} << width_shift; }
  int64_t blocks() const { return (cols + width() - 1) >> width_shift; }
};

// The same under construction. cursor: scratch for blocks * rows values.
struct PairsIndex {
  int64_t* group_ptr;
  int32_t* row_at;
  int64_t* cursor;
};

// Where the element of row r and column c is in a dense weight.
struct WeightStrides {
  int64_t row, col;
};

#if defined(__x86_64__)
namespace avx512_bf16 {
// Orders the rows and counts their groups; returns the number of groups. `transposed`: rows and
// columns of the pattern are exchanged (input gradient). group_ptr[0] and behind are filled in.
int64_t pairs_bounds(const PatternView& forward, bool transposed, const PairsView& shape,
                     PairsIndex index);
// Fills in the entries, with values of zero; index as pairs_bounds left it.
void pairs_entries(const PatternView& forward, bool transposed, const PairsView& shape,
                   PairsIndex index, uint16_t* entries);
// Copies the entries of the places [begin, end) with the weight's values; returns the smallest
// absolute value that is not zero, as bits (all ones where there is none).
uint32_t pairs_values(const PairsView& pairs, const void* weight, WeightStrides strides,
                      uint16_t* entries, int64_t begin, int64_t end);
// Bytes of scratch, aligned to 64, for `rows` rows of the product.
int64_t pairs_scratch(const PairsView& pairs, int64_t rows);
// Rows [row_begin, row_end) of y, cut at windows, for the batch entries from tile * kPairsTile on.
// The args' pattern and values are not looked at.
void pairs_product(const PairsView& pairs, const MaskedLinearArgs& args, int64_t tile,
                   int64_t row_begin, int64_t row_end, void* scratch);
}  // namespace avx512_bf16
#endif

}  // namespace fastprune
