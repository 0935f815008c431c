#include "ops/masked_linear.h"

#include "kernels/cpu/masked_linear.h"

namespace fastprune {

MaskedLinearCall validate_masked_linear(const Tensor& input, const char* name, const Tensor& weight,
                                        int64_t block_depth, int64_t transposed_block_depth,
                                        bool input_has_rows, const char* op) {
  check_cpu(input, op, name);
  check_cpu(weight, op, "weight");
  check_dim(input, 2, op, name);
  check_dim(weight, 2, op, "weight");
  check_dtype(weight, input.scalar_type(), op, "weight");
  check_size(input, 1, weight.size(input_has_rows ? 0 : 1), op, name);
  return MaskedLinearCall{
      PatternShape{weight.size(0), 1, weight.size(1), 1, block_depth, transposed_block_depth},
      dtype_of(input, op, name), input.size(0)};
}

namespace {

void multiply(const PatternView& pattern, DType dtype, const Tensor& x, const Tensor& values,
              const std::optional<Tensor>& bias, Tensor& y) {
  MaskedLinearArgs args{pattern,
                        dtype,
                        x.size(0),
                        x.const_data_ptr(),
                        values.const_data_ptr(),
                        bias.has_value() ? bias->const_data_ptr() : nullptr,
                        y.mutable_data_ptr()};
  if (pattern.rows == 0 || args.batch == 0) return;
  const int64_t tile = FASTPRUNE_PICK(masked_linear_tile)(dtype);
  const Cuts cuts = cut_product((args.batch + tile - 1) / tile, pattern.rows);
  const int64_t scratch =
      FASTPRUNE_PICK(masked_linear_scratch)(pattern, dtype, cuts.rows_per_part());
  for_each_cut(cuts, scratch,
               [&](int64_t begin, int64_t end, int64_t row_begin, int64_t row_end, void* memory) {
                 for (int64_t i = begin; i < end; ++i) {
                   FASTPRUNE_PICK(masked_linear)(args, i, row_begin, row_end, memory);
                 }
               });
}

Tensor masked_linear_cpu(const Tensor& x_in, const Tensor& weight_in,
                         const std::optional<Tensor>& bias_in, const Tensor& row_ptr,
                         const Tensor& offset, const Tensor&, const Tensor&, int64_t block_depth,
                         int64_t transposed_block_depth, bool) {
  const char* op = "masked_linear";
  const MaskedLinearCall call =
      validate_masked_linear(x_in, "x", weight_in, block_depth, transposed_block_depth, false, op);
  const PatternView pattern = checked_pattern(row_ptr, offset, call.shape, false, op);
  const std::optional<Tensor> bias = checked_bias(bias_in, call.shape.rows, x_in.scalar_type(), op);
  const Tensor x = dense(x_in), weight = dense(weight_in);
  const Tensor values = forward_values(pattern, weight, op);
  Tensor y = torch::stable::new_empty(x, {call.batch, call.shape.rows});
  multiply(pattern, call.dtype, x, values, bias, y);
  return y;
}

Tensor input_grad_cpu(const Tensor& grad_in, const Tensor& weight_in, const Tensor& row_ptr,
                      const Tensor& offset, const Tensor& transposed_row_ptr,
                      const Tensor& transposed_offset, int64_t block_depth,
                      int64_t transposed_block_depth) {
  const char* op = "masked_linear_input_grad";
  const MaskedLinearCall call = validate_masked_linear(grad_in, "grad", weight_in, block_depth,
                                                       transposed_block_depth, true, op);
  const PatternView forward = checked_pattern(row_ptr, offset, call.shape, false, op);
  const PatternView pattern =
      checked_pattern(transposed_row_ptr, transposed_offset, call.shape, true, op);
  const Tensor grad = dense(grad_in), weight = dense(weight_in);
  const Tensor values = transposed_values(forward, pattern, weight, op);
  Tensor x_grad = torch::stable::new_empty(grad, {call.batch, call.shape.depth});
  multiply(pattern, call.dtype, grad, values, std::nullopt, x_grad);
  return x_grad;
}

Tensor weight_grad_cpu(const Tensor& grad_in, const Tensor& x_in, const Tensor& row_ptr,
                       const Tensor& offset, int64_t block_depth) {
  const char* op = "masked_linear_weight_grad";
  check_cpu(grad_in, op, "grad");
  check_cpu(x_in, op, "x");
  check_dim(grad_in, 2, op, "grad");
  check_dim(x_in, 2, op, "x");
  check_dtype(grad_in, x_in.scalar_type(), op, "grad");
  check_size(grad_in, 0, x_in.size(0), op, "grad");
  const DType dtype = dtype_of(x_in, op, "x");
  const PatternShape shape{grad_in.size(1), 1, x_in.size(1), 1, block_depth, 1};
  const PatternView pattern = checked_pattern(row_ptr, offset, shape, false, op);
  const Tensor grad = dense(grad_in), x = dense(x_in);
  const Tensor values = torch::stable::new_zeros(x, {pattern.nnz}, accumulator_type(dtype));
  MaskedLinearWeightGradArgs args{pattern,
                                  dtype,
                                  x.size(0),
                                  grad.const_data_ptr(),
                                  x.const_data_ptr(),
                                  values.mutable_data_ptr()};
  const Cuts cuts = cut_rows(pattern.rows);
  const int64_t scratch =
      FASTPRUNE_PICK(masked_linear_scratch)(pattern, dtype, cuts.rows_per_part());
  for_each_cut(cuts, scratch,
               [&](int64_t, int64_t, int64_t row_begin, int64_t row_end, void* memory) {
                 FASTPRUNE_PICK(masked_linear_weight_grad)(args, row_begin, row_end, memory);
               });
  Tensor weight_grad = torch::stable::new_empty(x, {pattern.rows, pattern.depth});
  scatter_to_dense(pattern, dtype, values, weight_grad);
  return weight_grad;
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def(
      "masked_linear(Tensor x, Tensor weight, Tensor? bias, Tensor row_ptr, Tensor offset, "
      "Tensor transposed_row_ptr, Tensor transposed_offset, int block_depth, "
      "int transposed_block_depth, bool dense_weight_grad) -> Tensor");
  m.def(
      "masked_linear_input_grad(Tensor grad, Tensor weight, Tensor row_ptr, Tensor offset, "
      "Tensor transposed_row_ptr, Tensor transposed_offset, int block_depth, "
      "int transposed_block_depth) -> Tensor");
  m.def(
      "masked_linear_weight_grad(Tensor grad, Tensor x, Tensor row_ptr, Tensor offset, "
      "int block_depth) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&fastprune::masked_linear_cpu));
  m.impl("masked_linear_input_grad", TORCH_BOX(&fastprune::input_grad_cpu));
  m.impl("masked_linear_weight_grad", TORCH_BOX(&fastprune::weight_grad_cpu));
}
