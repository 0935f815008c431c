#include "ops/masked_linear.h"

#include <cstring>

#include "kernels/cpu/masked_linear.h"
#include "ops/masked_linear_choice.h"

namespace fastprune {

MaskedLinearCall validate_masked_linear(const Tensor& input, const char* name, const Tensor& weight,
                                        int64_t block_depth, int64_t transposed_block_depth,
                                        bool input_has_rows, const char* op) {
  check_same_device(weight, input, op, "weight", name);
  check_dim(input, 2, op, name);
  check_dim(weight, 2, op, "weight");
  check_dtype(weight, input.scalar_type(), op, "weight");
  check_size(input, 1, weight.size(input_has_rows ? 0 : 1), op, name);
  return MaskedLinearCall{
      PatternShape{weight.size(0), 1, weight.size(1), 1, block_depth, transposed_block_depth},
      dtype_of(input, op, name), input.size(0)};
}

MaskedLinearCall validate_masked_linear_weight_grad(const Tensor& grad, const Tensor& x,
                                                    int64_t block_depth, const char* op) {
  check_same_device(grad, x, op, "grad", "x");
  check_dim(grad, 2, op, "grad");
  check_dim(x, 2, op, "x");
  check_dtype(grad, x.scalar_type(), op, "grad");
  check_size(grad, 0, x.size(0), op, "grad");
  return MaskedLinearCall{PatternShape{grad.size(1), 1, x.size(1), 1, block_depth, 1},
                          dtype_of(x, op, "x"), x.size(0)};
}

namespace {

void multiply(const LinearWeight& given, bool transposed, DType dtype, const Tensor& x,
              const Epilogue& epilogue, bool from_last, bool to_last,
              const std::optional<Tensor>& residual, Tensor& y) {
  MaskedLinearArgs args{given.pattern,
                        dtype,
                        x.size(0),
                        x.const_data_ptr(),
                        given.values,
                        epilogue.bias.has_value() ? epilogue.bias->const_data_ptr() : nullptr,
                        y.mutable_data_ptr(),
                        from_last,
                        to_last,
                        residual.has_value() ? residual->const_data_ptr() : nullptr,
                        epilogue.relu};
  if (y.numel() == 0 || multiply_by_form(given, transposed, args)) return;
  LinearWeight w = given;
  Shared values;
  if (w.values == nullptr && w.dense != nullptr) {
    values = w.plan->values(transposed, *w.dense, w.version,
                            transposed ? "planned_linear_input_grad" : "planned_linear");
    w.pattern = transposed ? w.plan->transposed() : w.plan->forward();
    w.values = values->as<void>();
    args.pattern = w.pattern;
    args.values = w.values;
  }
  const int64_t tile = FASTPRUNE_PICK(masked_linear_tile)(dtype);
  Cuts cuts = cut_product((args.batch + tile - 1) / tile, w.pattern.rows);
  if (w.plan != nullptr && cuts.parts > 1) cuts.bounds = w.plan->balanced(transposed, cuts.parts);
  const int64_t scratch =
      FASTPRUNE_PICK(masked_linear_scratch)(w.pattern, dtype, cuts.rows_per_part());
  for_each_cut(cuts, scratch,
               [&](int64_t begin, int64_t end, int64_t row_begin, int64_t row_end, void* memory) {
                 for (int64_t i = begin; i < end; ++i) {
                   FASTPRUNE_PICK(masked_linear)(args, i, row_begin, row_end, memory);
                 }
               });
}

bool is_batch_last_2d(const Tensor& t) {
  return t.dim() == 2 && t.size(0) > 1 && t.size(1) > 1 && t.stride(0) == 1 &&
         t.stride(1) == t.size(0);
}

Tensor new_matrix(const Tensor& like, int64_t n, int64_t c, bool batch_last) {
  if (!batch_last) return torch::stable::new_empty(like, {n, c});
  const int64_t sizes[2] = {n, c}, strides[2] = {1, n};
  return empty_strided(like, sizes, strides, 2);
}

}  // namespace

Tensor linear_product(const LinearWeight& weight, bool transposed, DType dtype, const Tensor& x_in,
                      const Epilogue& epilogue, Layout layout) {
  const bool from_last = is_batch_last_2d(x_in);
  const bool to_last = layout == Layout::batch_last || (layout == Layout::like_input && from_last);
  const Tensor x = from_last ? x_in : dense(x_in);
  const int64_t rows =
      weight.dense == nullptr ? weight.pattern.rows : weight.dense->size(transposed ? 1 : 0);
  Tensor y = new_matrix(x, x.size(0), rows, to_last);
  std::optional<Tensor> residual = epilogue.residual;
  if (residual.has_value()) {
    if (is_batch_last_2d(*residual) != to_last) {
      Tensor stored = new_matrix(x, x.size(0), rows, to_last);
      torch::stable::copy_(stored, *residual);
      residual = stored;
    } else if (!to_last) {
      residual = dense(*residual);
    }
  }
  multiply(weight, transposed, dtype, x, epilogue, from_last, to_last, residual, y);
  return y;
}

Tensor linear_weight_grad(const LinearWeight& weight, DType dtype, const Tensor& grad_in,
                          const Tensor& x_in) {
  const PatternView& pattern = weight.pattern;
  const bool grad_last = is_batch_last_2d(grad_in), x_last = is_batch_last_2d(x_in);
  const Tensor grad = grad_last ? grad_in : dense(grad_in), x = x_last ? x_in : dense(x_in);
  const Scratch values(pattern.nnz * 8);
  std::memset(values.as<void>(), 0, static_cast<size_t>(pattern.nnz * 8));
  const MaskedLinearWeightGradArgs args{
      pattern,           dtype,     x.size(0), grad.const_data_ptr(), x.const_data_ptr(),
      values.as<void>(), grad_last, x_last};
  Cuts cuts = cut_rows(pattern.rows);
  if (weight.plan != nullptr && cuts.parts > 1) {
    cuts.bounds = weight.plan->balanced(false, cuts.parts);
  }
  const int64_t scratch =
      FASTPRUNE_PICK(masked_linear_scratch)(pattern, dtype, cuts.rows_per_part());
  for_each_cut(cuts, scratch,
               [&](int64_t, int64_t, int64_t row_begin, int64_t row_end, void* memory) {
                 FASTPRUNE_PICK(masked_linear_weight_grad)(args, row_begin, row_end, memory);
               });
  Tensor weight_grad = torch::stable::new_empty(x, {pattern.rows, pattern.depth});
  scatter_to_dense(pattern, dtype, values.as<void>(), weight_grad);
  return weight_grad;
}

namespace {

Tensor masked_linear_cpu(const Tensor& x_in, const Tensor& weight_in,
                         const std::optional<Tensor>& bias_in, const Tensor& row_ptr,
                         const Tensor& offset, const Tensor&, const Tensor&, int64_t block_depth,
                         int64_t transposed_block_depth, bool) {
  const char* op = "masked_linear";
  const MaskedLinearCall call =
      validate_masked_linear(x_in, "x", weight_in, block_depth, transposed_block_depth, false, op);
  const PatternView pattern = checked_pattern(row_ptr, offset, call.shape, false, op);
  const std::optional<Tensor> bias = checked_bias(bias_in, call.shape.rows, x_in, op);
  const Tensor values = forward_values(pattern, dense(weight_in), op);
  return linear_product(LinearWeight{pattern, values.const_data_ptr(), nullptr}, false, call.dtype,
                        x_in, Epilogue{bias, std::nullopt, false}, Layout::contiguous);
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
  const Tensor values = transposed_values(forward, pattern, dense(weight_in), op);
  return linear_product(LinearWeight{pattern, values.const_data_ptr(), nullptr}, true, call.dtype,
                        grad_in, Epilogue{std::nullopt, std::nullopt, false}, Layout::contiguous);
}

Tensor weight_grad_cpu(const Tensor& grad_in, const Tensor& x_in, const Tensor& row_ptr,
                       const Tensor& offset, int64_t block_depth, bool) {
  const char* op = "masked_linear_weight_grad";
  const MaskedLinearCall call = validate_masked_linear_weight_grad(grad_in, x_in, block_depth, op);
  const PatternView pattern = checked_pattern(row_ptr, offset, call.shape, false, op);
  return linear_weight_grad(LinearWeight{pattern, nullptr, nullptr}, call.dtype, grad_in, x_in);
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
      "int block_depth, bool tf32=False) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&fastprune::masked_linear_cpu));
  m.impl("masked_linear_input_grad", TORCH_BOX(&fastprune::input_grad_cpu));
  m.impl("masked_linear_weight_grad", TORCH_BOX(&fastprune::weight_grad_cpu));
}
