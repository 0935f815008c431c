// What the CUDA side of every op shares: device guard, stream, errors of launches and of bad data.
//
// X_cuda.cpp is compiled twice, as the kernels are (kernels/cuda/cuda.h): for CUDA tensors of the
// library `fastprune`, and emulated, for CPU tensors of the library `fastprune_emulated`, where the
// tests call it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "kernels/cuda/device.h"
#include "ops/common.h"

#if defined(FASTPRUNE_EMULATED)
#define FASTPRUNE_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastprune_emulated, CPU, m)
#else
#define FASTPRUNE_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastprune, CUDA, m)
// Only a torch with CUDA has it; weak, so that the binary loads under the others.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

inline void check_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA: ", cudaGetErrorString(error));
}

// Raises what an earlier kernel found (device.h), once. Not a synchronisation: a kernel that still
// runs is heard of later.
inline void raise_earlier_fault(const char* op) {
  uint32_t* mark = nullptr;
  check_launch(fault_mark(&mark), op);
  const uint32_t fault = *static_cast<volatile uint32_t*>(mark);
  if (fault == kNoFault) return;
  *static_cast<volatile uint32_t*>(mark) = kNoFault;
  static const char* const texts[] = {
      "",
      "row_ptr: expected increasing bounds from 0 to the number of entries",
      "offset: expected positions inside their blocks",
      "transposed_offset: expected the transpose of the forward pattern",
      "scores: a candidate's score is NaN",
      "k: expected at most as many as there are candidates",
  };
  const char* text = fault < sizeof texts / sizeof texts[0] ? texts[fault] : "unknown fault";
  STD_TORCH_CHECK(
      false, op,
      ": an earlier call on a CUDA device met bad data, and its result is not to be used: ", text);
}

// One call: the tensors' device is current while it lives, and work goes to torch's stream there.
class CudaCall {
 public:
  CudaCall(const Tensor& on, const char* op) {
#if !defined(FASTPRUNE_EMULATED)
    guard_.emplace(on.get_device());
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr &&
                        aoti_torch_get_current_cuda_stream(on.get_device(), &stream) == 0,
                    op, ": CUDA: torch has no current stream");
    stream_ = static_cast<cudaStream_t>(stream);
#else
    static_cast<void>(on);
#endif
    raise_earlier_fault(op);
    check_launch(fault_mark(&fault_mark_), op);
    check_launch(device_limits(&limits_), op);
  }
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;

  cudaStream_t stream() const { return stream_; }
  uint32_t* fault() const { return fault_mark_; }
  const DeviceLimits& limits() const { return limits_; }

 private:
#if !defined(FASTPRUNE_EMULATED)
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
  cudaStream_t stream_ = nullptr;
  uint32_t* fault_mark_ = nullptr;
  DeviceLimits limits_{};
};

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
