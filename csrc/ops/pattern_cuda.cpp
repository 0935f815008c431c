#include "kernels/cuda/pattern.h"

#include <tuple>

#include "ops/cuda_op.h"
#include "ops/pattern.h"

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

// The number of entries sizes the result: it is waited for, so this op cannot be captured in a
// graph.
std::tuple<Tensor, Tensor, Tensor, Tensor> pack_pattern_cuda(const Tensor& mask_in, int64_t groups,
                                                             int64_t taps, int64_t block_depth,
                                                             int64_t transposed_block_depth) {
  const char* op = "pack_pattern";
  const PatternShape shape =
      validate_pack_pattern(mask_in, groups, taps, block_depth, transposed_block_depth);
  const CudaCall call(mask_in, op);
  const Tensor mask = dense(mask_in);
  PackArgs args{};
  args.forward = view_of(shape, false);
  args.transposed = view_of(shape, true);
  const int64_t bounds = checked_product(args.forward.blocks(), args.forward.rows, op) + 1;
  const int64_t bounds_t = checked_product(args.transposed.blocks(), args.transposed.rows, op) + 1;
  Tensor row_ptr = torch::stable::new_empty(mask, {bounds}, ScalarType::Long);
  Tensor row_ptr_t = torch::stable::new_empty(mask, {bounds_t}, ScalarType::Long);
  Tensor scratch = torch::stable::new_empty(mask, {pack_scratch(args.forward, args.transposed)},
                                            ScalarType::Long);
  args.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  args.row_ptr = static_cast<int64_t*>(row_ptr.mutable_data_ptr());
  args.transposed_row_ptr = static_cast<int64_t*>(row_ptr_t.mutable_data_ptr());
  args.scratch = static_cast<int64_t*>(scratch.mutable_data_ptr());
  check_launch(count_entries(args, call.limits(), call.stream()), op);
  int64_t nnz = 0;
  check_launch(read_value(args.row_ptr + bounds - 1, &nnz, call.stream()), op);
  Tensor offset = torch::stable::new_empty(mask, {nnz}, ScalarType::Short);
  Tensor offset_t = torch::stable::new_empty(mask, {nnz}, ScalarType::Short);
  args.offset = static_cast<int16_t*>(offset.mutable_data_ptr());
  args.transposed_offset = static_cast<int16_t*>(offset_t.mutable_data_ptr());
  if (nnz > 0) check_launch(write_entries(args, call.limits(), call.stream()), op);
  return {row_ptr, offset, row_ptr_t, offset_t};
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE

FASTPRUNE_CUDA_IMPL(m) {
  m.impl("pack_pattern", TORCH_BOX(&fastprune::FASTPRUNE_CUDA_NAMESPACE::pack_pattern_cuda));
  m.impl("apply_mask", TORCH_BOX(&fastprune::FASTPRUNE_CUDA_NAMESPACE::apply_mask_cuda));
}
