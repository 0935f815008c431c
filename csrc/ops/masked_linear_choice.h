// Which product a linear layer runs, where there is a choice.
#pragma once

#include "kernels/cpu/masked_linear.h"
#include "ops/product.h"

namespace fastprune {

// Computes y by a form of the weight that suits dtype, batch, density and processor better than
// values in the pattern's order, or does nothing and returns false. The choice depends on those and
// on what x and the weight hold, never on threads. `weight` comes from a plan; args as for the
// product, but for pattern and values.
bool multiply_by_form(const LinearWeight& weight, bool transposed, const MaskedLinearArgs& args);

}  // namespace fastprune
