// Packed patterns (kernels/cpu/pattern.h) on the GPU.
#pragma once

#include "kernels/cuda/device.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// out[i] = values[i] where mask[i], else an exact 0; n elements of `dtype`, mask of bytes 0 or 1.
cudaError_t apply_mask(DType dtype, const void* values, const uint8_t* mask, void* out, int64_t n,
                       const DeviceLimits& limits, cudaStream_t stream);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
