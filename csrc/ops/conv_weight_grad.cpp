// The whole weight gradient of a convolution whose activations have the batch innermost.
#include "kernels/cpu/conv_weight_grad.h"

#include "ops/layout.h"
#include "ops/masked_conv2d.h"

namespace fastprune {
namespace {

// Large tiles pack less; the sums of a tile, a vector each, stay within the L2 cache. Smaller ones
// where there would be fewer than threads, or where a group is small.
void choose_tiles(ConvWeightGradArgs* args) {
  const bool few_taps = args->taps() <= 2;
  args->tile_rows = few_taps ? 64 : 32;
  args->tile_channels = few_taps ? 64 : 16;
  while (args->tile_rows > 4 && args->tile_rows / 2 >= args->rows / args->groups) {
    args->tile_rows /= 2;
  }
  while (args->tile_channels > 4 && args->tile_channels / 2 >= args->channels / args->groups) {
    args->tile_channels /= 2;
  }
  const int64_t threads = thread_count();
  const auto few = [&] { return FASTPRUNE_PICK(conv_weight_grad_items)(*args) < threads; };
  while (few() && (args->tile_rows > 4 || args->tile_channels > 4)) {
    int64_t* larger =
        args->tile_rows >= args->tile_channels ? &args->tile_rows : &args->tile_channels;
    *larger /= 2;
  }
}

Tensor conv_weight_grad_cpu(const Tensor& grad_in, const Tensor& x_in, Pair weight_sizes,
                            Pair stride, Pair padding, Pair dilation, int64_t groups) {
  const char* op = "conv_weight_grad";
  check_cpu(grad_in, op, "grad");
  check_cpu(x_in, op, "x");
  check_dim(x_in, 4, op, "x");
  const int64_t sizes[4] = {x_in.size(0), x_in.size(1), x_in.size(2), x_in.size(3)};
  // Blocks play no part; 1 is legal for every shape.
  const MaskedConv2dCall c = validate_masked_conv2d(x_in, Pair(sizes, 4), weight_sizes, stride,
                                                    padding, dilation, groups, 1, 1, op);
  check_output_grad(grad_in, c, op);
  check_dtype(grad_in, x_in.scalar_type(), op, "grad");
  STD_TORCH_CHECK(c.dtype == DType::f32 || c.dtype == DType::f64, op,
                  ": x: expected float32 or float64");
  const auto last = [&](const Tensor& t) {
    return is_batch_last(t) ? t : copy_in_layout(t, true, op);
  };
  const Tensor grad = last(grad_in), x = last(x_in);
  Tensor out =
      torch::stable::new_empty(x, {c.shape.rows, c.shape.depth, c.kernel_height, c.kernel_width});
  ConvWeightGradArgs args{c.dtype,
                          c.batch,
                          c.channels,
                          c.height,
                          c.width,
                          c.shape.rows,
                          c.out_height,
                          c.out_width,
                          c.kernel_height,
                          c.kernel_width,
                          groups,
                          {c.geometry.stride[0], c.geometry.stride[1]},
                          {c.geometry.padding[0], c.geometry.padding[1]},
                          {c.geometry.dilation[0], c.geometry.dilation[1]},
                          grad.const_data_ptr(),
                          x.const_data_ptr(),
                          out.mutable_data_ptr(),
                          16,
                          16};
  choose_tiles(&args);
  for_each_range(FASTPRUNE_PICK(conv_weight_grad_items)(args),
                 FASTPRUNE_PICK(conv_weight_grad_scratch)(args),
                 [&](int64_t begin, int64_t end, void* scratch) {
                   FASTPRUNE_PICK(conv_weight_grad)(args, begin, end, scratch);
                 });
  return out;
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def(
      "conv_weight_grad(Tensor grad, Tensor x, int[] weight_sizes, int[] stride, int[] padding, "
      "int[] dilation, int groups) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("conv_weight_grad", TORCH_BOX(&fastprune::conv_weight_grad_cpu));
}
