// What every CUDA source includes first: CUDA itself, or its emulation on the host.
//
// Kernels are compiled twice: by nvcc for GPUs, and, for tests on machines without one, by the host
// compiler against emulation.h, which runs the threads of a block one after another. So a kernel is
// launched through launch() below, takes dynamic shared memory from shared_memory<T>(), and reaches
// instructions that C++ has no name for through warp.h.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(FASTPRUNE_EMULATED)
#include "kernels/cuda/emulation.h"
// The two builds of a source live side by side in one binary.
#define FASTPRUNE_CUDA_NAMESPACE emulated
#else
#include <cuda_runtime.h>
#define FASTPRUNE_CUDA_NAMESPACE cuda
#endif

#include "kernels/cpu/scalar_types.h"  // DType, BFloat16, Float16

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// What launchers size their grids by.
struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // the most dynamic shared memory that a block can ask for
  int capability;    // 80, 90, ...
};

// Of the current device; asked once per device. Defined in device.cu.
cudaError_t device_limits(DeviceLimits* limits);

#if defined(FASTPRUNE_EMULATED)

template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   A... args) {
  return emulation::run(grid, block, shared_bytes, [&] { kernel(static_cast<P>(args)...); });
}

template <typename T>
T* shared_memory() {
  return static_cast<T*>(emulation::shared_memory());
}

#elif defined(__CUDACC__)

// Launches on a stream; more than 48 KB of shared memory are asked for where needed. No
// synchronisation; errors of the launch itself come back.
template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, A... args) {
  if (shared_bytes > (size_t{48} << 10)) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<P>(args)...);
  // clang-format on
  return cudaGetLastError();
}

// The block's dynamic shared memory, aligned to 16 bytes; every call gives the same address.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ uint4 fastprune_shared_memory[];
  return reinterpret_cast<T*>(fastprune_shared_memory);
}

#endif

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
