#include "ops/masked_linear_cuda.h"

#include "ops/masked_linear_choice_cuda.h"
#include "ops/masked_linear_sampled_cuda.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

LinearPanelWeight prepare_linear(const CudaCall& call, const PatternView& pattern, bool transposed,
                                 const PatternView* match, const Tensor& weight, int64_t batch,
                                 const char* op) {
  const LinearTile tile =
      linear_tile(pattern, dtype_of(weight, op, "weight"), batch, call.limits());
  const Tensor contiguous = dense(weight);
  const PanelWeight panel =
      new_panel(pattern, dtype_of(contiguous, op, "weight"), tile.layout, contiguous, op);
  fill_panel(call, panel, transposed, match, contiguous, tile.layout, op);
  return LinearPanelWeight{panel, tile};
}

Tensor linear_product(const CudaCall& call, const LinearPanelWeight& weight, const Tensor& x_in,
                      const Epilogue& epilogue, const char* op) {
  const PatternView& p = weight.panel.pattern;
  const Tensor x = dense(x_in);
  Tensor y = torch::stable::new_empty(x, {x.size(0), p.rows});
  std::optional<Tensor> residual = epilogue.residual;
  if (residual.has_value()) residual = dense(*residual);
  const PanelLinearArgs args{p.rows,
                             p.depth,
                             p.block_depth,
                             p.blocks(),
                             dtype_of(x, op, "x"),
                             x.size(0),
                             x.const_data_ptr(),
                             weight.panel.view(),
                             weight.tile,
                             epilogue.bias.has_value() ? epilogue.bias->const_data_ptr() : nullptr,
                             residual.has_value() ? residual->const_data_ptr() : nullptr,
                             epilogue.relu,
                             y.mutable_data_ptr()};
  check_launch(masked_linear_panel(args, call.limits(), call.stream()), op);
  return y;
}

namespace {

Tensor sampled_at(const CudaCall& call, const PatternView& p, const Tensor& grad, const Tensor& x,
                  const char* op) {
  BitMatrix bits{nullptr, p.rows, p.cols()};
  const Tensor words = torch::stable::new_empty(
      x, {checked_product(bits.rows, bits.row_words(), op)}, ScalarType::Int);
  bits.words = static_cast<const uint32_t*>(words.const_data_ptr());
  const Tensor verdict = torch::stable::new_empty(x, {2}, ScalarType::Long);
  auto* found = static_cast<unsigned long long*>(verdict.mutable_data_ptr());
  check_launch(
      pattern_bits(RawPattern{p.row_ptr, p.offset, p.rows, p.cols(), p.block_cols(), p.nnz},
                   static_cast<uint32_t*>(words.mutable_data_ptr()), found, call.limits(),
                   call.stream()),
      op);
  check_launch(report_pattern(found, call.fault(), call.stream()), op);
  const SampledShape shape = sampled_shape(p.rows, p.cols(), p.nnz, call.limits());
  const std::vector<Tensor> index = new_sampled_index(shape, x, op);
  fill_sampled_index(call, bits, shape, index, op);
  return sampled_linear_weight_grad(call, shape, index, grad, x, op);
}

Tensor masked_linear_cuda(const Tensor& x, const Tensor& weight,
                          const std::optional<Tensor>& bias_in, const Tensor& row_ptr,
                          const Tensor& offset, const Tensor&, const Tensor&, int64_t block_depth,
                          int64_t transposed_block_depth, bool) {
  const char* op = "masked_linear";
  const MaskedLinearCall c =
      validate_masked_linear(x, "x", weight, block_depth, transposed_block_depth, false, op);
  const PatternView pattern = validate_pattern(row_ptr, offset, x, c.shape, false, op);
  const CudaCall call(x, op);
  const std::optional<Tensor> bias = checked_bias(bias_in, c.shape.rows, x, op);
  const auto prepared = prepare_linear(call, pattern, false, nullptr, weight, c.batch, op);
  return linear_product(call, prepared, x, Epilogue{bias, std::nullopt, false}, op);
}

Tensor input_grad_cuda(const Tensor& grad, const Tensor& weight, const Tensor& row_ptr,
                       const Tensor& offset, const Tensor& transposed_row_ptr,
                       const Tensor& transposed_offset, int64_t block_depth,
                       int64_t transposed_block_depth) {
  const char* op = "masked_linear_input_grad";
  const MaskedLinearCall c =
      validate_masked_linear(grad, "grad", weight, block_depth, transposed_block_depth, true, op);
  const PatternView forward = validate_pattern(row_ptr, offset, grad, c.shape, false, op);
  const PatternView pattern =
      validate_pattern(transposed_row_ptr, transposed_offset, grad, c.shape, true, op);
  const CudaCall call(grad, op);
  const auto prepared = prepare_linear(call, pattern, true, &forward, weight, c.batch, op);
  return linear_product(call, prepared, grad, Epilogue{std::nullopt, std::nullopt, false}, op);
}

Tensor weight_grad_cuda(const Tensor& grad, const Tensor& x, const Tensor& row_ptr,
                        const Tensor& offset, int64_t block_depth, bool tf32) {
  const char* op = "masked_linear_weight_grad";
  const MaskedLinearCall c = validate_masked_linear_weight_grad(grad, x, block_depth, op);
  const PatternView pattern = validate_pattern(row_ptr, offset, x, c.shape, false, op);
  const CudaCall call(x, op);
  if (sample_weight_grad(
          CudaProduct{c.dtype, tf32, c.batch, pattern.rows, pattern.cols(), pattern.nnz})) {
    return sampled_at(call, pattern, grad, x, op);
  }
  Tensor out = dense(torch::stable::matmul(torch::stable::transpose(grad, 0, 1), x));
  keep_entries(call, pattern, out, op);
  return out;
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE

FASTPRUNE_CUDA_IMPL(m) {
  using namespace fastprune::FASTPRUNE_CUDA_NAMESPACE;
  m.impl("masked_linear", TORCH_BOX(&masked_linear_cuda));
  m.impl("masked_linear_input_grad", TORCH_BOX(&input_grad_cuda));
  m.impl("masked_linear_weight_grad", TORCH_BOX(&weight_grad_cuda));
}
