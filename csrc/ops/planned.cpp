// The ops that take a plan instead of a raw pattern: what eager calls use. `version` counts the
// weight's changes in place, -1 when that is unknown; `layout` is one of ops/product.h;
// `tf32` allows GPUs to round the factors of float32 products, as torch's flag does.
#include <vector>

#include "ops/conv_products.h"
#include "ops/masked_linear.h"

namespace fastprune {

Layout check_layout(int64_t layout, const char* op) {
  STD_TORCH_CHECK(layout >= 0 && layout <= 2, op, ": layout: expected 0, 1 or 2, got ", layout);
  return static_cast<Layout>(layout);
}

void check_residual(const std::optional<Tensor>& residual, const std::vector<int64_t>& sizes,
                    const Tensor& x, const char* op) {
  if (!residual.has_value()) return;
  check_same_device(*residual, x, op, "residual", "x");
  check_dtype(*residual, x.scalar_type(), op, "residual");
  check_dim(*residual, static_cast<int64_t>(sizes.size()), op, "residual");
  for (size_t i = 0; i < sizes.size(); ++i) {
    check_size(*residual, static_cast<int64_t>(i), sizes[i], op, "residual");
  }
}

namespace {

// A plan's side of a product; holds what must outlive it.
struct Planned {
  std::shared_ptr<Plan> plan;
  std::optional<Tensor> contiguous;
  Shared values;
  ProductWeight weight;

  // For a linear product, which asks the plan for the form of the weight that it reads.
  Planned(int64_t id, const PatternShape& shape, const Tensor& dense_weight, int64_t version,
          const char* op)
      : plan(find_plan(id, shape, op)), contiguous(dense(dense_weight)) {
    // A copy lives elsewhere at every call: its values are read anew.
    const bool same = contiguous->const_data_ptr() == dense_weight.const_data_ptr();
    weight = ProductWeight{PatternView{}, nullptr, plan.get(), &*contiguous, same ? version : -1};
  }
  Planned(const Planned&) = delete;

  Planned(int64_t id, const PatternShape& shape, bool transposed, const Tensor* dense_weight,
          int64_t version, const char* op)
      : plan(find_plan(id, shape, op)) {
    weight.pattern = transposed ? plan->transposed() : plan->forward();
    if (dense_weight != nullptr) {
      const Tensor contiguous = dense(*dense_weight);
      // A copy lives elsewhere at every call: its values are read anew.
      const bool same = contiguous.const_data_ptr() == dense_weight->const_data_ptr();
      values = plan->values(transposed, contiguous, same ? version : -1, op);
      weight.values = values->as<void>();
    } else {
      weight.values = nullptr;
    }
    weight.plan = plan.get();
  }
};

Tensor planned_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      int64_t plan, int64_t version, const std::optional<Tensor>& residual,
                      bool relu, int64_t layout, bool) {
  const char* op = "planned_linear";
  const MaskedLinearCall call = validate_masked_linear(x, "x", weight, 1, 1, false, op);
  const Planned planned(plan, call.shape, weight, version, op);
  check_residual(residual, {call.batch, call.shape.rows}, x, op);
  return linear_product(planned.weight, false, call.dtype, x,
                        Epilogue{checked_bias(bias, call.shape.rows, x, op), residual, relu},
                        check_layout(layout, op));
}

Tensor planned_linear_input_grad(const Tensor& grad, const Tensor& weight, int64_t plan,
                                 int64_t version, bool) {
  const char* op = "planned_linear_input_grad";
  const MaskedLinearCall call = validate_masked_linear(grad, "grad", weight, 1, 1, true, op);
  const Planned planned(plan, call.shape, weight, version, op);
  return linear_product(planned.weight, true, call.dtype, grad,
                        Epilogue{std::nullopt, std::nullopt, false}, Layout::like_input);
}

Tensor planned_linear_weight_grad(const Tensor& grad, const Tensor& x, int64_t plan, bool) {
  const char* op = "planned_linear_weight_grad";
  check_cpu(grad, op, "grad");
  check_cpu(x, op, "x");
  check_dim(grad, 2, op, "grad");
  check_dim(x, 2, op, "x");
  check_dtype(grad, x.scalar_type(), op, "grad");
  check_size(grad, 0, x.size(0), op, "grad");
  const Planned planned(plan, PatternShape{grad.size(1), 1, x.size(1), 1, 1, 1}, false, nullptr, -1,
                        op);
  return linear_weight_grad(planned.weight, dtype_of(x, op, "x"), grad, x);
}

MaskedConv2dCall conv_call(const Tensor& typed, Pair x_sizes, Pair weight_sizes,
                           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation, int64_t groups, const char* op) {
  return validate_masked_conv2d(typed, x_sizes, weight_sizes, stride, padding, dilation, groups, 1,
                                1, op);
}

Tensor planned_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      int64_t plan, int64_t version, std::vector<int64_t> stride,
                      std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                      const std::optional<Tensor>& residual, bool relu, int64_t layout) {
  const char* op = "planned_conv2d";
  check_cpu(x, op, "x");
  check_cpu(weight, op, "weight");
  check_dtype(weight, x.scalar_type(), op, "weight");
  const MaskedConv2dCall c =
      conv_call(x, x.sizes(), weight.sizes(), stride, padding, dilation, groups, op);
  const Planned planned(plan, c.shape, false, &weight, version, op);
  check_residual(residual, {c.batch, c.shape.rows, c.out_height, c.out_width}, x, op);
  return conv_forward(c, planned.weight, x,
                      Epilogue{checked_bias(bias, c.shape.rows, x, op), residual, relu},
                      check_layout(layout, op));
}

Tensor planned_conv2d_input_grad(const Tensor& grad, const Tensor& weight, int64_t plan,
                                 int64_t version, std::vector<int64_t> x_sizes,
                                 std::vector<int64_t> stride, std::vector<int64_t> padding,
                                 std::vector<int64_t> dilation, int64_t groups) {
  const char* op = "planned_conv2d_input_grad";
  check_cpu(weight, op, "weight");
  check_dtype(weight, grad.scalar_type(), op, "weight");
  const MaskedConv2dCall c =
      conv_call(grad, x_sizes, weight.sizes(), stride, padding, dilation, groups, op);
  check_output_grad(grad, c, op);
  const Planned planned(plan, c.shape, true, &weight, version, op);
  return conv_input_grad(c, planned.weight, grad, Layout::like_input);
}

Tensor planned_conv2d_weight_grad(const Tensor& grad, const Tensor& x, int64_t plan,
                                  std::vector<int64_t> weight_sizes, std::vector<int64_t> stride,
                                  std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                  int64_t groups) {
  const char* op = "planned_conv2d_weight_grad";
  check_cpu(x, op, "x");
  check_dtype(grad, x.scalar_type(), op, "grad");
  const MaskedConv2dCall c =
      conv_call(x, x.sizes(), weight_sizes, stride, padding, dilation, groups, op);
  check_output_grad(grad, c, op);
  const Planned planned(plan, c.shape, false, nullptr, -1, op);
  return conv_weight_grad(c, planned.weight, grad, x);
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def(
      "planned_linear(Tensor x, Tensor weight, Tensor? bias, int plan, int version, "
      "Tensor? residual, bool relu, int layout, bool tf32=False) -> Tensor");
  m.def(
      "planned_linear_input_grad(Tensor grad, Tensor weight, int plan, int version, "
      "bool tf32=False) -> Tensor");
  m.def("planned_linear_weight_grad(Tensor grad, Tensor x, int plan, bool tf32=False) -> Tensor");
  m.def(
      "planned_conv2d(Tensor x, Tensor weight, Tensor? bias, int plan, int version, int[] stride, "
      "int[] padding, int[] dilation, int groups, Tensor? residual, bool relu, int layout) "
      "-> Tensor");
  m.def(
      "planned_conv2d_input_grad(Tensor grad, Tensor weight, int plan, int version, "
      "int[] x_sizes, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor");
  m.def(
      "planned_conv2d_weight_grad(Tensor grad, Tensor x, int plan, int[] weight_sizes, "
      "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("planned_linear", TORCH_BOX(&fastprune::planned_linear));
  m.impl("planned_linear_input_grad", TORCH_BOX(&fastprune::planned_linear_input_grad));
  m.impl("planned_linear_weight_grad", TORCH_BOX(&fastprune::planned_linear_weight_grad));
  m.impl("planned_conv2d", TORCH_BOX(&fastprune::planned_conv2d));
  m.impl("planned_conv2d_input_grad", TORCH_BOX(&fastprune::planned_conv2d_input_grad));
  m.impl("planned_conv2d_weight_grad", TORCH_BOX(&fastprune::planned_conv2d_weight_grad));
}
