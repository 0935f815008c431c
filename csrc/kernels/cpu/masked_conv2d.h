// 2-d convolution with an unstructured mask on the weight, and its gradients, over packed patterns.
//
// Convolution is the product of masked_linear.h with pixels in place of batch entries. There are
// two ways to pack the activations: strips of whole rows (conv_strips.h), where a kernel tap is one
// constant offset; and tiles of single points (conv_panel.h) for pointwise kernels and for maps too
// small for strips, with one panel row per channel and tap.
#pragma once

#include "kernels/cpu/pattern.h"

namespace fastprune {

// Where each tap reads. A grid of `height` x `width` points per image is walked; tap t of point
// (y, x) reads source pixel (y * step_y + tap_y[t], x * step_x + tap_x[t]), zero when outside.
//   Forward: the grid is the output, the step the stride, tap = k * dilation - padding.
//   Input gradient: one grid per residue of the input modulo the stride, step 1, and only the taps
//   that meet that residue, at (residue + padding - k * dilation) / stride in grad.
struct ConvGrid {
  int64_t batch;
  int64_t height, width;
  int64_t source_height, source_width;
  int64_t step_y, step_x;
  int64_t kernel_height, kernel_width;
  const int64_t* tap_y;     // one per tap (ky * kernel_width + kx); depends on ky alone
  const int64_t* tap_x;     // likewise, on kx alone
  const uint8_t* live_tap;  // 0: no entry of the pattern has this tap; it is not packed

  int64_t points() const { return batch * height * width; }
};

// Where grid point (y, x) stands in an image: (y * step_y + first_y, x * step_x + first_x).
struct ConvTarget {
  int64_t height, width;
  int64_t first_y, first_x;
  int64_t step_y, step_x;
};

struct MaskedConv2dArgs {
  PatternView pattern;
  DType dtype;  // of source and target
  ConvGrid grid;
  ConvTarget place;
  const void* source;  // batch x (groups * depth) x source_height x source_width, contiguous
  const void* values;  // accumulator type, in the pattern's order
  const uint16_t* strip_offset;  // from strip_offsets(), or null to go by points
  const void* bias;              // pattern.rows values of the accumulator type, or null
  void* target;                  // batch x rows x place.height x place.width, contiguous
};

// values_grad[e] = sum over the grid's points of grad[row] * source at the entry's channel and tap.
struct MaskedConv2dWeightGradArgs {
  PatternView pattern;
  DType dtype;  // of grad and source
  ConvGrid grid;
  const void* grad;  // batch x rows x height x width, contiguous
  const void* source;
  const uint16_t* strip_offset;
  void* values_grad;  // accumulator type, zero at the start
};

FASTPRUNE_PER_ISA(
    // True when the call goes by strips; offset (pattern.nnz values) then says where in the panel
    // each entry reads.
    bool strip_offsets(const ConvGrid& grid, const PatternView& pattern, DType dtype,
                       uint16_t* offset);
    // Independent items of a product, and bytes of scratch, aligned to 64, for `rows` rows of one.
    int64_t masked_conv2d_items(const ConvGrid& grid, const PatternView& pattern, DType dtype,
                                bool strips);
    int64_t masked_conv2d_scratch(const ConvGrid& grid, const PatternView& pattern, DType dtype,
                                  bool strips, int64_t rows);
    // Rows [row_begin, row_end) of the target for the items [begin, end).
    void masked_conv2d(const MaskedConv2dArgs& args, int64_t begin, int64_t end, int64_t row_begin,
                       int64_t row_end, void* scratch);
    // The entries of the rows [row_begin, row_end), over all grid points in order.
    void masked_conv2d_weight_grad(const MaskedConv2dWeightGradArgs& args, int64_t row_begin,
                                   int64_t row_end, void* scratch);)

}  // namespace fastprune
