// Tables of a two-dimensional Fourier transform for kernels/cpu/mon_fourier.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/cpu/mon_fourier.h"
#include "ops/common.h"

namespace fastprune {

inline void check_real(const Tensor& t, const char* op, const char* name) {
  check_cpu(t, op, name);
  const bool known = t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(known, op, ": ", name, ": expected float32 or float64, got dtype ",
                  torch::headeronly::toString(t.scalar_type()));
}

class FourierTables {
 public:
  // unit: vectors from one element of the line to the next.
  FourierTables(int64_t length, int64_t unit, DType dtype) {
    line_.length = length;
    std::vector<int64_t> factors;
    for (int64_t p = 2, left = length; left > 1; ++p) {
      if (p * p > left) p = left;
      int64_t q = 1;
      for (; left % p == 0; left /= p) q *= p;
      if (q > 1) factors.push_back(q);
    }
    line_.factors = static_cast<int>(factors.size());
    // Element (n mod q for each factor q) is at the sum of (length / q)(n mod q): then the
    // transforms along the factors leave output k, for which the places say the same, at k.
    places_.emplace_back();
    for (int64_t n = 0; n < length; ++n) {
      int64_t place = 0;
      for (int64_t q : factors) place += length / q * (n % q);
      places_[0].push_back(static_cast<int32_t>(place % length * unit));
    }
    for (int64_t q : factors) {
      places_.emplace_back();
      for (int64_t base = 0; base < length; base += q) {
        for (int64_t t = 0; t < q; ++t) {
          places_.back().push_back(static_cast<int32_t>((base + t * (length / q)) % length * unit));
        }
      }
      make_table(q, dtype);
      const int64_t vectors = q % 2 == 0 ? 4 * q : 2 * q;
      work_ = work_ > vectors ? work_ : vectors;
    }
    line_.places = places_[0].data();
    for (size_t i = 0; i < factors.size(); ++i) {
      const void* table = dtype == DType::f64 ? static_cast<const void*>(doubles_[i].data())
                                              : static_cast<const void*>(floats_[i].data());
      line_.factor[i] = {factors[i], places_[i + 1].data(), table};
    }
  }
  FourierTables(const FourierTables&) = delete;
  FourierTables& operator=(const FourierTables&) = delete;

  const FourierLine& line() const { return line_; }
  int64_t work() const { return work_; }  // vectors

 private:
  void make_table(int64_t q, DType dtype) {
    std::vector<double> table;
    // The angle is reduced first: multiples of q leave no rounding.
    const auto angle = [q](int64_t times) {
      return 2 * 3.14159265358979323846 * static_cast<double>(times % q) / static_cast<double>(q);
    };
    const int64_t half = q / 2;
    if (q % 2 == 0) {
      for (int64_t t = 0; t < q; ++t) {
        table.push_back(std::cos(angle(t)));
        table.push_back(-std::sin(angle(t)));
      }
    } else {
      for (int64_t first = 1; first <= half; first += kFourierBlock) {
        const int64_t left = half + 1 - first;
        const int64_t block = left < kFourierBlock ? left : kFourierBlock;
        for (int64_t t = 1; t <= half; ++t) {
          for (int64_t k = 0; k < block; ++k) table.push_back(std::cos(angle((first + k) * t)));
          for (int64_t k = 0; k < block; ++k) table.push_back(std::sin(angle((first + k) * t)));
        }
      }
    }
    floats_.emplace_back();
    if (dtype != DType::f64) floats_.back().assign(table.begin(), table.end());
    doubles_.push_back(std::move(table));
  }

  FourierLine line_{};
  int64_t work_ = 0;
  std::vector<std::vector<int32_t>> places_;
  std::vector<std::vector<float>> floats_;
  std::vector<std::vector<double>> doubles_;
};

}  // namespace fastprune
