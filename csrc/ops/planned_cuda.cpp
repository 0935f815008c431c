// The linear ops that take a plan, on a GPU (ops/planned.cpp has the others). Results are
// contiguous: `layout` is checked and ignored.
#include <array>

#include "ops/kept_panel.h"
#include "ops/masked_linear_choice_cuda.h"
#include "ops/masked_linear_cuda.h"
#include "ops/masked_linear_forms_cuda.h"
#include "ops/masked_linear_sampled_cuda.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

// y = x W^T, finished.
struct LinearProduct {
  LinearSource source;
  const Tensor& x;  // contiguous
  int64_t batch;
  std::optional<Tensor> bias, residual;  // contiguous
  bool relu;
  bool tf32;

  Finish finish() const {
    return Finish{bias.has_value() ? bias->const_data_ptr() : nullptr,
                  residual.has_value() ? residual->const_data_ptr() : nullptr, relu};
  }
  ExactRows exact() const {
    return ExactRows{source.plan.bits(), source.dtype, source.weight.const_data_ptr(),
                     source.transposed,  batch,        x.const_data_ptr()};
  }
  Tensor new_result() const { return torch::stable::new_empty(x, {batch, source.rows()}); }
};

Tensor by_deltas(const LinearProduct& p) {
  Tensor y = p.new_result();
  const DeltasWeight weight = deltas_weight(p.source);
  check_launch(deltas_product(
                   DeltasArgs{weight.view, p.source.dtype, weight.tensors.values->const_data_ptr(),
                              p.batch, p.x.const_data_ptr(), p.finish(), y.mutable_data_ptr()},
                   p.source.call.limits(), p.source.call.stream()),
               p.source.op);
  return y;
}

Tensor by_tiles(const LinearProduct& p) {
  Tensor y = p.new_result();
  const TilesWeight weight = tiles_weight(p.source);
  const TilesCut cut = tiles_cut(weight.view, p.batch);
  const Tensor partial = torch::stable::new_empty(p.x, {cut.partials}, ScalarType::Float);
  const Tensor flags = torch::stable::new_empty(p.x, {cut.flags}, ScalarType::Int);
  check_launch(
      tiles_product(TilesArgs{weight.view, p.source.dtype, weight.tensors.values->const_data_ptr(),
                              p.exact(), p.finish(), y.mutable_data_ptr(),
                              static_cast<float*>(partial.mutable_data_ptr()),
                              static_cast<uint32_t*>(flags.mutable_data_ptr())},
                    p.source.call.stream()),
      p.source.op);
  return y;
}

// aten::linear, the bias in its epilogue.
Tensor torch_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    const char* op) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STD_TORCH_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION) == 0,
                  op, ": torch's linear product failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Torch multiplies zeros for absent weights: rows of x that are not finite are mended.
Tensor by_dense(const LinearProduct& p) {
  const LinearSource& s = p.source;
  const Tensor weight = masked_weight(s);
  Tensor y = dense(s.transposed ? torch::stable::matmul(p.x, weight)
                                : torch_linear(p.x, weight, p.bias, s.op));
  if (y.numel() == 0) return y;
  const Tensor flags = torch::stable::new_empty(p.x, {p.batch}, ScalarType::Int);
  auto* marks = static_cast<uint32_t*>(flags.mutable_data_ptr());
  const ExactRows exact = p.exact();
  check_launch(find_not_finite(s.dtype, exact.x, p.batch, exact.inputs(), marks, s.call.limits(),
                               s.call.stream()),
               s.op);
  check_launch(mend_product(exact, marks, p.finish(), y.mutable_data_ptr(), s.call.limits(),
                            s.call.stream()),
               s.op);
  return y;
}

// CUDA cores over a panel of activations in shared memory.
Tensor by_panel(const LinearProduct& p) {
  const LinearSource& s = p.source;
  const PatternView forward = s.plan.pattern(false, s.op);
  const PatternView pattern = s.transposed ? s.plan.pattern(true, s.op) : forward;
  const LinearTile tile = linear_tile(pattern, s.dtype, p.batch, s.call.limits());
  const PanelWeight panel =
      kept_panel(s.plan, FormKey{CudaForm::panel, s.transposed, s.dtype, {tile.columns}}, pattern,
                 s.transposed ? &forward : nullptr, s.weight, s.version, tile.layout, s.call, s.op);
  std::optional<Tensor> bias = p.bias;
  if (bias.has_value()) bias = dense(torch::stable::to(*bias, accumulator_type(s.dtype)));
  return linear_product(s.call, LinearPanelWeight{panel, tile}, p.x,
                        Epilogue{bias, p.residual, p.relu}, s.op);
}

Tensor multiply(const LinearProduct& p) {
  const LinearSource& s = p.source;
  if (p.batch == 0 || s.rows() == 0) return p.new_result();
  switch (
      choose_cuda_form(CudaProduct{s.dtype, p.tf32, p.batch, s.rows(), s.cols(), s.plan.nnz()})) {
    case CudaForm::deltas:
      return by_deltas(p);
    case CudaForm::bitmap:
    case CudaForm::tensor_core:
      if (tiles_fit(s.dtype, p.batch, s.call.limits())) return by_tiles(p);
      break;
    case CudaForm::panel:
      return by_panel(p);
    default:
      break;
  }
  return by_dense(p);
}

// A copy of a weight lives elsewhere at every call: its values are read anew.
int64_t version_of(const Tensor& contiguous, const Tensor& given, int64_t version) {
  return contiguous.const_data_ptr() == given.const_data_ptr() ? version : -1;
}

Tensor planned_linear_cuda(const Tensor& x_in, const Tensor& weight_in,
                           const std::optional<Tensor>& bias, int64_t plan_id, int64_t version,
                           const std::optional<Tensor>& residual, bool relu, int64_t layout,
                           bool tf32) {
  const char* op = "planned_linear";
  const MaskedLinearCall c = validate_masked_linear(x_in, "x", weight_in, 1, 1, false, op);
  check_layout(layout, op);
  const auto plan = find_device_plan(plan_id, c.shape, x_in, op);
  check_residual(residual, {c.batch, c.shape.rows}, x_in, op);
  check_bias(bias, c.shape.rows, x_in, op);
  const CudaCall call(x_in, op);
  const Tensor x = dense(x_in), weight = dense(weight_in);
  const auto contiguous = [](const std::optional<Tensor>& t) {
    return t.has_value() ? std::optional<Tensor>(dense(*t)) : std::nullopt;
  };
  return multiply(LinearProduct{
      LinearSource{*plan, false, c.dtype, weight, version_of(weight, weight_in, version), call, op},
      x, c.batch, contiguous(bias), contiguous(residual), relu, tf32});
}

Tensor planned_linear_input_grad_cuda(const Tensor& grad_in, const Tensor& weight_in,
                                      int64_t plan_id, int64_t version, bool tf32) {
  const char* op = "planned_linear_input_grad";
  const MaskedLinearCall c = validate_masked_linear(grad_in, "grad", weight_in, 1, 1, true, op);
  const auto plan = find_device_plan(plan_id, c.shape, grad_in, op);
  const CudaCall call(grad_in, op);
  const Tensor grad = dense(grad_in), weight = dense(weight_in);
  return multiply(LinearProduct{
      LinearSource{*plan, true, c.dtype, weight, version_of(weight, weight_in, version), call, op},
      grad, c.batch, std::nullopt, std::nullopt, false, tf32});
}

Tensor sampled_at(const CudaCall& call, DevicePlan& plan, const Tensor& grad, const Tensor& x,
                  const char* op) {
  const BitMatrix& bits = plan.bits();
  const SampledShape shape = sampled_shape(bits.rows, bits.cols, plan.nnz(), call.limits());
  FormMaker maker;
  maker.structure = [&] { return new_sampled_index(shape, plan.words(), op); };
  maker.fill = [&](const FormTensors& kept) {
    fill_sampled_index(call, bits, shape, kept.structure, op);
  };
  const FormKey key{
      CudaForm::sampled, false, DType::f32, {shape.panel_cols, shape.units_per_group}};
  const FormTensors kept = plan.form(key, plan.words(), 0, call, op, maker);
  return sampled_linear_weight_grad(call, shape, kept.structure, grad, x, op);
}

// At the mask alone, or torch's dense product, then the mask.
Tensor planned_linear_weight_grad_cuda(const Tensor& grad, const Tensor& x, int64_t plan_id,
                                       bool tf32) {
  const char* op = "planned_linear_weight_grad";
  const MaskedLinearCall c = validate_masked_linear_weight_grad(grad, x, 1, op);
  const auto plan = find_device_plan(plan_id, c.shape, x, op);
  const CudaCall call(x, op);
  if (sample_weight_grad(
          CudaProduct{c.dtype, tf32, c.batch, plan->bits().rows, plan->bits().cols, plan->nnz()})) {
    return sampled_at(call, *plan, grad, x, op);
  }
  Tensor weight_grad = dense(torch::stable::matmul(torch::stable::transpose(grad, 0, 1), x));
  check_launch(keep_masked(plan->bits(), c.dtype, weight_grad.const_data_ptr(),
                           weight_grad.mutable_data_ptr(), call.limits(), call.stream()),
               op);
  return weight_grad;
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE

FASTPRUNE_CUDA_IMPL(m) {
  namespace ops = fastprune::FASTPRUNE_CUDA_NAMESPACE;
  m.impl("planned_linear", TORCH_BOX(&ops::planned_linear_cuda));
  m.impl("planned_linear_input_grad", TORCH_BOX(&ops::planned_linear_input_grad_cuda));
  m.impl("planned_linear_weight_grad", TORCH_BOX(&ops::planned_linear_weight_grad_cuda));
}
