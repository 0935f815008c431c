// Moving activations between their tensors and the panels: widening, narrowing, what is fused into
// the way out.
#pragma once

#include <type_traits>

#include "kernels/cpu/scalar_types.h"
#include "kernels/cpu/simd.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// 16-bit elements, as many as a vector has floats, and their way to floats and back.
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

// The first n elements, zeros behind them.
inline Halves load_halves(const void* p, int n) {
  Halves h{};
  if (n == kLanes<float>) {
    std::memcpy(&h, p, sizeof(h));
  } else {
#if defined(__AVX512F__)
    h = (Halves)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
#else
    std::memcpy(&h, p, sizeof(uint16_t) * static_cast<size_t>(n));
#endif
  }
  return h;
}
inline void store_halves(void* p, Halves h, int n) {
  if (n == kLanes<float>) {
    std::memcpy(p, &h, sizeof(h));
  } else {
#if defined(__AVX512F__)
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)h);
#else
    std::memcpy(p, &h, sizeof(uint16_t) * static_cast<size_t>(n));
#endif
  }
}

template <typename S>
inline Vec<float> widen_halves(Halves h) {
  if constexpr (std::is_same_v<S, BFloat16>) {
#if defined(__AVX512F__)
    const Words wide = (Words)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
    const Words wide = (Words)_mm256_cvtepu16_epi32((__m128i)h);
#else
    const Words wide = __builtin_convertvector(h, Words);
#endif
    return (Vec<float>)(wide << 16);
  } else {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
    return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#else
    Vec<float> v{};
    for (int j = 0; j < kLanes<float>; ++j) v[j] = widen(Float16{h[j]});
    return v;
#endif
  }
}
// As narrow() rounds.
template <typename S>
inline Halves narrow_halves(Vec<float> v) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const Words u = (Words)v, nan = (Words)(v != v);
    const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return __builtin_convertvector((nan & ((u >> 16) | 0x40u)) | (~nan & rounded), Halves);
  } else {
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    Halves h{};
    for (int j = 0; j < kLanes<float>; ++j) h[j] = narrow<Float16>(v[j]).bits;
    return h;
#endif
  }
}

// A vector of n <= W widened elements, zeros behind them.
template <typename S>
inline Vec<Accumulator<S>> load_widened(const S* p, int n) {
  using T = Accumulator<S>;
  if constexpr (sizeof(S) == sizeof(T)) {
    return n == kLanes<T> ? load(reinterpret_cast<const T*>(p))
                          : load_part(reinterpret_cast<const T*>(p), n);
  } else {
    return widen_halves<S>(load_halves(p, n));
  }
}

template <typename S>
inline void store_narrowed(S* p, Vec<Accumulator<S>> v, int n) {
  using T = Accumulator<S>;
  if constexpr (sizeof(S) == sizeof(T)) {
    if (n == kLanes<T>) {
      store(reinterpret_cast<T*>(p), v);
    } else {
      store_part(reinterpret_cast<T*>(p), v, n);
    }
  } else {
    store_halves(p, narrow_halves<S>(v), n);
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
  if constexpr (sizeof(S) != sizeof(T)) {
    if (residual != nullptr || relu) sum = widen_halves<S>(narrow_halves<S>(sum));
  }
  if (residual != nullptr) sum += load_widened(residual, n);
  if constexpr (sizeof(S) != sizeof(T)) {
    if (residual != nullptr && relu) sum = widen_halves<S>(narrow_halves<S>(sum));
  }
  if (relu) sum = sum < Vec<T>{} ? Vec<T>{} : sum;  // a NaN stays
  store_narrowed(to, sum, n);
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
