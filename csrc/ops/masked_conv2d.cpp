#include "ops/masked_conv2d.h"

#include <vector>

#include "kernels/cpu/masked_conv2d.h"

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

namespace {

// The taps of a grid, and the memory behind them.
struct Taps {
  std::vector<int64_t> y, x;
  std::vector<uint8_t> live;
};

// The grid of the forward product and of the weight gradient: the output's points.
ConvGrid output_grid(const MaskedConv2dCall& c, Taps* taps) {
  for (int64_t ky = 0; ky < c.kernel_height; ++ky) {
    for (int64_t kx = 0; kx < c.kernel_width; ++kx) {
      taps->y.push_back(ky * c.geometry.dilation[0] - c.geometry.padding[0]);
      taps->x.push_back(kx * c.geometry.dilation[1] - c.geometry.padding[1]);
      taps->live.push_back(1);
    }
  }
  ConvGrid g{c.batch,        c.out_height,         c.out_width,          c.height,
             c.width,        c.geometry.stride[0], c.geometry.stride[1], c.kernel_height,
             c.kernel_width, taps->y.data(),       taps->x.data(),       taps->live.data()};
  const bool pointwise = c.shape.taps == 1 && g.step_y == 1 && g.step_x == 1 &&
                         c.geometry.padding[0] == 0 && c.geometry.padding[1] == 0;
  if (pointwise) {  // one long row per image: the tiles' copies are whole vectors
    g.width *= g.height;
    g.source_width *= g.source_height;
    g.height = g.source_height = 1;
  }
  return g;
}

// The inputs whose coordinates leave the residue (py, px) modulo the stride, and the taps that
// reach them (the others are not live).
void residue_grid(const MaskedConv2dCall& c, int64_t py, int64_t px, Taps* taps, ConvGrid* grid) {
  const int64_t *stride = c.geometry.stride, *pad = c.geometry.padding,
                *dilation = c.geometry.dilation;
  for (int64_t ky = 0; ky < c.kernel_height; ++ky) {
    for (int64_t kx = 0; kx < c.kernel_width; ++kx) {
      const int64_t y = py + pad[0] - ky * dilation[0], x = px + pad[1] - kx * dilation[1];
      const bool live = y % stride[0] == 0 && x % stride[1] == 0;
      taps->y.push_back(y / stride[0]);
      taps->x.push_back(x / stride[1]);
      taps->live.push_back(live ? 1 : 0);
    }
  }
  *grid = ConvGrid{c.batch,
                   (c.height - py + stride[0] - 1) / stride[0],
                   (c.width - px + stride[1] - 1) / stride[1],
                   c.out_height,
                   c.out_width,
                   1,
                   1,
                   c.kernel_height,
                   c.kernel_width,
                   taps->y.data(),
                   taps->x.data(),
                   taps->live.data()};
}

void multiply(MaskedConv2dArgs args) {
  if (args.pattern.rows == 0 || args.grid.points() == 0) return;
  const Scratch offset(args.pattern.nnz * 2);
  const bool strips =
      FASTPRUNE_PICK(strip_offsets)(args.grid, args.pattern, args.dtype, offset.as<uint16_t>());
  args.strip_offset = strips ? offset.as<uint16_t>() : nullptr;
  const Cuts cuts =
      cut_product(FASTPRUNE_PICK(masked_conv2d_items)(args.grid, args.pattern, args.dtype, strips),
                  args.pattern.rows);
  const int64_t scratch = FASTPRUNE_PICK(masked_conv2d_scratch)(args.grid, args.pattern, args.dtype,
                                                                strips, cuts.rows_per_part());
  for_each_cut(cuts, scratch,
               [&](int64_t begin, int64_t end, int64_t row_begin, int64_t row_end, void* memory) {
                 FASTPRUNE_PICK(masked_conv2d)(args, begin, end, row_begin, row_end, memory);
               });
}

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
  const std::optional<Tensor> bias = checked_bias(bias_in, c.shape.rows, x_in.scalar_type(), op);
  const Tensor x = dense(x_in), weight = dense(weight_in);
  const Tensor values = forward_values(pattern, weight, op);
  Tensor y = torch::stable::new_empty(x, {c.batch, c.shape.rows, c.out_height, c.out_width});
  Taps taps;
  const ConvGrid grid = output_grid(c, &taps);
  multiply(MaskedConv2dArgs{pattern, c.dtype, grid, ConvTarget{grid.height, grid.width, 0, 0, 1, 1},
                            x.const_data_ptr(), values.const_data_ptr(), nullptr,
                            bias.has_value() ? bias->const_data_ptr() : nullptr,
                            y.mutable_data_ptr()});
  return y;
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
  check_dim(grad_in, 4, op, "grad");
  check_size(grad_in, 0, c.batch, op, "grad");
  check_size(grad_in, 1, c.shape.rows, op, "grad");
  check_size(grad_in, 2, c.out_height, op, "grad");
  check_size(grad_in, 3, c.out_width, op, "grad");
  const PatternView forward = checked_pattern(row_ptr, offset, c.shape, false, op);
  const PatternView pattern =
      checked_pattern(transposed_row_ptr, transposed_offset, c.shape, true, op);
  const Tensor grad = dense(grad_in), weight = dense(weight_in);
  const Tensor values = transposed_values(forward, pattern, weight, op);
  Tensor x_grad = torch::stable::new_empty(grad, {c.batch, c.channels, c.height, c.width});
  const int64_t residues = c.geometry.stride[0] * c.geometry.stride[1];
  // At stride 1 there is one residue and every tap reaches it; otherwise each residue's product
  // reads the entries of its own taps only.
  const bool split = residues > 1;
  const int64_t bounds = pattern.blocks() * pattern.rows + 1;
  const Scratch kept_bounds(split ? bounds * 8 : 0), kept_offset(split ? pattern.nnz * 2 : 0);
  const Scratch kept_values(split ? pattern.nnz * 8 : 0);
  for (int64_t py = 0; py < c.geometry.stride[0] && py < c.height; ++py) {
    for (int64_t px = 0; px < c.geometry.stride[1] && px < c.width; ++px) {
      Taps taps;
      ConvGrid grid{};
      PatternView part = pattern;
      const void* part_values = values.const_data_ptr();
      residue_grid(c, py, px, &taps, &grid);
      if (split) {
        part.row_ptr = kept_bounds.as<int64_t>();
        part.offset = kept_offset.as<int16_t>();
        part.nnz = FASTPRUNE_PICK(filter_taps)(
            pattern, c.dtype, part_values, taps.live.data(),
            PatternBuffers{kept_bounds.as<int64_t>(), kept_offset.as<int16_t>()},
            kept_values.as<void>());
        part_values = kept_values.as<void>();
      }
      multiply(MaskedConv2dArgs{
          part, c.dtype, grid,
          ConvTarget{c.height, c.width, py, px, c.geometry.stride[0], c.geometry.stride[1]},
          grad.const_data_ptr(), part_values, nullptr, nullptr, x_grad.mutable_data_ptr()});
    }
  }
  return x_grad;
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
  check_dim(grad_in, 4, op, "grad");
  check_size(grad_in, 0, c.batch, op, "grad");
  check_size(grad_in, 1, c.shape.rows, op, "grad");
  check_size(grad_in, 2, c.out_height, op, "grad");
  check_size(grad_in, 3, c.out_width, op, "grad");
  const PatternView pattern = checked_pattern(row_ptr, offset, c.shape, false, op);
  const Tensor grad = dense(grad_in), x = dense(x_in);
  const Tensor values = torch::stable::new_zeros(x, {pattern.nnz}, accumulator_type(c.dtype));
  Taps taps;
  MaskedConv2dWeightGradArgs args{pattern,
                                  c.dtype,
                                  output_grid(c, &taps),
                                  grad.const_data_ptr(),
                                  x.const_data_ptr(),
                                  nullptr,
                                  values.mutable_data_ptr()};
  const Scratch strip_offset(pattern.nnz * 2);
  const bool strips =
      FASTPRUNE_PICK(strip_offsets)(args.grid, pattern, c.dtype, strip_offset.as<uint16_t>());
  args.strip_offset = strips ? strip_offset.as<uint16_t>() : nullptr;
  const Cuts cuts = cut_rows(pattern.rows);
  const int64_t scratch = FASTPRUNE_PICK(masked_conv2d_scratch)(args.grid, pattern, c.dtype, strips,
                                                                cuts.rows_per_part());
  for_each_cut(cuts, scratch,
               [&](int64_t, int64_t, int64_t row_begin, int64_t row_end, void* memory) {
                 FASTPRUNE_PICK(masked_conv2d_weight_grad)(args, row_begin, row_end, memory);
               });
  Tensor weight_grad =
      torch::stable::new_empty(x, {c.shape.rows, c.shape.depth, c.kernel_height, c.kernel_width});
  scatter_to_dense(pattern, c.dtype, values, weight_grad);
  return weight_grad;
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
