// What every product is given, whether its op takes a raw pattern or a plan.
#pragma once

#include <optional>
#include <vector>

#include "ops/plan.h"

namespace fastprune {

// What a product reads besides activations. plan: keeps what can be kept between calls; may be
// null. dense, version: the weight behind the values; where given, the product may leave pattern
// and values aside and ask the plan for what it reads.
struct ProductWeight {
  PatternView pattern;
  const void* values;
  Plan* plan;
  const Tensor* dense = nullptr;
  int64_t version = -1;
};
using LinearWeight = ProductWeight;
using ConvWeight = ProductWeight;

// How results are stored: contiguous, or with the batch innermost, as far as the kernel can.
enum class Layout : int64_t { contiguous = 0, like_input = 1, batch_last = 2 };

Layout check_layout(int64_t layout, const char* op);
// A residual against the sizes of the result.
void check_residual(const std::optional<Tensor>& residual, const std::vector<int64_t>& sizes,
                    const Tensor& x, const char* op);

// What inference fuses into a product: the result is rounded, the residual added, ReLU applied.
struct Epilogue {
  std::optional<Tensor> bias;      // accumulator type
  std::optional<Tensor> residual;  // sizes and dtype of the result
  bool relu;
};

}  // namespace fastprune
