// Moving activations between their tensors and the panels: widening, narrowing, what is fused into
// the way out.
#pragma once

#include "kernels/cpu/scalar_types.h"
#include "kernels/cpu/simd.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// A vector of n <= W widened elements, zeros behind them.
template <typename S>
inline Vec<Accumulator<S>> load_widened(const S* p, int n) {
  using T = Accumulator<S>;
  constexpr int W = kLanes<T>;
  if constexpr (sizeof(S) == sizeof(T)) {
    return n == W ? load(reinterpret_cast<const T*>(p))
                  : load_part(reinterpret_cast<const T*>(p), n);
  } else {
    alignas(kVectorBytes) T lanes[W];
    if (n == W) {
      for (int j = 0; j < W; ++j) lanes[j] = widen(p[j]);
    } else {
      for (int j = 0; j < W; ++j) lanes[j] = j < n ? widen(p[j]) : T(0);
    }
    return load(lanes);
  }
}

template <typename S>
inline void store_narrowed(S* p, Vec<Accumulator<S>> v, int n) {
  using T = Accumulator<S>;
  constexpr int W = kLanes<T>;
  if constexpr (sizeof(S) == sizeof(T)) {
    if (n == W) {
      store(reinterpret_cast<T*>(p), v);
    } else {
      store_part(reinterpret_cast<T*>(p), v, n);
    }
  } else {
    alignas(kVectorBytes) T lanes[W];
    store(lanes, v);
    if (n == W) {
      for (int j = 0; j < W; ++j) p[j] = narrow<S>(lanes[j]);
    } else {
      for (int j = 0; j < n; ++j) p[j] = narrow<S>(lanes[j]);
    }
  }
}

// One output element, finished: rounded, then the residual added and rounded, then ReLU, as the
// separate layers would.
template <typename S>
inline S finish(Accumulator<S> sum, const S* residual, bool relu) {
  using T = Accumulator<S>;
  S y = narrow<S>(sum);
  if (residual != nullptr) y = narrow<S>(widen(y) + widen(*residual));
  if (relu) {
    const T v = widen(y);
    y = narrow<S>(v < T(0) ? T(0) : v);  // a NaN stays
  }
  return y;
}

// n elements from a vector to consecutive places of the target.
template <typename S>
inline void finish_vector(Vec<Accumulator<S>> sum, S* to, const S* residual, bool relu, int n) {
  using T = Accumulator<S>;
  constexpr int W = kLanes<T>;
  if constexpr (sizeof(S) == sizeof(T)) {
    if (residual != nullptr) sum += load_widened(residual, n);
    if (relu) sum = sum < Vec<T>{} ? Vec<T>{} : sum;
    store_narrowed(to, sum, n);
    return;
  }
  alignas(kVectorBytes) T lanes[W];
  store(lanes, sum);
  for (int j = 0; j < n; ++j) {
    to[j] = finish<S>(lanes[j], residual == nullptr ? nullptr : residual + j, relu);
  }
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
