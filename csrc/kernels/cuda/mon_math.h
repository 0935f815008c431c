// One element's part of a splitting step: nonlinearities, their proximal operators, the update.
#pragma once

#include "kernels/cpu/mon_activations.h"
#include "kernels/cuda/cuda.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// How an equation is solved. adjoint: u = J (b + W^T u) instead of z = sigma(W z + b); resolvent:
// Peaceman-Rachford instead of forward-backward.
struct MonRule {
  MonActivation activation;
  bool adjoint, resolvent, per_sample;
  double alpha, tol;
};

// An empty state is in equilibrium after its first step. Defined in mon_splitting.cu.
cudaError_t mon_nothing(int64_t* iterations, double* residual, int64_t count, cudaStream_t stream);

// kT samples of one point.
template <typename T, int kT>
struct alignas(sizeof(T) * kT < 16 ? sizeof(T) * kT : 16) Lanes {
  T at[kT];
};

#if defined(FASTPRUNE_EMULATED) || defined(__CUDACC__)

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float tanh_of(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_of(double x) { return tanh(x); }
__device__ __forceinline__ float log_one_plus(float x) { return log1pf(x); }
__device__ __forceinline__ double log_one_plus(double x) { return log1p(x); }
// Comparisons keep x where it is NaN.
template <typename T>
__device__ __forceinline__ T magnitude_of(T x) {
  return x < 0 ? -x : x;
}
template <typename T>
__device__ __forceinline__ T positive_part(T x) {
  return x < 0 ? T(0) : x;
}
template <typename T>
__device__ __forceinline__ T sigmoid_of(T x) {
  const T e = exp_of(-magnitude_of(x));
  return (x < 0 ? e : T(1)) / (T(1) + e);
}
template <typename T>
__device__ __forceinline__ T softplus_of(T x) {
  return log_one_plus(exp_of(-magnitude_of(x))) + positive_part(x);
}

template <typename T>
__device__ __forceinline__ T activate(MonActivation activation, T x) {
  switch (activation) {
    case MonActivation::relu:
      return positive_part(x);
    case MonActivation::tanh:
      return tanh_of(x);
    case MonActivation::sigmoid:
      return sigmoid_of(x);
    case MonActivation::softplus:
      return softplus_of(x);
    default:
      return x;
  }
}

// y - step(y) until a step is so small that the next would be below the rounding: its size is about
// the square. A step that is NaN, at an infinity, is the last.
template <typename T, typename Step>
__device__ __forceinline__ T newton(T y, Step step) {
  constexpr T kSmall = sizeof(T) == 8 ? T(0x1p-27) : T(0x1p-13);
  for (int i = 0; i < 64; ++i) {
    const T move = step(y);
    if (!(move == move)) break;
    y -= move;
    if (!(magnitude_of(move) > (magnitude_of(y) + T(1)) * kSmall)) break;
  }
  return y;
}

// The y of c tanh(y) + d y = x, d > 0, c + d > 0. Both sides are odd. At y >= 0 the left side is
// concave for c > 0, convex otherwise, so that Newton's method goes monotonically from the better
// of two bounds: what the left side is near 0, and far from it.
template <typename T>
__device__ __forceinline__ T solve_tanh_sum(T x, T c, T d) {
  const T w = magnitude_of(x), near = w / (c + d), far = (w - c) / d;
  const T start = c > 0 ? (far > near ? far : near) : (far < near ? far : near);
  const T y = newton(start, [&](T v) {
    const T t = tanh_of(v);
    return (t * c + v * d - w) / ((T(1) - t * t) * c + d);
  });
  return x < 0 ? -y : y;
}

// The z of (1 - alpha) z + alpha activation^-1(z) = x: with z = activation(y), the y of
// (1 - alpha) activation(y) + alpha y = x. For ReLU and the identity it is they themselves.
template <typename T>
__device__ __forceinline__ T proximal(MonActivation activation, T x, T alpha) {
  if (alpha == T(1)) return activate(activation, x);
  const T c = T(1) - alpha;
  if (activation == MonActivation::tanh || activation == MonActivation::sigmoid) {
    // sigmoid(2 t) = (1 + tanh(t)) / 2.
    const bool half = activation == MonActivation::sigmoid;
    const T t = half ? solve_tanh_sum(x - c / 2, c / 2, alpha * 2) : solve_tanh_sum(x, c, alpha);
    return half ? sigmoid_of(t * 2) : tanh_of(t);
  }
  if (activation == MonActivation::softplus) {
    // Convex for alpha < 1, else concave: monotone as above.
    const T far = x / alpha;
    const T start = c > 0 ? (far < x ? far : x) : (far > x ? far : x);
    return softplus_of(newton(start, [&](T v) {
      return (softplus_of(v) * c + v * alpha - x) / (sigmoid_of(v) * c + alpha);
    }));
  }
  return activate(activation, x);
}

// What a slope does to a step of the adjoint equation.
template <typename T>
__device__ __forceinline__ T step_scale(T slope, T alpha) {
  return slope == 0 ? T(0) : slope / (slope + alpha * (T(1) - slope));
}

// What the matrix of the next step multiplies: W forward-backward's, the resolvent the other's.
template <typename T>
__device__ __forceinline__ T product_input(const MonRule& rule, T z, T u, T b) {
  if (!rule.resolvent) return z;
  const T half = 2 * z - u;
  return rule.adjoint ? half : half + static_cast<T>(rule.alpha) * b;
}

// One step, from the product s. scale: step_scale() in the adjoint equation, else not used.
template <typename T>
__device__ __forceinline__ void advance(const MonRule& rule, T s, T b, T scale, T& z, T& u) {
  const T alpha = static_cast<T>(rule.alpha);
  T x;
  if (rule.resolvent) {
    u = 2 * s - (2 * z - u);
    x = rule.adjoint ? u + alpha * b : u;
  } else {
    x = (T(1) - alpha) * z + alpha * (s + b);
  }
  z = rule.adjoint ? scale * x : proximal(rule.activation, x, alpha);
}

// The last application, from the product s with W.
template <typename T>
__device__ __forceinline__ T last_application(const MonRule& rule, T s, T b, T slope) {
  return rule.adjoint ? slope * (b + s) : activate(rule.activation, s + b);
}

// Of the squared norms of the change and of the new state.
__device__ __forceinline__ double relative_residual(double change, double norm) {
  return sqrt(change) / (1e-6 + sqrt(norm));
}
// Not so for NaN.
__device__ __forceinline__ bool goes_on(double residual, double tol) {
  return residual > tol && residual <= 1.7976931348623157e308;
}

// Sums over the lanes of a warp that are equal modulo kT.
template <int kT>
__device__ __forceinline__ double sum_over_warp(double x) {
#pragma unroll
  for (int apart = 16; apart >= kT; apart /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, apart);
  }
  return x;
}

#endif

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
