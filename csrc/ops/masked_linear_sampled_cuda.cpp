#include "ops/masked_linear_sampled_cuda.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

// Batch entries whose rearranged copies are in memory at once.
constexpr int64_t kChunk = 4096;
static_assert(kChunk % kSampledSlice == 0);

SampledIndex view_of(const std::vector<Tensor>& index, const SampledShape& shape,
                     int64_t* of_chunk) {
  auto* places = static_cast<int64_t*>(const_cast<void*>(index[2].const_data_ptr()));
  return SampledIndex{static_cast<int32_t*>(const_cast<void*>(index[0].const_data_ptr())),
                      static_cast<uint4*>(const_cast<void*>(index[1].const_data_ptr())), places,
                      places + shape.panels + 1, of_chunk};
}

// A matrix cut into slices, `rows` of it at a time.
class Slices {
 public:
  Slices(const Tensor& matrix, int64_t rows, const char* op)
      : matrix_(matrix),
        to_(torch::stable::new_empty(
            matrix, {checked_product(sampled_slices(rows) * kSampledSlice, matrix.size(1), op)})) {}

  const float* write(const CudaCall& call, int64_t first, int64_t rows, const char* op) {
    const int64_t stride = matrix_.stride(0);
    const auto* from = static_cast<const float*>(matrix_.const_data_ptr()) + first * stride;
    auto* to = static_cast<float*>(to_.mutable_data_ptr());
    check_launch(
        write_slices(SlicesArgs{from, stride, matrix_.stride(1), rows, matrix_.size(1), to},
                     call.stream()),
        op);
    return to;
  }

 private:
  const Tensor& matrix_;
  Tensor to_;
};

}  // namespace

std::vector<Tensor> new_sampled_index(const SampledShape& shape, const Tensor& like,
                                      const char* op) {
  return {torch::stable::new_empty(like, {shape.units}, ScalarType::Int),
          torch::stable::new_empty(like, {checked_product(4, shape.units, op)}, ScalarType::Int),
          torch::stable::new_empty(like, {2 * shape.panels + 1}, ScalarType::Long)};
}

void fill_sampled_index(const CudaCall& call, const BitMatrix& bits, const SampledShape& shape,
                        const std::vector<Tensor>& index, const char* op) {
  const Tensor of_chunk = torch::stable::new_empty(
      index[0], {checked_product(shape.panels, shape.row_chunks, op)}, ScalarType::Long);
  check_launch(
      build_sampled_index(bits, shape,
                          view_of(index, shape, static_cast<int64_t*>(of_chunk.mutable_data_ptr())),
                          call.limits(), call.stream()),
      op);
}

Tensor sampled_linear_weight_grad(const CudaCall& call, const SampledShape& shape,
                                  const std::vector<Tensor>& index, const Tensor& grad,
                                  const Tensor& x, const char* op) {
  Tensor out = torch::stable::new_empty(x, {shape.rows, shape.cols});
  const int64_t bytes = checked_product(checked_product(shape.rows, shape.cols, op), 4, op);
  if (bytes == 0) return out;
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  check_launch(cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), call.stream()), op);
  const int64_t batch = x.size(0), chunk = batch < kChunk ? batch : kChunk;
  Slices x_slices(x, chunk, op), grad_slices(grad, chunk, op);
  for (int64_t n = 0; n < batch; n += chunk) {
    const int64_t rows = batch - n < chunk ? batch - n : chunk;
    const float* x_here = x_slices.write(call, n, rows, op);
    const float* grad_here = grad_slices.write(call, n, rows, op);
    check_launch(
        sampled_weight_grad(SampledArgs{shape, view_of(index, shape, nullptr), sampled_slices(rows),
                                        x_here, grad_here, n > 0, to},
                            call.stream()),
        op);
  }
  return out;
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
