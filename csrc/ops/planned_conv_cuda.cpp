// The convolution ops that take a plan, on a GPU (ops/planned.cpp has the others). Results are
// contiguous: `layout` is checked and ignored.
#include "ops/kept_panel.h"
#include "ops/masked_conv2d_cuda.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

// The prepared weight of a call, kept for its geometry.
ConvPanelWeight kept_weight(DevicePlan& plan, const MaskedConv2dCall& c, bool transposed,
                            const Tensor& weight_in, int64_t version, const CudaCall& call,
                            const char* op) {
  const PatternView forward = plan.pattern(false, op);
  const PatternView pattern = transposed ? plan.pattern(true, op) : forward;
  const ConvCut cut = cut_conv2d(call, c, pattern, transposed);
  const Tensor weight = dense(weight_in);
  // A copy of a weight lives elsewhere at every call: its values are read anew.
  if (weight.const_data_ptr() != weight_in.const_data_ptr()) version = -1;
  const ConvGeometry& g = c.geometry;
  FormKey key{CudaForm::panel, transposed, c.dtype, {c.batch, c.height, c.width}};
  for (const int64_t* pair : {g.stride, g.padding, g.dilation}) {
    key.sizes.insert(key.sizes.end(), {pair[0], pair[1]});
  }
  return ConvPanelWeight{kept_panel(plan, key, pattern, transposed ? &forward : nullptr, weight,
                                    version, cut.tile.layout, call, op),
                         cut};
}

MaskedConv2dCall conv_call(const Tensor& typed, Pair x_sizes, Pair weight_sizes,
                           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation, int64_t groups, const char* op) {
  return validate_masked_conv2d(typed, x_sizes, weight_sizes, stride, padding, dilation, groups, 1,
                                1, op);
}

Tensor planned_conv2d_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           int64_t plan_id, int64_t version, std::vector<int64_t> stride,
                           std::vector<int64_t> padding, std::vector<int64_t> dilation,
                           int64_t groups, const std::optional<Tensor>& residual, bool relu,
                           int64_t layout) {
  const char* op = "planned_conv2d";
  check_same_device(weight, x, op, "weight", "x");
  check_dtype(weight, x.scalar_type(), op, "weight");
  const MaskedConv2dCall c =
      conv_call(x, x.sizes(), weight.sizes(), stride, padding, dilation, groups, op);
  check_layout(layout, op);
  const auto plan = find_device_plan(plan_id, c.shape, x, op);
  check_residual(residual, {c.batch, c.shape.rows, c.out_height, c.out_width}, x, op);
  const CudaCall call(x, op);
  const Epilogue epilogue{checked_bias(bias, c.shape.rows, x, op), residual, relu};
  const ConvPanelWeight kept = kept_weight(*plan, c, false, weight, version, call, op);
  return conv2d_product(call, c, kept, false, x, epilogue, op);
}

Tensor planned_conv2d_input_grad_cuda(const Tensor& grad, const Tensor& weight, int64_t plan_id,
                                      int64_t version, std::vector<int64_t> x_sizes,
                                      std::vector<int64_t> stride, std::vector<int64_t> padding,
                                      std::vector<int64_t> dilation, int64_t groups) {
  const char* op = "planned_conv2d_input_grad";
  check_same_device(weight, grad, op, "weight", "grad");
  check_dtype(weight, grad.scalar_type(), op, "weight");
  const MaskedConv2dCall c =
      conv_call(grad, x_sizes, weight.sizes(), stride, padding, dilation, groups, op);
  check_output_grad(grad, c, op);
  const auto plan = find_device_plan(plan_id, c.shape, grad, op);
  const CudaCall call(grad, op);
  const ConvPanelWeight kept = kept_weight(*plan, c, true, weight, version, call, op);
  return conv2d_product(call, c, kept, true, grad, Epilogue{std::nullopt, std::nullopt, false}, op);
}

Tensor planned_conv2d_weight_grad_cuda(const Tensor& grad, const Tensor& x, int64_t plan_id,
                                       std::vector<int64_t> weight_sizes,
                                       std::vector<int64_t> stride, std::vector<int64_t> padding,
                                       std::vector<int64_t> dilation, int64_t groups) {
  const char* op = "planned_conv2d_weight_grad";
  check_same_device(grad, x, op, "grad", "x");
  check_dtype(grad, x.scalar_type(), op, "grad");
  const MaskedConv2dCall c =
      conv_call(x, x.sizes(), weight_sizes, stride, padding, dilation, groups, op);
  check_output_grad(grad, c, op);
  const auto plan = find_device_plan(plan_id, c.shape, x, op);
  const CudaCall call(x, op);
  return conv2d_weight_grad(call, c, plan->pattern(false, op), grad, x, op);
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE

FASTPRUNE_CUDA_IMPL(m) {
  namespace ops = fastprune::FASTPRUNE_CUDA_NAMESPACE;
  m.impl("planned_conv2d", TORCH_BOX(&ops::planned_conv2d_cuda));
  m.impl("planned_conv2d_input_grad", TORCH_BOX(&ops::planned_conv2d_input_grad_cuda));
  m.impl("planned_conv2d_weight_grad", TORCH_BOX(&ops::planned_conv2d_weight_grad_cuda));
}
