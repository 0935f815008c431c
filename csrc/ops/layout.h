// Layouts of activations: contiguous (batch, channel, y, x), or with the batch innermost.
#pragma once

#include "ops/common.h"

namespace fastprune {

// True for a 4-d tensor stored (channel, y, x, batch) without gaps, and not also contiguous.
bool is_batch_last(const Tensor& t);

// An uninitialized tensor of these sizes.
Tensor new_activations(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w,
                       bool batch_last);

// A copy of a 4-d floating tensor in the other layout, or as asked.
Tensor copy_in_layout(const Tensor& x, bool batch_last, const char* op);

}  // namespace fastprune
