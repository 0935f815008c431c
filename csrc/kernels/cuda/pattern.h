// Packed patterns (kernels/cpu/pattern.h) on the GPU.
#pragma once

#include "kernels/cpu/pattern.h"
#include "kernels/cuda/device.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// out[i] = values[i] where mask[i], else an exact 0; n elements of `dtype`, mask of bytes 0 or 1.
cudaError_t apply_mask(DType dtype, const void* values, const uint8_t* mask, void* out, int64_t n,
                       const DeviceLimits& limits, cudaStream_t stream);

// A mask and its two patterns under construction. The views need no row_ptr, offset or nnz.
struct PackArgs {
  PatternView forward, transposed;
  const uint8_t* mask;  // rows x cols bytes, 0 or 1
  int64_t *row_ptr, *transposed_row_ptr;
  int16_t *offset, *transposed_offset;  // null while entries are counted
  int64_t* scratch;                     // pack_scratch() values, for the counting
};
int64_t pack_scratch(const PatternView& forward, const PatternView& transposed);
// Writes both row_ptr: counts of all (block, row), summed up.
cudaError_t count_entries(const PackArgs& args, const DeviceLimits& limits, cudaStream_t stream);
// Writes both offsets.
cudaError_t write_entries(const PackArgs& args, const DeviceLimits& limits, cudaStream_t stream);
// Waits for the stream and reads one value: what a graph's capture refuses.
cudaError_t read_value(const int64_t* from, int64_t* to, cudaStream_t stream);

// A dense gradient, rows x cols, zeroed where the pattern has no entry. The pattern is not trusted.
cudaError_t keep_pattern(const PatternView& pattern, DType dtype, void* grad, uint32_t* fault,
                         const DeviceLimits& limits, cudaStream_t stream);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
