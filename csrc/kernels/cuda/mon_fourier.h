// Equilibria of convolutional monotone operator layers on the GPU, in the Fourier domain, and their
// adjoint equations.
//
// A step is two launches: the products, a block per frequency; and the maps, a block per channel
// and four samples, which takes them back to the maps, updates these, adds up the norms and
// transforms the next right-hand side. The last block of a step applies the rule and leaves a flag
// on the device: the launches of all steps are made, and do nothing once it is set.
#pragma once

#include "kernels/cuda/mon_math.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

struct MonFourierArgs {
  DType dtype;  // f32 or f64
  MonRule rule;
  int64_t batch, channels, height, width, ring, max_iter;
  const void *matrix, *resolvent;  // of mon_fourier_pack()
  const void *bias, *slope;        // (batch, channels, height, width)
  void *out, *z;
  int64_t* iterations;  // of the batch, or of each sample
  double* residual;
};

// Bytes of scratch, aligned to 16.
int64_t mon_fourier_scratch(const MonFourierArgs& args, const DeviceLimits& limits);
cudaError_t mon_fourier(const MonFourierArgs& args, void* scratch, const DeviceLimits& limits,
                        cudaStream_t stream);

// Complex blocks of all frequencies of rfft2 to those of the frequencies that are not another's
// conjugate, kx by kx; each column by column.
cudaError_t mon_fourier_pack(DType dtype, int64_t channels, int64_t height, int64_t width,
                             bool adjoint, const void* matrix, void* packed, cudaStream_t stream);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
