// The weight gradient at the mask alone (kernels/cuda/masked_linear_sampled.h), and its index of
// the pattern as tensors.
#pragma once

#include <vector>

#include "kernels/cuda/masked_linear_sampled.h"
#include "ops/cuda_op.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// Memory for the index, uninitialized, where `like` is.
std::vector<Tensor> new_sampled_index(const SampledShape& shape, const Tensor& like,
                                      const char* op);
void fill_sampled_index(const CudaCall& call, const BitMatrix& bits, const SampledShape& shape,
                        const std::vector<Tensor>& index, const char* op);

// Dense, zeros outside of the mask. grad and x: two dimensions, float32, any strides.
Tensor sampled_linear_weight_grad(const CudaCall& call, const SampledShape& shape,
                                  const std::vector<Tensor>& index, const Tensor& grad,
                                  const Tensor& x, const char* op);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
