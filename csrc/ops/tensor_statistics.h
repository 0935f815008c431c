// tensor_statistics: the checks that every device entry shares, and the Gini index's driver.
#pragma once

#include <algorithm>
#include <cmath>
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

// sum^(1/p) for sum > 0 = m * 2^e, with no intermediate result out of range.
inline double root(double m, int64_t e, double p) {
  int shift = 0;
  const double f = std::frexp(m, &shift);
  e += shift;
  if (p == 1.0) return scale_by(f, e);
  if (p == 2.0)
    return scale_by(std::sqrt(e % 2 == 0 ? f : 2.0 * f), (e - (e % 2 == 0 ? 0 : 1)) / 2);
  if (p == 0.5) return scale_by(f * f, 2 * e);
  // Of moderate numbers what anyone's formula gives, to the bit: an index that decides a count.
  constexpr int64_t kModerate = 30;
  if (e >= -kModerate && e <= kModerate && p >= 0x1p-4) return std::pow(scale_by(f, e), 1.0 / p);
  const double log2 = std::log2(f), n = static_cast<double>(e);
  const double whole = std::rint((log2 + n) / p);
  // The root's own exponent first: what is left is small and loses no bits to it.
  const double rest = (log2 + std::fma(-whole, p, n)) / p;
  return scale_by(std::exp2(rest), static_cast<int64_t>(std::clamp(whole, -1e9, 1e9)));
}

// The Gini index of the magnitudes of some tensors taken together. part: their statistics.
double gini_index(const StatisticsTensor* tensors, int64_t n, const StatisticsPart& part);

}  // namespace fastprune
