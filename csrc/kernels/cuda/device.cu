#include "kernels/cuda/device.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

#if defined(FASTPRUNE_EMULATED)

cudaError_t device_limits(DeviceLimits* limits) {
  *limits = DeviceLimits{emulation::multiprocessors(), 227 << 10, 90};
  return cudaSuccess;
}

cudaError_t fault_mark(uint32_t** mark) {
  static uint32_t word = kNoFault;
  *mark = &word;
  return cudaSuccess;
}

#else

namespace {

constexpr int kMaxDevices = 64;

}  // namespace

cudaError_t device_limits(DeviceLimits* limits) {
  static DeviceLimits known[kMaxDevices];  // zero: not asked yet; every asker writes the same
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device < kMaxDevices && known[device].capability != 0) {
    *limits = known[device];
    return cudaSuccess;
  }
  int value[4];
  const cudaDeviceAttr wanted[4] = {
      cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin,
      cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor};
  for (int i = 0; i < 4; ++i) {
    error = cudaDeviceGetAttribute(&value[i], wanted[i], device);
    if (error != cudaSuccess) return error;
  }
  *limits = DeviceLimits{value[0], value[1], 10 * value[2] + value[3]};
  if (device < kMaxDevices) known[device] = *limits;
  return cudaSuccess;
}

cudaError_t fault_mark(uint32_t** mark) {
  // Portable, mapped: one address for the host and, with unified addressing, for every device.
  struct Made {
    uint32_t* word = nullptr;
    cudaError_t error;
    Made() {
      error = cudaHostAlloc(&word, sizeof(uint32_t), cudaHostAllocPortable | cudaHostAllocMapped);
      if (error == cudaSuccess) *word = kNoFault;
    }
  };
  static const Made made;
  *mark = made.word;
  return made.error;
}

#endif

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
