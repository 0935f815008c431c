// Equilibria of fully connected monotone operator layers, and their adjoint equations.
#include "ops/common.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def(
      "mon_splitting(Tensor bias, Tensor? slope, Tensor? matrix, Tensor? resolvent, Tensor[] pair, "
      "Tensor[] single, int[] blocks, float diagonal, str activation, float alpha, float tol, int "
      "max_iter, bool per_sample) -> (Tensor, Tensor, Tensor, Tensor)");
}
