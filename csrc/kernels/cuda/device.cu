#include "kernels/cuda/device.h"

namespace fastprune::cuda {
namespace {

// Only ever looked up: the runtime finds an image for the device, or it does not.
__global__ void probe() {}

}  // namespace

cudaError_t device_usable(int device, bool* usable) {
  *usable = false;
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error != cudaSuccess) return error;
  error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes attributes;
  *usable = cudaFuncGetAttributes(&attributes, probe) == cudaSuccess;
  if (!*usable) cudaGetLastError();
  return cudaSetDevice(before);
}

}  // namespace fastprune::cuda
