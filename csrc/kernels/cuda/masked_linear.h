// y = x (W * M)^T + b on CUDA cores, over a prepared pattern (panel.h). The input gradient is the
// same product with the transposed pattern and x = grad of y.
#pragma once

#include "kernels/cuda/panel.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// How a product of `batch` entries is tiled; the weight is prepared for it.
struct LinearTile {
  int columns;  // batch entries of a block: 32 for each column of a lane
  PanelLayout layout;
};
LinearTile linear_tile(const PatternView& pattern, DType dtype, int64_t batch,
                       const DeviceLimits& limits);

struct PanelLinearArgs {
  int64_t rows, depth, block_depth, blocks;  // of the pattern
  DType dtype;                               // of x, residual and y
  int64_t batch;
  const void* x;  // batch x depth, contiguous
  PanelWeightView weight;
  LinearTile tile;
  const void* bias;      // rows values of the accumulator type, or null
  const void* residual;  // batch x rows, contiguous, added to the rounded result; or null
  bool relu;             // then applied
  void* y;               // batch x rows, contiguous
};
cudaError_t masked_linear_panel(const PanelLinearArgs& args, const DeviceLimits& limits,
                                cudaStream_t stream);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
