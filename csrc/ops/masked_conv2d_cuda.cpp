#include "ops/masked_conv2d_cuda.h"

#include <array>
#include <numeric>

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

// The numbers of one axis: of x, of the kernel, of y.
struct AxisSizes {
  int64_t in, taps, out, stride, padding, dilation;
};
AxisSizes axis_sizes(const MaskedConv2dCall& c, int axis) {
  const ConvGeometry& g = c.geometry;
  return AxisSizes{axis == 0 ? c.height : c.width,
                   axis == 0 ? c.kernel_height : c.kernel_width,
                   axis == 0 ? c.out_height : c.out_width,
                   g.stride[axis],
                   g.padding[axis],
                   g.dilation[axis]};
}

TapAxis tap_axis(const AxisSizes& s, bool transposed) {
  TapAxis axis;
  axis.taps = s.taps;
  if (!transposed) {
    axis.step = s.dilation;
    axis.grid_step = s.stride;
    return axis;
  }
  // Position k meets the pixels of one residue: k * dilation - padding, modulo the stride.
  const int64_t common = std::gcd(s.dilation, s.stride), distinct = s.stride / common;
  axis.classes = distinct < s.taps ? distinct : s.taps;
  axis.step = s.dilation / common;
  axis.reversed = true;
  return axis;
}

std::vector<ConvAxisPart> axis_parts(const AxisSizes& s, const TapAxis& axis, bool transposed) {
  if (!transposed) return {ConvAxisPart{0, -s.padding, s.out, 0, 1}};
  std::vector<ConvAxisPart> parts;
  for (int64_t k = 0; k < axis.classes; ++k) {
    const int64_t meets = k * s.dilation - s.padding;
    const int64_t residue = (meets % s.stride + s.stride) % s.stride;
    if (residue >= s.in) continue;
    parts.push_back(ConvAxisPart{k, (residue - meets) / s.stride,
                                 (s.in - residue + s.stride - 1) / s.stride, residue, s.stride});
  }
  return parts;
}

// A pointwise product is one long row of pixels per image.
MaskedConv2dCall flattened(const MaskedConv2dCall& given) {
  MaskedConv2dCall c = given;
  const ConvGeometry& g = c.geometry;
  if (c.shape.taps == 1 && g.stride[0] == 1 && g.stride[1] == 1 && g.padding[0] == 0 &&
      g.padding[1] == 0) {
    c.width = c.out_width = c.height * c.width;
    c.height = c.out_height = 1;
  }
  return c;
}

}  // namespace

ConvPanelWeight prepare_conv2d(const CudaCall& call, const MaskedConv2dCall& given,
                               const PatternView& pattern, bool transposed,
                               const PatternView* match, const Tensor& weight, const char* op) {
  const MaskedConv2dCall c = flattened(given);
  const AxisSizes sizes[2] = {axis_sizes(c, 0), axis_sizes(c, 1)};
  const TapAxis axes[2] = {tap_axis(sizes[0], transposed), tap_axis(sizes[1], transposed)};
  ConvPanelWeight made{};
  made.y = axis_parts(sizes[0], axes[0], transposed);
  made.x = axis_parts(sizes[1], axes[1], transposed);
  made.covers =
      !transposed || (axes[0].classes == sizes[0].stride && axes[1].classes == sizes[1].stride);
  int64_t height = 1, width = 1, least = made.y.empty() ? 1 : made.y[0].points;
  for (const ConvAxisPart& part : made.y) {
    height = part.points > height ? part.points : height;
    least = part.points < least ? part.points : least;
  }
  for (const ConvAxisPart& part : made.x) width = part.points > width ? part.points : width;
  made.tile = conv_tile(pattern, axes[0], axes[1], c.dtype, c.batch < 1 ? 1 : c.batch, height,
                        width, least, call.limits());
  made.panel = prepare_panel(call, pattern, transposed, match, weight, made.tile.layout, op);
  return made;
}

Tensor conv2d_product(const CudaCall& call, const MaskedConv2dCall& given,
                      const ConvPanelWeight& weight, bool transposed, const Tensor& source_in,
                      const Epilogue& epilogue, const char* op) {
  const MaskedConv2dCall c = flattened(given);
  const PatternView& p = weight.panel.pattern;
  const Tensor source = dense(source_in);
  const std::array<int64_t, 4> sizes{given.batch, p.rows,
                                     transposed ? given.height : given.out_height,
                                     transposed ? given.width : given.out_width};
  Tensor target = weight.covers ? torch::stable::new_empty(source, sizes)
                                : torch::stable::new_zeros(source, sizes);
  std::optional<Tensor> residual = epilogue.residual;
  if (residual.has_value()) residual = dense(*residual);
  PanelConvArgs args{p.rows,
                     p.groups,
                     p.depth,
                     p.block_depth,
                     p.blocks(),
                     c.dtype,
                     c.batch,
                     transposed ? c.out_height : c.height,
                     transposed ? c.out_width : c.width,
                     transposed ? c.height : c.out_height,
                     transposed ? c.width : c.out_width,
                     source.const_data_ptr(),
                     {},
                     {},
                     weight.panel.view(),
                     weight.tile,
                     epilogue.bias.has_value() ? epilogue.bias->const_data_ptr() : nullptr,
                     residual.has_value() ? residual->const_data_ptr() : nullptr,
                     epilogue.relu,
                     target.mutable_data_ptr()};
  for (const ConvAxisPart& y : weight.y) {
    for (const ConvAxisPart& x : weight.x) {
      args.y = y;
      args.x = x;
      check_launch(masked_conv2d_panel(args, call.limits(), call.stream()), op);
    }
  }
  return target;
}

Tensor conv2d_weight_grad(const CudaCall& call, const MaskedConv2dCall& c,
                          const PatternView& pattern, const Tensor& grad, const Tensor& x,
                          const char* op) {
  using torch::stable::detail::from;
  const ConvGeometry& g = c.geometry;
  // Only the sizes of the weight are read.
  const Tensor weight =
      torch::stable::new_empty(x, {c.shape.rows, c.shape.depth, c.kernel_height, c.kernel_width});
  const auto pair = [](const int64_t* values) {
    return from(std::vector<int64_t>{values[0], values[1]});
  };
  const bool wanted[3] = {false, true, false};
  std::array<StableIValue, 11> stack{from(grad),
                                     from(x),
                                     from(weight),
                                     from(std::nullopt),
                                     pair(g.stride),
                                     pair(g.padding),
                                     pair(g.dilation),
                                     from(false),
                                     from(std::vector<int64_t>{0, 0}),
                                     from(g.groups),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted, 3))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  // The other two come back undefined, and are released here.
  for (int i : {0, 2}) static_cast<void>(torch::stable::detail::to<Tensor>(stack[i]));
  Tensor out = dense(torch::stable::detail::to<Tensor>(stack[1]));
  keep_entries(call, pattern, out, op);
  return out;
}

namespace {

Tensor masked_conv2d_cuda(const Tensor& x, const Tensor& weight,
                          const std::optional<Tensor>& bias_in, const Tensor& row_ptr,
                          const Tensor& offset, const Tensor&, const Tensor&, int64_t block_depth,
                          int64_t transposed_block_depth, std::vector<int64_t> stride,
                          std::vector<int64_t> padding, std::vector<int64_t> dilation,
                          int64_t groups, bool) {
  const char* op = "masked_conv2d";
  check_same_device(weight, x, op, "weight", "x");
  check_dtype(weight, x.scalar_type(), op, "weight");
  const MaskedConv2dCall c =
      validate_masked_conv2d(x, x.sizes(), weight.sizes(), stride, padding, dilation, groups,
                             block_depth, transposed_block_depth, op);
  const PatternView pattern = validate_pattern(row_ptr, offset, x, c.shape, false, op);
  const CudaCall call(x, op);
  const std::optional<Tensor> bias = checked_bias(bias_in, c.shape.rows, x, op);
  const ConvPanelWeight prepared = prepare_conv2d(call, c, pattern, false, nullptr, weight, op);
  return conv2d_product(call, c, prepared, false, x, Epilogue{bias, std::nullopt, false}, op);
}

Tensor input_grad_cuda(const Tensor& grad, const Tensor& weight, const Tensor& row_ptr,
                       const Tensor& offset, const Tensor& transposed_row_ptr,
                       const Tensor& transposed_offset, int64_t block_depth,
                       int64_t transposed_block_depth, std::vector<int64_t> x_sizes,
                       std::vector<int64_t> stride, std::vector<int64_t> padding,
                       std::vector<int64_t> dilation, int64_t groups) {
  const char* op = "masked_conv2d_input_grad";
  check_same_device(weight, grad, op, "weight", "grad");
  check_dtype(weight, grad.scalar_type(), op, "weight");
  const MaskedConv2dCall c =
      validate_masked_conv2d(grad, x_sizes, weight.sizes(), stride, padding, dilation, groups,
                             block_depth, transposed_block_depth, op);
  check_output_grad(grad, c, op);
  const PatternView forward = validate_pattern(row_ptr, offset, grad, c.shape, false, op);
  const PatternView pattern =
      validate_pattern(transposed_row_ptr, transposed_offset, grad, c.shape, true, op);
  const CudaCall call(grad, op);
  const ConvPanelWeight prepared = prepare_conv2d(call, c, pattern, true, &forward, weight, op);
  return conv2d_product(call, c, prepared, true, grad, Epilogue{std::nullopt, std::nullopt, false},
                        op);
}

Tensor weight_grad_cuda(const Tensor& grad, const Tensor& x, const Tensor& row_ptr,
                        const Tensor& offset, int64_t block_depth,
                        std::vector<int64_t> weight_sizes, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation,
                        int64_t groups) {
  const char* op = "masked_conv2d_weight_grad";
  check_same_device(grad, x, op, "grad", "x");
  check_dtype(grad, x.scalar_type(), op, "grad");
  const MaskedConv2dCall c = validate_masked_conv2d(x, x.sizes(), weight_sizes, stride, padding,
                                                    dilation, groups, block_depth, 1, op);
  check_output_grad(grad, c, op);
  const PatternView pattern = validate_pattern(row_ptr, offset, x, c.shape, false, op);
  const CudaCall call(x, op);
  return conv2d_weight_grad(call, c, pattern, grad, x, op);
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE

FASTPRUNE_CUDA_IMPL(m) {
  using namespace fastprune::FASTPRUNE_CUDA_NAMESPACE;
  m.impl("masked_conv2d", TORCH_BOX(&masked_conv2d_cuda));
  m.impl("masked_conv2d_input_grad", TORCH_BOX(&input_grad_cuda));
  m.impl("masked_conv2d_weight_grad", TORCH_BOX(&weight_grad_cuda));
}
