// 2-d convolution with an unstructured mask on the weight, and its gradients, over packed patterns.
//
// Convolution is the product of masked_linear.h with pixels in place of batch entries. There are
// three ways to pack the activations: strips of whole rows (conv_strips.h), where a kernel tap is
// one constant offset; the same with the batch in the lanes (conv_lanes.h), for batches that fill a
// vector; and tiles of single points (conv_panel.h) for pointwise kernels and for maps too small
// for strips, with one panel row per channel and tap.
#pragma once

#include "kernels/cpu/pattern.h"

namespace fastprune {

enum class ConvWay : int { points, strips, lanes };

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
  ConvWay way;
  const uint16_t* panel_offset;  // from conv_way(); null for points
  const void* bias;              // pattern.rows values of the accumulator type, or null
  void* target;                  // batch x rows x place.height x place.width, contiguous
  // Only where the way is lanes: the tensor is stored (channel, y, x, batch) instead.
  bool source_batch_last, target_batch_last;
  const void* residual;  // added to the rounded results, stored as the target; or null
  bool relu;             // then applied
};

// values_grad[e] = sum over the grid's points of grad[row] * source at the entry's channel and tap.
struct MaskedConv2dWeightGradArgs {
  PatternView pattern;
  DType dtype;  // of grad and source
  ConvGrid grid;
  const void* grad;  // batch x rows x height x width, contiguous
  const void* source;
  ConvWay way;
  const uint16_t* panel_offset;
  void* values_grad;  // accumulator type, zero at the start
  bool grad_batch_last, source_batch_last;
};

// Independent items of a product, and bytes of scratch for one thread, aligned to 64.
struct LaneSizes {
  int64_t items, scratch;
};

FASTPRUNE_PER_ISA(
    // How a call packs its activations; offset (pattern.nnz values) then says where in the panel
    // each entry reads. `lanes` asks for the batch in the lanes whatever the sizes.
    ConvWay conv_way(const ConvGrid& grid, const PatternView& pattern, DType dtype, bool lanes,
                     uint16_t* offset);
    // Independent items of a product, and bytes of scratch, aligned to 64, for `rows` rows of one.
    int64_t masked_conv2d_items(const ConvGrid& grid, const PatternView& pattern, DType dtype,
                                ConvWay way);
    int64_t masked_conv2d_scratch(const ConvGrid& grid, const PatternView& pattern, DType dtype,
                                  ConvWay way, int64_t rows);
    // Rows [row_begin, row_end) of the target for the items [begin, end).
    void masked_conv2d(const MaskedConv2dArgs& args, int64_t begin, int64_t end, int64_t row_begin,
                       int64_t row_end, void* scratch);
    // The entries of the rows [row_begin, row_end), over all grid points in order.
    void masked_conv2d_weight_grad(const MaskedConv2dWeightGradArgs& args, int64_t row_begin,
                                   int64_t row_end, void* scratch);
    // Whether a call can have the batch in the lanes.
    bool lanes_fit(const ConvGrid& grid, const PatternView& pattern, DType dtype);
    // The same for the batch in the lanes; called by the functions above.
    bool lane_offsets(const ConvGrid& grid, const PatternView& pattern, DType dtype,
                      uint16_t* offset);
    LaneSizes lane_sizes(const ConvGrid& grid, const PatternView& pattern, DType dtype);
    void masked_conv2d_lanes(const MaskedConv2dArgs& args, int64_t begin, int64_t end,
                             int64_t row_begin, int64_t row_end, void* scratch);
    void masked_conv2d_lanes_weight_grad(const MaskedConv2dWeightGradArgs& args, int64_t row_begin,
                                         int64_t row_end, void* scratch);)

}  // namespace fastprune
