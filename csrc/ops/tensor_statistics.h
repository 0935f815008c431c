// tensor_statistics: the checks that every device entry shares, and the Gini index's driver.
#pragma once

#include <vector>

#include "kernels/cpu/tensor_statistics.h"
#include "ops/common.h"

namespace fastprune {

constexpr const char* kStatisticsOp = "tensor_statistics";

// A checked call: tensors contiguous, pointers into them.
struct StatisticsCall {
  std::vector<Tensor> held;  // what the pointers below point into
  std::vector<StatisticsTensor> tensors;
  int64_t elements;
};

// Throws unless the arguments fit; only the elements are left to check. An empty `within` means
// not given.
StatisticsCall validate_tensor_statistics(const std::vector<Tensor>& tensors,
                                          const std::vector<Tensor>& within,
                                          const std::vector<double>& p);

// The Gini index of the magnitudes of some tensors taken together. part: their statistics.
double gini_index(const StatisticsTensor* tensors, int64_t n, const StatisticsPart& part);

}  // namespace fastprune
