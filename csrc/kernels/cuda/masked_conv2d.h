// 2-d convolution with an unstructured mask on CUDA cores, over a prepared pattern (panel.h).
//
// The product of masked_linear.h with pixels in place of batch entries: a panel is the input tile
// of a few channels with its halo, padding included, and a kernel position a constant distance in
// it.
#pragma once

#include "kernels/cuda/panel.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// Tiles of `cols` x `rows` grid points; the rows of all images follow each other, so that a tile
// may hold the end of one image and the start of the next, or several small ones.
struct ConvTile {
  int columns;  // 32 for each pixel of a lane; cols * rows at most
  int cols, rows;
  int halo_y;  // panel rows that an image needs beyond its grid rows
  PanelLayout layout;
};
// Of grids of at most height x width, and at least least_height rows.
ConvTile conv_tile(const PatternView& pattern, TapAxis y, TapAxis x, DType dtype, int64_t batch,
                   int64_t height, int64_t width, int64_t least_height, const DeviceLimits& limits);

// One class of positions along an axis: which, the pixel that number 0 reads at grid point 0, the
// grid's points, and where they stand in the target: first_target + point * target_step.
struct ConvAxisPart {
  int64_t of_class, first_source, points, first_target, target_step;
};

struct PanelConvArgs {
  int64_t rows, groups, depth, block_depth, blocks;  // of the pattern
  DType dtype;                                       // of source, residual and target
  int64_t batch, source_height, source_width, target_height, target_width;
  const void* source;  // batch x (groups * depth) x source height x source width, contiguous
  ConvAxisPart y, x;
  PanelWeightView weight;
  ConvTile tile;
  const void* bias;      // rows values of the accumulator type, or null
  const void* residual;  // like the target, added to the rounded results; or null
  bool relu;             // then applied
  void* target;          // batch x rows x target height x target width, contiguous
};
cudaError_t masked_conv2d_panel(const PanelConvArgs& args, const DeviceLimits& limits,
                                cudaStream_t stream);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
