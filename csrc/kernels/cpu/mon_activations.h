// The nonlinearities of monotone operator networks on vectors, and their proximal operators.
#pragma once

namespace fastprune {

enum class MonActivation : int { relu, tanh, sigmoid, softplus, identity };

}  // namespace fastprune

// The vector math is for kernel files; others need the names only.
#if defined(FASTPRUNE_ISA)
#include "kernels/cpu/simd.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

template <typename T>
using Int = Vec<typename SignedOf<sizeof(T)>::type>;

template <typename T>
struct MathConstants;
template <>
struct MathConstants<float> {
  static constexpr int kMantissa = 23;
  static constexpr int32_t kOne = 0x3f800000, kSign = INT32_MIN;
  static constexpr float kRound = 0x1.8p23f;  // x + kRound has the integer nearest to x at its end
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kExpHighest = 89.0f, kExpLowest = -104.0f;  // infinity and 0 beyond
  static constexpr float kTanhIsOne = 10.0f;
  static constexpr float kStep = 0x1p-13f;  // the error after a Newton step is about its square
  static constexpr int kExpTerms = 6, kLogTerms = 6;
};
template <>
struct MathConstants<double> {
  static constexpr int kMantissa = 52;
  static constexpr int64_t kOne = 0x3ff0000000000000, kSign = INT64_MIN;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;
  static constexpr double kExpHighest = 710.0, kExpLowest = -746.0;
  static constexpr double kTanhIsOne = 20.0;
  static constexpr double kStep = 0x1p-27;
  static constexpr int kExpTerms = 12, kLogTerms = 10;
};

// Comparisons keep x where it is NaN.
template <typename T>
inline Vec<T> at_most(Vec<T> x, T bound) {
  return x > bound ? Vec<T>{} + bound : x;
}
template <typename T>
inline Vec<T> at_least(Vec<T> x, T bound) {
  return x < bound ? Vec<T>{} + bound : x;
}
template <typename T>
inline Vec<T> sign_bit(Vec<T> x) {
  return (Vec<T>)((Int<T>)x & MathConstants<T>::kSign);
}
template <typename T>
inline Vec<T> magnitude_of(Vec<T> x) {
  return (Vec<T>)((Int<T>)x & ~MathConstants<T>::kSign);
}
template <typename T>
inline Vec<T> with_sign(Vec<T> positive, Vec<T> sign) {
  return (Vec<T>)((Int<T>)positive | (Int<T>)sign);
}

// e^x = 2^whole (1 + rest), |whole ln 2 - x| <= ln 2 / 2. rest is Taylor's series, to r^7 / 7! in
// float and r^13 / 13! in double: what is left out is below 2^-27 and 2^-57.
template <typename T>
inline void split_exp(Vec<T> x, Vec<T>& whole, Vec<T>& rest) {
  using C = MathConstants<T>;
  whole = (x * T(1.4426950408889634) + C::kRound) - C::kRound;
  const Vec<T> r = (x - whole * C::kLn2High) - whole * C::kLn2Low;
  static constexpr double kTerms[12] = {
      1.0 / 2,     1.0 / 6,      1.0 / 24,      1.0 / 120,      1.0 / 720,       1.0 / 5040,
      1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  Vec<T> sum = Vec<T>{} + static_cast<T>(kTerms[C::kExpTerms - 1]);
#pragma GCC unroll 16
  for (int i = C::kExpTerms - 2; i >= 0; --i) sum = sum * r + static_cast<T>(kTerms[i]);
  rest = r * r * sum + r;
}
// 2^n for an integer n between the smallest and the largest normal exponent.
template <typename T>
inline Vec<T> power_of_two(Vec<T> n) {
  using C = MathConstants<T>;
  return (Vec<T>)(((Int<T>)(n + C::kRound) << C::kMantissa) + C::kOne);
}

// Overflows to infinity, underflows through the subnormal numbers.
template <typename T>
inline Vec<T> exp_of(Vec<T> x) {
  using C = MathConstants<T>;
  Vec<T> whole, rest;
  split_exp<T>(at_least<T>(at_most<T>(x, C::kExpHighest), C::kExpLowest), whole, rest);
  // In two factors: the power itself may be out of range where the result is not.
  const Vec<T> half = (whole * T(0.5) + C::kRound) - C::kRound;
  return (rest + T(1)) * power_of_two<T>(half) * power_of_two<T>(whole - half);
}

// (e^2|x| - 1) / (e^2|x| + 1), the numerator without cancellation.
template <typename T>
inline Vec<T> tanh_of(Vec<T> x) {
  Vec<T> whole, rest;
  split_exp<T>(at_most<T>(magnitude_of<T>(x), MathConstants<T>::kTanhIsOne) * T(2), whole, rest);
  const Vec<T> power = power_of_two<T>(whole);
  const Vec<T> less_one = power * rest + (power - T(1));
  return with_sign<T>(less_one / (less_one + T(2)), sign_bit<T>(x));
}

template <typename T>
inline Vec<T> sigmoid_of(Vec<T> x) {
  const Vec<T> e = exp_of<T>(-magnitude_of<T>(x));
  return (x < T(0) ? e : Vec<T>{} + T(1)) / (e + T(1));
}

// log(1 + e) for 0 <= e <= 1. With s = (m - 1) / (m + 1), log m = 2 (s + s^3/3 + s^5/5 + ...);
// m = 1 + e, or half of it, is between 0.7 and 1.42, so that |s| < 0.1716.
template <typename T>
inline Vec<T> log_one_plus(Vec<T> e) {
  constexpr T kRootLessOne = T(0.41421356237309503), kLn2 = T(0.69314718055994531);
  const auto high = e > kRootLessOne;
  const Vec<T> s = (high ? e - T(1) : e) / (high ? e + T(3) : e + T(2));
  const Vec<T> z = s * s;
  constexpr int kTerms = MathConstants<T>::kLogTerms;
  Vec<T> sum = Vec<T>{} + T(2) / (2 * kTerms - 1);
#pragma GCC unroll 16
  for (int i = kTerms - 2; i >= 1; --i) sum = sum * z + T(2) / (2 * i + 1);
  const Vec<T> log = s * z * sum + s * T(2);
  return high ? log + kLn2 : log;
}

// log(1 + e^x), without torch's shortcut of x itself above 20.
template <typename T>
inline Vec<T> softplus_of(Vec<T> x) {
  return log_one_plus<T>(exp_of<T>(-magnitude_of<T>(x))) + at_least<T>(x, T(0));
}

template <MonActivation A, typename T>
inline Vec<T> activate(Vec<T> x) {
  if constexpr (A == MonActivation::relu) {
    return at_least<T>(x, T(0));
  } else if constexpr (A == MonActivation::tanh) {
    return tanh_of<T>(x);
  } else if constexpr (A == MonActivation::sigmoid) {
    return sigmoid_of<T>(x);
  } else if constexpr (A == MonActivation::softplus) {
    return softplus_of<T>(x);
  } else {
    return x;
  }
}

template <typename T>
inline bool any_lane_above(Vec<T> x, Vec<T> bound) {
  const Int<T> above = x > bound;
  typename SignedOf<sizeof(T)>::type any = 0;
  for (int j = 0; j < kLanes<T>; ++j) any |= above[j];
  return any != 0;
}
// y - step(y) until no step is larger than kStep (1 + |y|). Steps that are NaN, at infinities, are
// left out.
template <typename T, typename Step>
inline Vec<T> newton(Vec<T> y, Step step) {
  for (int i = 0; i < 64; ++i) {
    const Vec<T> given = step(y), move = given == given ? given : Vec<T>{};
    y -= move;
    const Vec<T> bound = (magnitude_of<T>(y) + T(1)) * MathConstants<T>::kStep;
    if (!any_lane_above<T>(magnitude_of<T>(move), bound)) break;
  }
  return y;
}

// The y of c tanh(y) + d y = x, d > 0, c + d > 0. Both sides are odd. At y >= 0 the left side is
// concave for c > 0, convex otherwise, so that Newton's method goes monotonically from the best of
// two bounds of the solution, which are what the left side is near 0 and far from it.
template <typename T>
inline Vec<T> solve_tanh_sum(Vec<T> x, T c, T d) {
  const Vec<T> w = magnitude_of<T>(x), near = w / (c + d), far = (w - c) / d;
  const Vec<T> start = c > 0 ? (far > near ? far : near) : (far < near ? far : near);
  const Vec<T> y = newton<T>(start, [&](Vec<T> v) {
    const Vec<T> t = tanh_of<T>(v);
    return (t * c + v * d - w) / ((T(1) - t * t) * c + d);
  });
  return with_sign<T>(magnitude_of<T>(y), sign_bit<T>(x));
}

// The z of (1 - alpha) z + alpha activation^-1(z) = x: with z = activation(y), the y of
// (1 - alpha) activation(y) + alpha y = x. alpha > 0; at 1 it is the activation, for ReLU and the
// identity always.
template <MonActivation A, typename T>
inline Vec<T> proximal(Vec<T> x, T alpha) {
  constexpr bool kScales = A == MonActivation::relu || A == MonActivation::identity;
  if (kScales || alpha == T(1)) return activate<A, T>(x);
  const T c = T(1) - alpha;
  if constexpr (A == MonActivation::tanh) {
    return tanh_of<T>(solve_tanh_sum<T>(x, c, alpha));
  } else if constexpr (A == MonActivation::sigmoid) {
    // sigmoid(2 t) = (1 + tanh(t)) / 2.
    const Vec<T> t = solve_tanh_sum<T>(x - c / 2, c / 2, alpha * 2);
    return sigmoid_of<T>(t * T(2));
  } else if constexpr (A == MonActivation::softplus) {
    // Convex for alpha < 1, else concave: monotone as above.
    const Vec<T> far = x / alpha;
    const Vec<T> start = c > 0 ? (far < x ? far : x) : (far > x ? far : x);
    const Vec<T> y = newton<T>(start, [&](Vec<T> v) {
      return (softplus_of<T>(v) * c + v * alpha - x) / (sigmoid_of<T>(v) * c + alpha);
    });
    return softplus_of<T>(y);
  } else {
    return activate<A, T>(x);
  }
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
#endif
