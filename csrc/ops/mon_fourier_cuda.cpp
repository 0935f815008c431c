// Equilibria of convolutional monotone operator layers on the GPU, in the Fourier domain.
#include "kernels/cuda/mon_fourier.h"

#include <cmath>
#include <limits>
#include <tuple>

#include "kernels/cpu/mon_fourier.h"
#include "ops/cuda_op.h"
#include "ops/mon_splitting.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr const char* kOp = "mon_splitting_fourier";

DType checked_dtype(const Tensor& t, const char* op, const char* name) {
  const DType dtype = dtype_of(t, op, name);
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, op, ": ", name,
                  ": expected float32 or float64, got dtype ",
                  torch::headeronly::toString(t.scalar_type()));
  return dtype;
}

// Points of a map are counted in 32 bits.
void check_map(int64_t height, int64_t width, const char* op, const char* name) {
  STD_TORCH_CHECK(height > 0 && width > 0, op, ": ", name,
                  ": expected maps of at least 1 x 1, got ", height, " x ", width);
  const int64_t places = checked_product(checked_product(height, width + 1, op), 2, op);
  STD_TORCH_CHECK(places <= std::numeric_limits<int32_t>::max(), op, ": ", name,
                  ": expected maps of fewer than 2^30 points, got ", height, " x ", width);
}

const void* packed_data(const std::optional<Tensor>& t, const Tensor& bias, const char* name) {
  if (!t.has_value()) return nullptr;
  check_same_device(*t, bias, kOp, name, "bias");
  check_dtype(*t, bias.scalar_type(), kOp, name);
  check_dim(*t, 2, kOp, name);
  check_size(*t, 0, fourier_frequencies(bias.size(2), bias.size(3)), kOp, name);
  const int64_t channels = bias.size(1);
  check_size(*t, 1, checked_product(2 * channels, channels, kOp), kOp, name);
  STD_TORCH_CHECK(t->is_contiguous(), kOp, ": ", name, ": expected a contiguous tensor");
  return t->const_data_ptr();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mon_splitting_fourier_cuda(
    const Tensor& bias_in, const std::optional<Tensor>& slope_in, const Tensor& matrix,
    const std::optional<Tensor>& resolvent, int64_t ring, std::string activation, double alpha,
    double tol, int64_t max_iter, bool per_sample) {
  MonFourierArgs args{};
  args.dtype = checked_dtype(bias_in, kOp, "bias");
  check_dim(bias_in, 4, kOp, "bias");
  check_map(bias_in.size(2), bias_in.size(3), kOp, "bias");
  STD_TORCH_CHECK(bias_in.size(1) > 0, kOp, ": bias: expected at least one channel");
  if (slope_in.has_value()) {
    check_same_device(*slope_in, bias_in, kOp, "slope", "bias");
    check_dtype(*slope_in, bias_in.scalar_type(), kOp, "slope");
    check_dim(*slope_in, 4, kOp, "slope");
    for (int64_t i = 0; i < 4; ++i) check_size(*slope_in, i, bias_in.size(i), kOp, "slope");
  }
  STD_TORCH_CHECK(ring >= 0, kOp, ": ring: expected at least 0, got ", ring);
  check_mon_options(alpha, tol, max_iter, kOp);
  const MonActivation kind = mon_activation_of(activation, kOp);
  args.matrix = packed_data(matrix, bias_in, "matrix");
  args.resolvent = packed_data(resolvent, bias_in, "resolvent");

  const CudaCall call(bias_in, kOp);
  const Tensor bias = dense(bias_in);
  std::optional<Tensor> slope = slope_in;
  if (slope.has_value()) slope = dense(*slope);
  Tensor out = torch::stable::empty_like(bias), z = torch::stable::empty_like(bias);
  const int64_t count[1] = {bias.size(0)};
  const auto of_samples = [&](ScalarType type) {
    return torch::stable::new_empty(bias, {count, per_sample ? size_t{1} : size_t{0}}, type);
  };
  Tensor iterations = of_samples(ScalarType::Long), residual = of_samples(ScalarType::Double);
  args.rule = {kind, slope.has_value(), resolvent.has_value(), per_sample, alpha, tol};
  args.batch = bias.size(0);
  args.channels = bias.size(1);
  args.height = bias.size(2);
  args.width = bias.size(3);
  args.ring = ring;
  args.max_iter = max_iter;
  args.bias = bias.const_data_ptr();
  args.slope = slope.has_value() ? slope->const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  args.z = z.mutable_data_ptr();
  args.iterations = static_cast<int64_t*>(iterations.mutable_data_ptr());
  args.residual = static_cast<double*>(residual.mutable_data_ptr());
  Tensor scratch =
      torch::stable::new_empty(bias, {mon_fourier_scratch(args, call.limits())}, ScalarType::Byte);
  check_launch(mon_fourier(args, scratch.mutable_data_ptr(), call.limits(), call.stream()), kOp);
  return {out, z, iterations, residual};
}

Tensor mon_fourier_pack_cuda(const Tensor& matrix_in, int64_t height, int64_t width, bool adjoint) {
  const char* op = "mon_fourier_pack";
  const DType dtype = checked_dtype(matrix_in, op, "matrix");
  check_dim(matrix_in, 4, op, "matrix");
  check_map(height, width, op, "height, width");
  check_size(matrix_in, 0, checked_product(height, width / 2 + 1, op), op, "matrix");
  const int64_t channels = matrix_in.size(1);
  check_size(matrix_in, 2, channels, op, "matrix");
  check_size(matrix_in, 3, 2, op, "matrix");
  const CudaCall call(matrix_in, op);
  const Tensor matrix = dense(matrix_in);
  Tensor packed = torch::stable::new_empty(
      matrix, {fourier_frequencies(height, width), checked_product(2 * channels, channels, op)});
  check_launch(mon_fourier_pack(dtype, channels, height, width, adjoint, matrix.const_data_ptr(),
                                packed.mutable_data_ptr(), call.stream()),
               op);
  return packed;
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE

FASTPRUNE_CUDA_IMPL(m) {
  using namespace fastprune::FASTPRUNE_CUDA_NAMESPACE;
  m.impl("mon_fourier_pack", TORCH_BOX(&mon_fourier_pack_cuda));
  m.impl("mon_splitting_fourier", TORCH_BOX(&mon_splitting_fourier_cuda));
}
