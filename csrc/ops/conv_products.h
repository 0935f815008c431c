// The three products of a convolution, given a pattern that was checked: what the ops that take raw
// patterns and those that take plans share.
#pragma once

#include "ops/masked_conv2d.h"
#include "ops/product.h"

namespace fastprune {

Tensor conv_forward(const MaskedConv2dCall& c, const ConvWeight& weight, const Tensor& x,
                    const Epilogue& epilogue, Layout layout);
// `weight` in transposed order.
Tensor conv_input_grad(const MaskedConv2dCall& c, const ConvWeight& weight, const Tensor& grad,
                       Layout layout);
// The gradient at the mask, as a dense tensor.
Tensor conv_weight_grad(const MaskedConv2dCall& c, const ConvWeight& weight, const Tensor& grad,
                        const Tensor& x);

// One convolution of stride 1 that runs many times: what it needs is prepared once, and nothing is
// allocated in between.
class ConvProduct {
 public:
  // transposed: the input gradient of the call, `weight` in transposed order. lanes: the batch is
  // innermost where the sizes allow it; batch_last() then says so of source, target and residual.
  // The weight's memory must outlive this, and the number of threads must stay.
  ConvProduct(const MaskedConv2dCall& c, const ConvWeight& weight, bool transposed, bool lanes);
  ~ConvProduct();
  bool batch_last() const;
  // residual: as the target, which it may be, and added to it; or null. On all threads, or as one
  // of thread_count() workers that run at the same time.
  void run(const void* source, void* target, const void* residual,
           std::optional<int64_t> worker = std::nullopt) const;

 private:
  struct Prepared;
  std::unique_ptr<Prepared> prepared_;
};

}  // namespace fastprune
