#include "kernels/cuda/pattern.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void apply_mask_kernel(const T* values, const uint8_t* mask, T* out, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    out[i] = mask[i] != 0 ? values[i] : T(0);
  }
}

}  // namespace

cudaError_t apply_mask(DType dtype, const void* values, const uint8_t* mask, void* out, int64_t n,
                       const DeviceLimits& limits, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t wanted = (n + kThreads - 1) / kThreads, most = int64_t{16} * limits.multiprocessors;
  const dim3 grid(static_cast<unsigned>(wanted < most ? wanted : most));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return launch(apply_mask_kernel<T>, grid, dim3(kThreads), 0, stream,
                  static_cast<const T*>(values), mask, static_cast<T*>(out), n);
  };
  if (dtype == DType::f64) return run(uint64_t{0});
  return dtype == DType::f32 ? run(uint32_t{0}) : run(uint16_t{0});
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
