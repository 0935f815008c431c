// Equilibria of fully connected monotone operator layers on the GPU, and their adjoint equations.
//
// A block owns a few samples and iterates by itself. The rule over the whole batch needs all of
// them: a launch makes several steps from a checkpoint, logs the norms of each, and the last block
// to finish adds them up, in order. If the rule was met on the way, the launches that follow do
// nothing, and the last one goes back to the checkpoint and makes exactly as many steps. Nothing
// waits for the host.
#pragma once

#include "kernels/cuda/mon_math.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// A packed pattern and its values; no columns where there is none.
struct MonSparse {
  const int64_t* row_ptr;
  const int16_t* offset;
  const void* values;
  int64_t entries, block_depth, blocks;
};

struct MonSplittingArgs {
  DType dtype;  // f32 or f64
  MonRule rule;
  int64_t n, batch, max_iter;
  // (n, n), row by row, or null: then W = diagonal I + up down + single. resolvent: likewise.
  const void *matrix, *resolvent;
  MonSparse down, up, single;
  double diagonal;
  const void *bias, *slope;  // (batch, n); slope in the adjoint equation only
  void *out, *z;             // (batch, n)
  int64_t* iterations;       // of the batch, or of each sample
  double* residual;
  uint32_t* fault;
};

// Bytes of scratch, aligned to 16.
int64_t mon_splitting_scratch(const MonSplittingArgs& args, const DeviceLimits& limits);
cudaError_t mon_splitting(const MonSplittingArgs& args, void* scratch, const DeviceLimits& limits,
                          cudaStream_t stream);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
