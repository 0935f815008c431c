// The forms of a linear weight on a GPU, as a plan keeps them.
#pragma once

#include "kernels/cuda/masked_linear_bitmap.h"
#include "kernels/cuda/masked_linear_deltas.h"
#include "ops/device_plan.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// The weight of one call. transposed: as the input gradient reads it.
struct LinearSource {
  DevicePlan& plan;
  bool transposed;
  DType dtype;
  const Tensor& weight;  // dense, contiguous
  int64_t version;
  const CudaCall& call;
  const char* op;

  int64_t rows() const { return transposed ? plan.bits().cols : plan.bits().rows; }
  int64_t cols() const { return transposed ? plan.bits().rows : plan.bits().cols; }
  // Of the dense weight, from one row (column) of what is read to the next.
  int64_t row_stride() const { return transposed ? 1 : plan.bits().cols; }
  int64_t col_stride() const { return transposed ? plan.bits().cols : 1; }
};

// `tensors` holds the memory behind the views.
struct DeltasWeight {
  FormTensors tensors;
  DeltasView view;
};
DeltasWeight deltas_weight(const LinearSource& source);

struct TilesWeight {
  FormTensors tensors;
  TilesView view;
};
TilesWeight tiles_weight(const LinearSource& source);

// The dense weight with exact zeros where it is absent; never transposed.
Tensor masked_weight(const LinearSource& source);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
