#include "ops/masked_conv2d.h"

#include <vector>

#include "ops/conv_products.h"

namespace fastprune {

MaskedConv2dCall validate_masked_conv2d(const Tensor& typed, Pair x_sizes, Pair weight_sizes,
                                        Pair stride, Pair padding, Pair dilation, int64_t groups,
                                        int64_t block_depth, int64_t transposed_block_depth,
                                        const char* op) {
  STD_TORCH_CHECK(x_sizes.size() == 4, op, ": x: expected 4 dimensions, got ", x_sizes.size());
  STD_TORCH_CHECK(weight_sizes.size() == 4, op, ": weight: expected 4 dimensions, got ",
                  weight_sizes.size());
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                  ": stride, padding, dilation: expected two values each");
  MaskedConv2dCall c{};
  c.dtype = dtype_of(typed, op, "x");
  for (int i = 0; i < 2; ++i) {
    c.geometry.stride[i] = stride[i];
    c.geometry.padding[i] = padding[i];
    c.geometry.dilation[i] = dilation[i];
    STD_TORCH_CHECK(stride[i] >= 1 && stride[i] < (int64_t{1} << 31), op,
                    ": stride: expected at least 1, got ", stride[i]);
    STD_TORCH_CHECK(padding[i] >= 0 && padding[i] < (int64_t{1} << 31), op,
                    ": padding: expected at least 0, got ", padding[i]);
    STD_TORCH_CHECK(dilation[i] >= 1 && dilation[i] < (int64_t{1} << 31), op,
                    ": dilation: expected at least 1, got ", dilation[i]);
  }
  c.geometry.groups = groups;
  STD_TORCH_CHECK(groups >= 1 && weight_sizes[0] % groups == 0, op,
                  ": groups: expected a positive divisor of the ", weight_sizes[0],
                  " output channels, got ", groups);
  c.batch = x_sizes[0];
  c.channels = x_sizes[1];
  c.height = x_sizes[2];
  c.width = x_sizes[3];
  c.kernel_height = weight_sizes[2];
  c.kernel_width = weight_sizes[3];
  STD_TORCH_CHECK(c.kernel_height >= 1 && c.kernel_width >= 1 && c.kernel_height < 32768 &&
                      c.kernel_width < 32768,
                  op, ": weight: expected kernel sizes of at least 1, got ", c.kernel_height, " x ",
                  c.kernel_width);
  STD_TORCH_CHECK(c.channels == weight_sizes[1] * groups, op, ": x: expected ",
                  weight_sizes[1] * groups, " channels, got ", c.channels);
  const int64_t span_y = c.geometry.dilation[0] * (c.kernel_height - 1) + 1;
  const int64_t span_x = c.geometry.dilation[1] * (c.kernel_width - 1) + 1;
  const int64_t room_y = c.height + 2 * c.geometry.padding[0] - span_y;
  const int64_t room_x = c.width + 2 * c.geometry.padding[1] - span_x;
  STD_TORCH_CHECK(room_y >= 0 && room_x >= 0 && c.height >= 1 && c.width >= 1, op,
                  ": x: expected a padded input no smaller than the dilated kernel of ", span_y,
                  " x ", span_x, ", got ", c.height, " x ", c.width, " before padding");
  c.out_height = room_y / c.geometry.stride[0] + 1;
  c.out_width = room_x / c.geometry.stride[1] + 1;
  c.shape = PatternShape{weight_sizes[0], groups,
                         weight_sizes[1], c.kernel_height * c.kernel_width,
                         block_depth,     transposed_block_depth};
  return c;
}

void check_output_grad(const Tensor& grad, const MaskedConv2dCall& c, const char* op) {
  check_dim(grad, 4, op, "grad");
  check_size(grad, 0, c.batch, op, "grad");
  check_size(grad, 1, c.shape.rows, op, "grad");
  check_size(grad, 2, c.out_height, op, "grad");
  check_size(grad, 3, c.out_width, op, "grad");
}

namespace {

Tensor masked_conv2d_cpu(const Tensor& x_in, const Tensor& weight_in,
                         const std::optional<Tensor>& bias_in, const Tensor& row_ptr,
                         const Tensor& offset, const Tensor&, const Tensor&, int64_t block_depth,
                         int64_t transposed_block_depth, std::vector<int64_t> stride,
                         std::vector<int64_t> padding, std::vector<int64_t> dilation,
                         int64_t groups, bool) {
  const char* op = "masked_conv2d";
  check_cpu(x_in, op, "x");
  check_cpu(weight_in, op, "weight");
  check_dtype(weight_in, x_in.scalar_type(), op, "weight");
  const MaskedConv2dCall c =
      validate_masked_conv2d(x_in, x_in.sizes(), weight_in.sizes(), stride, padding, dilation,
                             groups, block_depth, transposed_block_depth, op);
  const PatternView pattern = checked_pattern(row_ptr, offset, c.shape, false, op);
  const std::optional<Tensor> bias = checked_bias(bias_in, c.shape.rows, x_in, op);
  const Tensor values = forward_values(pattern, dense(weight_in), op);
  return conv_forward(c, ConvWeight{pattern, values.const_data_ptr(), nullptr}, x_in,
                      Epilogue{bias, std::nullopt, false}, Layout::contiguous);
}

Tensor input_grad_cpu(const Tensor& grad_in, const Tensor& weight_in, const Tensor& row_ptr,
                      const Tensor& offset, const Tensor& transposed_row_ptr,
                      const Tensor& transposed_offset, int64_t block_depth,
                      int64_t transposed_block_depth, std::vector<int64_t> x_sizes,
                      std::vector<int64_t> stride, std::vector<int64_t> padding,
                      std::vector<int64_t> dilation, int64_t groups) {
  const char* op = "masked_conv2d_input_grad";
  check_cpu(grad_in, op, "grad");
  check_cpu(weight_in, op, "weight");
  check_dtype(weight_in, grad_in.scalar_type(), op, "weight");
  const MaskedConv2dCall c =
      validate_masked_conv2d(grad_in, x_sizes, weight_in.sizes(), stride, padding, dilation, groups,
                             block_depth, transposed_block_depth, op);
  check_output_grad(grad_in, c, op);
  const PatternView forward = checked_pattern(row_ptr, offset, c.shape, false, op);
  const PatternView pattern =
      checked_pattern(transposed_row_ptr, transposed_offset, c.shape, true, op);
  const Tensor values = transposed_values(forward, pattern, dense(weight_in), op);
  return conv_input_grad(c, ConvWeight{pattern, values.const_data_ptr(), nullptr}, grad_in,
                         Layout::contiguous);
}

Tensor weight_grad_cpu(const Tensor& grad_in, const Tensor& x_in, const Tensor& row_ptr,
                       const Tensor& offset, int64_t block_depth, std::vector<int64_t> weight_sizes,
                       std::vector<int64_t> stride, std::vector<int64_t> padding,
                       std::vector<int64_t> dilation, int64_t groups) {
  const char* op = "masked_conv2d_weight_grad";
  check_cpu(grad_in, op, "grad");
  check_cpu(x_in, op, "x");
  check_dtype(grad_in, x_in.scalar_type(), op, "grad");
  const MaskedConv2dCall c = validate_masked_conv2d(x_in, x_in.sizes(), weight_sizes, stride,
                                                    padding, dilation, groups, block_depth, 1, op);
  check_output_grad(grad_in, c, op);
  const PatternView pattern = checked_pattern(row_ptr, offset, c.shape, false, op);
  return conv_weight_grad(c, ConvWeight{pattern, nullptr, nullptr}, grad_in, x_in);
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def(
      "masked_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor row_ptr, Tensor offset, "
      "Tensor transposed_row_ptr, Tensor transposed_offset, int block_depth, "
      "int transposed_block_depth, int[] stride, int[] padding, int[] dilation, int groups, "
      "bool dense_weight_grad) -> Tensor");
  m.def(
      "masked_conv2d_input_grad(Tensor grad, Tensor weight, Tensor row_ptr, Tensor offset, "
      "Tensor transposed_row_ptr, Tensor transposed_offset, int block_depth, "
      "int transposed_block_depth, SymInt[] x_sizes, int[] stride, int[] padding, int[] dilation, "
      "int groups) -> Tensor");
  m.def(
      "masked_conv2d_weight_grad(Tensor grad, Tensor x, Tensor row_ptr, Tensor offset, "
      "int block_depth, SymInt[] weight_sizes, int[] stride, int[] padding, int[] dilation, "
      "int groups) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("masked_conv2d", TORCH_BOX(&fastprune::masked_conv2d_cpu));
  m.impl("masked_conv2d_input_grad", TORCH_BOX(&fastprune::input_grad_cpu));
  m.impl("masked_conv2d_weight_grad", TORCH_BOX(&fastprune::weight_grad_cpu));
}
