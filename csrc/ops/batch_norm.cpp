// Batch normalization in training with the ReLU after it, in either layout of the activations.
#include <tuple>

#include "kernels/cpu/batch_norm.h"
#include "ops/layout.h"

namespace fastprune {
namespace {

void check_channels(const std::optional<Tensor>& t, const Tensor& x, DType dtype, const char* op,
                    const char* name) {
  if (!t.has_value()) return;
  check_cpu(*t, op, name);
  check_dim(*t, 1, op, name);
  check_size(*t, 0, x.size(1), op, name);
  check_dtype(*t, accumulator_type(dtype), op, name);
}

ChannelRuns runs_of(const Tensor& x, bool batch_last) {
  const int64_t pixels = x.size(2) * x.size(3), n = x.size(0);
  if (batch_last) return ChannelRuns{1, n * pixels, n * pixels, 0};
  return ChannelRuns{n, pixels, pixels, x.size(1) * pixels};
}

const void* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

std::optional<Tensor> dense_or_none(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(dense(*t)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_cpu(const Tensor& x_in,
                                                          const std::optional<Tensor>& weight_in,
                                                          const std::optional<Tensor>& bias_in,
                                                          double eps, bool relu) {
  const char* op = "batch_norm";
  check_cpu(x_in, op, "x");
  check_dim(x_in, 4, op, "x");
  const DType dtype = dtype_of(x_in, op, "x");
  check_channels(weight_in, x_in, dtype, op, "weight");
  check_channels(bias_in, x_in, dtype, op, "bias");
  const bool last = is_batch_last(x_in);
  const Tensor x = last ? x_in : dense(x_in);
  const std::optional<Tensor> weight = dense_or_none(weight_in), bias = dense_or_none(bias_in);
  Tensor y = new_activations(x, x.size(0), x.size(1), x.size(2), x.size(3), last);
  const ScalarType kind = accumulator_type(dtype);
  Tensor mean = torch::stable::new_empty(x, {x.size(1)}, kind);
  Tensor variance = torch::stable::new_empty(x, {x.size(1)}, kind);
  Tensor invstd = torch::stable::new_empty(x, {x.size(1)}, kind);
  const BatchNormArgs args{dtype,
                           runs_of(x, last),
                           eps,
                           relu,
                           x.const_data_ptr(),
                           data_or_null(weight),
                           data_or_null(bias),
                           y.mutable_data_ptr(),
                           mean.mutable_data_ptr(),
                           variance.mutable_data_ptr(),
                           invstd.mutable_data_ptr()};
  for_each_range(x.size(1), 0, [&](int64_t begin, int64_t end, void*) {
    FASTPRUNE_PICK(batch_norm)(args, begin, end);
  });
  return {y, mean, variance, invstd};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_grad_cpu(const Tensor& y_grad_in, const Tensor& x_in,
                                                       const std::optional<Tensor>& weight_in,
                                                       const std::optional<Tensor>& bias_in,
                                                       const Tensor& mean, const Tensor& invstd,
                                                       bool relu) {
  const char* op = "batch_norm_grad";
  check_cpu(x_in, op, "x");
  check_cpu(y_grad_in, op, "y_grad");
  check_dim(x_in, 4, op, "x");
  check_dim(y_grad_in, 4, op, "y_grad");
  for (int64_t i = 0; i < 4; ++i) check_size(y_grad_in, i, x_in.size(i), op, "y_grad");
  check_dtype(y_grad_in, x_in.scalar_type(), op, "y_grad");
  const DType dtype = dtype_of(x_in, op, "x");
  check_channels(weight_in, x_in, dtype, op, "weight");
  check_channels(bias_in, x_in, dtype, op, "bias");
  check_channels(mean, x_in, dtype, op, "mean");
  check_channels(invstd, x_in, dtype, op, "invstd");
  const bool last = is_batch_last(x_in);
  const Tensor x = last ? x_in : dense(x_in);
  const Tensor y_grad = is_batch_last(y_grad_in) == last ? (last ? y_grad_in : dense(y_grad_in))
                                                         : copy_in_layout(y_grad_in, last, op);
  const std::optional<Tensor> weight = dense_or_none(weight_in), bias = dense_or_none(bias_in);
  const Tensor means = dense(mean), invstds = dense(invstd);
  Tensor x_grad = new_activations(x, x.size(0), x.size(1), x.size(2), x.size(3), last);
  Tensor weight_grad = torch::stable::new_empty(mean, {x.size(1)});
  Tensor bias_grad = torch::stable::new_empty(mean, {x.size(1)});
  const BatchNormGradArgs args{dtype,
                               runs_of(x, last),
                               relu,
                               x.const_data_ptr(),
                               y_grad.const_data_ptr(),
                               data_or_null(weight),
                               data_or_null(bias),
                               means.const_data_ptr(),
                               invstds.const_data_ptr(),
                               x_grad.mutable_data_ptr(),
                               weight_grad.mutable_data_ptr(),
                               bias_grad.mutable_data_ptr()};
  for_each_range(x.size(1), 0, [&](int64_t begin, int64_t end, void*) {
    FASTPRUNE_PICK(batch_norm_grad)(args, begin, end);
  });
  return {x_grad, weight_grad, bias_grad};
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def(
      "batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool relu) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_grad(Tensor y_grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor invstd, bool relu) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&fastprune::batch_norm_cpu));
  m.impl("batch_norm_grad", TORCH_BOX(&fastprune::batch_norm_grad_cpu));
}
