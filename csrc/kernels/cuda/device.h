// What the CUDA side of this build can run on. Raw CUDA, no torch headers.
#pragma once

#include <cuda_runtime.h>

namespace fastprune::cuda {

// Writes to *usable whether the kernels inside this binary can run on `device`, by asking the
// runtime to load one of them. No launch, no synchronisation.
cudaError_t device_usable(int device, bool* usable);

}  // namespace fastprune::cuda
