// Tables of a two-dimensional Fourier transform for kernels/cpu/mon_fourier.h.
#pragma once

#include <algorithm>
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
  // Odd prime powers are transformed by products with all cosines and sines; so many fit.
  static constexpr int64_t kLargestOdd = 4095;
  static int64_t largest_odd(int64_t length) {
    int64_t largest = 1;
    for (int64_t q : prime_powers(length)) largest = std::max(largest, q % 2 == 0 ? 1 : q);
    return largest;
  }

  // unit: vectors from one element of the line to the next.
  FourierTables(int64_t length, int64_t unit, DType dtype) {
    line_.length = length;
    std::vector<int64_t> factors = prime_powers(length);
    // Element (n mod q for each factor q) is at the sum of (length / q)(n mod q): then the
    // transforms along the factors leave output k, for which the places say the same, at k.
    places_.emplace_back();
    for (int64_t n = 0; n < length; ++n) {
      int64_t place = 0;
      for (int64_t q : factors) place += length / q * (n % q);
      places_[0].push_back(static_cast<int32_t>(place % length * unit));
    }
    // A factor 2 goes with an odd one: one pass over the data less.
    const int64_t twice = factors.size() > 1 && factors[0] == 2 ? 2 : 1;
    if (twice == 2) factors.erase(factors.begin());
    for (size_t i = 0; i < factors.size(); ++i) {
      const int64_t q = factors[i], copies = i == 0 ? twice : 1;
      const std::vector<int64_t> powers = powers_of_generator(q);
      std::vector<int64_t> order(static_cast<size_t>(q));
      for (int64_t t = 0; t < q; ++t) order[t] = t;
      for (size_t t = 0; t < powers.size() / 2; ++t) {
        order[t + 1] = powers[t];
        order[q - 1 - t] = q - powers[t];
      }
      places_.emplace_back();
      for (int64_t base = 0; base < length; base += copies * q) {
        for (int64_t copy = 0; copy < copies; ++copy) {
          for (int64_t t : order) {
            const int64_t place = base + copy * (length / 2) + t * (length / q);
            places_.back().push_back(static_cast<int32_t>(place % length * unit));
          }
        }
      }
      make_table(q, powers, dtype);
      const int64_t vectors = q % 2 == 0 ? 4 * q : 2 * copies * q;
      work_ = work_ > vectors ? work_ : vectors;
      line_.factor[i] = {copies * q, q % 2 == 0 ? 1 : q, !powers.empty(), nullptr, nullptr};
    }
    line_.factors = static_cast<int>(factors.size());
    line_.places = places_[0].data();
    for (size_t i = 0; i < factors.size(); ++i) {
      line_.factor[i].places = places_[i + 1].data();
      line_.factor[i].table = dtype == DType::f64 ? static_cast<const void*>(doubles_[i].data())
                                                  : static_cast<const void*>(floats_[i].data());
    }
  }
  FourierTables(const FourierTables&) = delete;
  FourierTables& operator=(const FourierTables&) = delete;

  const FourierLine& line() const { return line_; }
  int64_t work() const { return work_; }  // vectors

 private:
  static std::vector<int64_t> prime_powers(int64_t length) {
    std::vector<int64_t> factors;
    for (int64_t p = 2, left = length; left > 1; ++p) {
      if (p * p > left) p = left;
      int64_t q = 1;
      for (; left % p == 0; left /= p) q *= p;
      if (q > 1) factors.push_back(q);
    }
    return factors;
  }

  // 1, g, g^2, ... modulo q with g of order q - 1, for primes q = 4 i + 1 above 5; else empty.
  static std::vector<int64_t> powers_of_generator(int64_t q) {
    if (q % 4 != 1 || q <= 5) return {};
    for (int64_t g = 2; g < q; ++g) {
      std::vector<int64_t> powers{1};
      for (int64_t power = g; power > 1; power = power * g % q) powers.push_back(power);
      if (static_cast<int64_t>(powers.size()) == q - 1) return powers;
    }
    return {};  // not a prime
  }

  void make_table(int64_t q, const std::vector<int64_t>& powers, DType dtype) {
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
    } else if (!powers.empty()) {
      const int64_t quarter = q / 4;
      const auto at = [&](int64_t a, int64_t b) { return angle(powers[(a + b) % (q - 1)]); };
      for (int64_t first = 0; first < quarter; first += kFourierSplitBlock) {
        const int64_t last = std::min(first + kFourierSplitBlock, quarter);
        for (int64_t b = 0; b < quarter; ++b) {
          for (double sign : {1.0, -1.0}) {
            for (int64_t a = first; a < last; ++a) {
              table.push_back((std::cos(at(a, b)) + sign * std::cos(at(a, b + quarter))) / 2);
            }
          }
          for (int64_t output : {int64_t{0}, quarter}) {
            for (int64_t input : {int64_t{0}, quarter}) {
              for (int64_t a = first; a < last; ++a) {
                table.push_back(std::sin(at(a + output, b + input)));
              }
            }
          }
        }
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
