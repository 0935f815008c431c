// Equilibria of fully connected monotone operator layers on the GPU.
#include "kernels/cuda/mon_splitting.h"

#include <tuple>
#include <vector>

#include "ops/cuda_op.h"
#include "ops/mon_splitting.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr const char* kOp = "mon_splitting";

// (n, n), row by row.
const void* square(const std::optional<Tensor>& t, int64_t n, const char* name) {
  if (!t.has_value()) return nullptr;
  check_dim(*t, 2, kOp, name);
  check_size(*t, 0, n, kOp, name);
  check_size(*t, 1, n, kOp, name);
  return t->const_data_ptr();
}

// Three tensors from `first` on.
MonSparse sparse(const std::vector<Tensor>& tensors, size_t first, const PatternShape& shape,
                 bool transposed, const Tensor& bias) {
  const PatternView view =
      validate_pattern(tensors[first], tensors[first + 1], bias, shape, transposed, kOp);
  return MonSparse{view.row_ptr, view.offset,      tensors[first + 2].const_data_ptr(),
                   view.nnz,     view.block_depth, view.blocks()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mon_splitting_cuda(
    const Tensor& bias_in, const std::optional<Tensor>& slope_in,
    const std::optional<Tensor>& matrix_in, const std::optional<Tensor>& resolvent_in,
    const std::vector<Tensor>& pair, const std::vector<Tensor>& single,
    torch::headeronly::IntHeaderOnlyArrayRef blocks, double diagonal, std::string activation,
    double alpha, double tol, int64_t max_iter, bool per_sample) {
  const MonSplittingCall c =
      validate_mon_splitting(bias_in, slope_in, matrix_in, resolvent_in, pair, single, blocks,
                             activation, alpha, tol, max_iter, kOp);
  const auto dense_of = [](const std::optional<Tensor>& t) {
    return t.has_value() ? std::optional<Tensor>(dense(*t)) : std::nullopt;
  };
  const auto all_dense = [](const std::vector<Tensor>& tensors) {
    std::vector<Tensor> made;
    for (const Tensor& t : tensors) made.push_back(dense(t));
    return made;
  };
  const CudaCall call(bias_in, kOp);
  const Tensor bias = dense(bias_in);
  const std::optional<Tensor> slope = dense_of(slope_in), matrix = dense_of(matrix_in),
                              resolvent = dense_of(resolvent_in);
  const std::vector<Tensor> factors = all_dense(pair), one = all_dense(single);
  Tensor out = torch::stable::empty_like(bias), z = torch::stable::empty_like(bias);
  const int64_t count[1] = {c.batch};
  const auto of_samples = [&](ScalarType type) {
    return torch::stable::new_empty(bias, {count, per_sample ? size_t{1} : size_t{0}}, type);
  };
  Tensor iterations = of_samples(ScalarType::Long), residual = of_samples(ScalarType::Double);

  MonSplittingArgs args{};
  args.dtype = c.dtype;
  args.rule = {c.activation, slope.has_value(), resolvent.has_value(), per_sample, alpha, tol};
  args.n = c.n;
  args.batch = c.batch;
  args.max_iter = max_iter;
  args.matrix = square(matrix, c.n, "matrix");
  args.resolvent = square(resolvent, c.n, "resolvent");
  if (!factors.empty()) {
    args.down = sparse(factors, 0, c.pair, false, bias);
    args.up = sparse(factors, 3, c.pair, true, bias);
  }
  if (!one.empty()) args.single = sparse(one, 0, c.single, false, bias);
  args.diagonal = diagonal;
  args.bias = bias.const_data_ptr();
  args.slope = slope.has_value() ? slope->const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  args.z = z.mutable_data_ptr();
  args.iterations = static_cast<int64_t*>(iterations.mutable_data_ptr());
  args.residual = static_cast<double*>(residual.mutable_data_ptr());
  args.fault = call.fault();
  Tensor scratch = torch::stable::new_empty(bias, {mon_splitting_scratch(args, call.limits())},
                                            ScalarType::Byte);
  check_launch(mon_splitting(args, scratch.mutable_data_ptr(), call.limits(), call.stream()), kOp);
  return {out, z, iterations, residual};
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE

FASTPRUNE_CUDA_IMPL(m) {
  m.impl("mon_splitting", TORCH_BOX(&fastprune::FASTPRUNE_CUDA_NAMESPACE::mon_splitting_cuda));
}
