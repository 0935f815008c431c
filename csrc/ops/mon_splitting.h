// What one call of mon_splitting says, checked; for every device.
#pragma once

#include <string>
#include <vector>

#include "ops/mon_activation.h"
#include "ops/pattern.h"

namespace fastprune {

struct MonSplittingCall {
  DType dtype;
  int64_t n, batch;
  MonActivation activation;
  PatternShape pair, single;  // of A, and of the one sparse matrix; rows = 0 where not given
};

// Sizes, dtypes, devices, options. Not what is in the patterns, nor how a dense matrix is packed.
// pair: row_ptr, offset and values of A, then of -A^T; single: of one more matrix.
MonSplittingCall validate_mon_splitting(
    const Tensor& bias, const std::optional<Tensor>& slope, const std::optional<Tensor>& matrix,
    const std::optional<Tensor>& resolvent, const std::vector<Tensor>& pair,
    const std::vector<Tensor>& single, torch::headeronly::IntHeaderOnlyArrayRef blocks,
    const std::string& activation, double alpha, double tol, int64_t max_iter, const char* op);

// alpha, tol and max_iter, which every solve has.
void check_mon_options(double alpha, double tol, int64_t max_iter, const char* op);

}  // namespace fastprune
