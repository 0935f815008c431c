// What every equilibrium solve on the CPU shares: the rule to stop by, and its outcome as tensors.
#pragma once

#include <cmath>

#include "ops/common.h"

namespace fastprune {

// Winston and Kolter's: of the squared norms of the change and of the new state.
inline double relative_residual(double change, double norm) {
  return std::sqrt(change) / (1e-6 + std::sqrt(norm));
}

// How many steps are sure to be needed, as far as a linearly converging residual tells: half of
// what the last rate predicts, so that few are ever made in vain.
class StepForecast {
 public:
  explicit StepForecast(double tol) : tol_(tol) {}
  void saw(double residual) {
    before_ = last_;
    last_ = residual;
  }
  int64_t steps(int64_t most) const {
    if (!(before_ > 0) || !(last_ > 0)) return 1;
    if (last_ >= before_ || tol_ <= 0) return most;
    const double left = std::log(tol_ / last_) / std::log(last_ / before_) / 2;
    return left < 1 ? 1 : left < static_cast<double>(most) ? static_cast<int64_t>(left) : most;
  }

 private:
  double tol_, before_ = 0, last_ = 0;
};

// iterations (int64) and residual (float64): of the batch, or one per sample.
class MonVerdict {
 public:
  MonVerdict(const Tensor& like, int64_t batch, bool per_sample)
      : iterations(make(like, batch, per_sample, ScalarType::Long)),
        residual(make(like, batch, per_sample, ScalarType::Double)),
        size_(per_sample ? batch : 1) {}
  int64_t* counts() { return static_cast<int64_t*>(iterations.mutable_data_ptr()); }
  double* residuals() { return static_cast<double*>(residual.mutable_data_ptr()); }
  // An empty state is in equilibrium after its first step.
  void nothing_to_do() {
    for (int64_t i = 0; i < size_; ++i) {
      counts()[i] = 1;
      residuals()[i] = 0;
    }
  }

  Tensor iterations, residual;

 private:
  static Tensor make(const Tensor& like, int64_t batch, bool per_sample, ScalarType type) {
    return per_sample ? torch::stable::new_empty(like, {batch}, type)
                      : torch::stable::new_empty(like, {}, type);
  }
  int64_t size_;
};

}  // namespace fastprune
