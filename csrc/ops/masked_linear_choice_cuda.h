// Which form of a linear weight a product on a GPU reads.
#pragma once

#include <cstdint>

#include "kernels/cpu/scalar_types.h"
#include "ops/cuda_form.h"

namespace fastprune {

// tf32: float32 products may round their factors to tf32, as torch's flag allows.
struct CudaProduct {
  DType dtype;
  bool tf32;
  int64_t batch, rows, cols, nnz;
};

// Whether a form can serve a product at all; what the GPU's shared memory has to say is asked
// apart.
bool cuda_form_serves(CudaForm form, const CudaProduct& product);

// The wanted form where it serves, else the table's. Never `automatic`.
CudaForm choose_cuda_form(const CudaProduct& product);

// Whether the gradient of the weight is computed at the mask alone; else torch's dense product is,
// and masked.
bool sample_weight_grad(const CudaProduct& product);

}  // namespace fastprune
