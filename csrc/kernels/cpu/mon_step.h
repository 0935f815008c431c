// What a splitting step does to a vector of the state, given its product.
#pragma once

#include <cmath>
#include <type_traits>

#include "kernels/cpu/mon_activations.h"
#include "kernels/cpu/mon_splitting.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

template <typename T, bool Resolvent, bool Adjoint, MonActivation A>
struct MonStep {
  // Arrays beside the state; each only where the method and the equation have it.
  struct Beside {
    const T *bias, *scale;
    T* half;  // Peaceman-Rachford: u_half
    const T* rhs;
    T* next_rhs;  // what the resolvent is applied to; may be rhs
  };

  T alpha, keep;  // keep = 1 - alpha

  // The new state at i. sum: bias + W z, or the resolvent applied to rhs. old: z.
  inline Vec<T> operator()(Vec<T> sum, Vec<T> old, const Beside& at, int64_t i) const {
    if constexpr (Resolvent) {
      const Vec<T> half = Adjoint ? load(at.rhs + i) : load(at.half + i);
      const Vec<T> u = T(2) * sum - half;
      const Vec<T> made = proximal_of(u, at, i);
      const Vec<T> next = T(2) * made - u;
      if constexpr (Adjoint) {
        store(at.next_rhs + i, next);
      } else {
        store(at.half + i, next);
        store(at.next_rhs + i, next + alpha * load(at.bias + i));
      }
      return made;
    } else {
      return proximal_of(alpha * sum + keep * old, at, i);
    }
  }

 private:
  inline Vec<T> proximal_of(Vec<T> x, const Beside& at, int64_t i) const {
    if constexpr (!Adjoint) {
      return proximal<A, T>(x, alpha);
    } else if constexpr (Resolvent) {
      return load(at.scale + i) * (x + alpha * load(at.bias + i));
    } else {
      return load(at.scale + i) * x;
    }
  }
};

// f(T{}, whether adjoint, the activation), the latter two as types; the adjoint equation has none.
template <typename F>
inline auto with_equation(const MonSplittingArgs& a, F f) {
  const auto of = [&](auto zero) {
    const auto forward = [&](auto activation) { return f(zero, std::false_type{}, activation); };
    using Activation = MonActivation;
    if (a.slope != nullptr) {
      return f(zero, std::true_type{}, std::integral_constant<Activation, Activation::relu>{});
    }
    switch (a.activation) {
      case Activation::tanh:
        return forward(std::integral_constant<Activation, Activation::tanh>{});
      case Activation::sigmoid:
        return forward(std::integral_constant<Activation, Activation::sigmoid>{});
      case Activation::softplus:
        return forward(std::integral_constant<Activation, Activation::softplus>{});
      case Activation::identity:
        return forward(std::integral_constant<Activation, Activation::identity>{});
      default:
        return forward(std::integral_constant<Activation, Activation::relu>{});
    }
  };
  return a.dtype == DType::f64 ? of(double{}) : of(float{});
}
// Likewise, with whether there is a resolvent before the equation.
template <typename F>
inline auto with_method(const MonSplittingArgs& a, F f) {
  return with_equation(a, [&](auto zero, auto adjoint, auto activation) {
    return a.resolvent != nullptr ? f(zero, std::true_type{}, adjoint, activation)
                                  : f(zero, std::false_type{}, adjoint, activation);
  });
}

// A sample's residual from its squared norms, as the batch's (ops/mon_iterations.h), and whether it
// goes on: NaN and infinity stop it too.
inline double sample_residual(double change, double norm) {
  return std::sqrt(change) / (1e-6 + std::sqrt(norm));
}
inline bool goes_on(double residual, double tol) {
  return residual > tol && residual <= __DBL_MAX__;
}

// J / (J + alpha (1 - J)), of n values.
template <typename T>
inline void adjoint_scales(const T* slope, int64_t n, T alpha, T* scale) {
  for (int64_t i = 0; i < n; ++i) {
    const T j = slope[i];
    scale[i] = j == 0 ? T(0) : j / (j + alpha * (1 - j));
  }
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
