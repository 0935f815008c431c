#include "kernels/cuda/pattern.h"

#include "ops/cuda_op.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

Tensor apply_mask_cuda(const Tensor& values_in, const Tensor& mask_in) {
  const char* op = "apply_mask";
  const DType dtype = dtype_of(values_in, op, "values");
  check_same_device(mask_in, values_in, op, "mask", "values");
  check_dtype(mask_in, ScalarType::Bool, op, "mask");
  check_dim(mask_in, values_in.dim(), op, "mask");
  for (int64_t i = 0; i < values_in.dim(); ++i) {
    check_size(mask_in, i, values_in.size(i), op, "mask");
  }
  const CudaCall call(values_in, op);
  const Tensor values = dense(values_in), mask = dense(mask_in);
  Tensor out = torch::stable::empty_like(values);
  check_launch(
      apply_mask(dtype, values.const_data_ptr(), static_cast<const uint8_t*>(mask.const_data_ptr()),
                 out.mutable_data_ptr(), values.numel(), call.limits(), call.stream()),
      op);
  return out;
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE

FASTPRUNE_CUDA_IMPL(m) {
  m.impl("apply_mask", TORCH_BOX(&fastprune::FASTPRUNE_CUDA_NAMESPACE::apply_mask_cuda));
}
