// What the launches of one solve tell one another, for mon_splitting.cu and its parts.
#pragma once

#include "kernels/cuda/mon_splitting.h"
#include "kernels/cuda/warp.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

constexpr int kMostSteps = 64;  // of a launch

enum MonMode : int {
  kChunk,    // some steps from a checkpoint, for the rule over the batch
  kSamples,  // all steps, each sample until it meets the rule, and the last application
  kFinish,   // the steps that were found to be needed, and the last application
};

// What launches tell one another.
struct MonControl {
  unsigned ticket;
  int done;
  int steps;  // from the checkpoint
  int checkpoint;
};

struct MonRun {
  MonSplittingArgs a;
  const void *matrix, *resolvent;  // packed; a resident matrix is read as it came
  void* states;                    // [checkpoint][z, u][sample][n]
  double* log;                     // [step][block][2]
  MonControl* control;
  void* spill;  // tiles that do not fit shared memory
  int64_t spill_bytes;
  MonMode mode;
  int checkpoint;  // -1: the start, zeros
  int steps;
  int64_t made;  // before
  bool last;
};

// What a launch for every step keeps, row by row of mon_pitch(batch) samples.
struct MonGrid {
  const void *bias, *slope;
  void *z, *u, *x[2];
};

// A matrix that stays in registers. steps: that the launch logs.
bool mon_is_resident(const MonSplittingArgs& args);
int64_t mon_resident_shared(DType dtype, int64_t n, int steps);
cudaError_t mon_resident(const MonRun& run, int64_t blocks, cudaStream_t stream);
// A few samples to a block; the matrices are packed, or sparse.
cudaError_t mon_stream(const MonRun& run, int samples, int64_t blocks, int64_t shared,
                       cudaStream_t stream);
// All launches of a solve, but the last application of sparse factors.
bool mon_is_grid(const MonSplittingArgs& args, const DeviceLimits& limits);
int64_t mon_grid_blocks(const MonSplittingArgs& args);
cudaError_t mon_grid(const MonRun& run, const MonGrid& grid, const DeviceLimits& limits,
                     cudaStream_t stream);

#if defined(FASTPRUNE_EMULATED) || defined(__CUDACC__)

template <typename T>
__device__ __forceinline__ T* state(const MonRun& run, int checkpoint, bool u, int64_t sample) {
  const int64_t plane = 2 * checkpoint + (u ? 1 : 0);
  return static_cast<T*>(run.states) + (plane * run.a.batch + sample) * run.a.n;
}

// What a block has to do: false where nothing.
__device__ __forceinline__ bool begin(const MonRun& run, int* steps, int* checkpoint) {
  *steps = run.steps;
  *checkpoint = run.checkpoint;
  if (run.mode == kSamples) return true;
  const volatile MonControl* control = run.control;
  if (run.mode == kChunk) return control->done == 0;
  *steps = control->steps;
  *checkpoint = control->checkpoint;
  return true;
}

// The last block of a chunk to come here, when the logs of all are there, applies the rule.
__device__ __forceinline__ void decide(const MonRun& run, double* residuals, unsigned* place) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *place = atomicAdd(&run.control->ticket, 1u);
  }
  __syncthreads();
  if (*place + 1 != gridDim.x) return;
  __threadfence();
  const int lane = static_cast<int>(threadIdx.x & 31u), blocks = static_cast<int>(gridDim.x);
  for (int i = static_cast<int>(threadIdx.x / 32); i < run.steps;
       i += static_cast<int>(blockDim.x / 32)) {
    const volatile double* log = run.log + static_cast<int64_t>(i) * blocks * 2;
    double change = 0, norm = 0;
    for (int b = lane; b < blocks; b += 32) {
      change += log[2 * b];
      norm += log[2 * b + 1];
    }
    change = sum_over_warp<1>(change);
    norm = sum_over_warp<1>(norm);
    if (lane == 0) residuals[i] = relative_residual(change, norm);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  run.control->ticket = 0;
  int i = 0;
  while (i < run.steps && goes_on(residuals[i], run.a.rule.tol)) ++i;
  if (i == run.steps && !run.last) return;
  if (i == run.steps) --i;
  run.control->done = 1;
  run.control->steps = i + 1;
  run.control->checkpoint = run.checkpoint;
  *run.a.iterations = run.made + i + 1;
  *run.a.residual = residuals[i];
}

#endif

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
