// Vectors of the ISA that a kernel file is compiled for, written with the compilers' vector
// extensions, so that one source serves every ISA. Everything is inline in an unnamed namespace:
// nothing here may be shared between ISAs at link time.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef FASTPRUNE_ISA
#error "kernels/cpu/simd.h belongs to files that are compiled once per ISA"
#endif

namespace fastprune::FASTPRUNE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T loose __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
};
template <typename T>
using Vec = typename VectorOf<T>::type;

// Signed integers as wide as a lane, for bit masks.
template <int Bytes>
struct SignedOf {
  using type = int32_t;
};
template <>
struct SignedOf<8> {
  using type = int64_t;
};

template <typename T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::loose*>(p);
}
template <typename T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::loose*>(p) = v;
}
// The first n <= kLanes<T> lanes; the others are zeros, and nothing behind them is read.
template <typename T>
inline Vec<T> load_part(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  } else {
    return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
  }
#else
  Vec<T> v{};
  for (int j = 0; j < n; ++j) v[j] = p[j];
  return v;
#endif
}
template <typename T>
inline void store_part(T* p, Vec<T> v, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
  }
#else
  for (int j = 0; j < n; ++j) p[j] = v[j];
#endif
}
template <typename T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// Lane j of the result is lane index(j, ...) of the pair (a, b); indices from W on mean b.
template <typename V, typename F, int... J>
inline V shuffle_pair(V a, V b, F, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, F::index(J)...);
}

template <int W, int S>
struct LowHalves {  // blocks of S lanes: a's low block, then b's low block
  static constexpr int index(int j) { return (j & S) == 0 ? j : W + j - S; }
};
template <int W, int S>
struct HighHalves {  // a's high block, then b's high block
  static constexpr int index(int j) { return (j & S) == 0 ? j + S : W + j; }
};

template <typename T, int S>
inline void transpose_step(Vec<T>* v) {
  constexpr int W = kLanes<T>;
  using Lanes = std::make_integer_sequence<int, W>;
  if constexpr (S >= 1) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if ((i & S) == 0) {
        const Vec<T> a = v[i], b = v[i + S];
        v[i] = shuffle_pair(a, b, LowHalves<W, S>{}, Lanes{});
        v[i + S] = shuffle_pair(a, b, HighHalves<W, S>{}, Lanes{});
      }
    }
    transpose_step<T, S / 2>(v);
  }
}
// Transposes the W x W matrix whose rows are v[0..W).
template <typename T>
inline void transpose(Vec<T>* v) {
  transpose_step<T, kLanes<T> / 2>(v);
}

template <typename T, int S>
inline Vec<T> sum_lanes_step(Vec<T>* v) {
  constexpr int W = kLanes<T>;
  using Lanes = std::make_integer_sequence<int, W>;
  if constexpr (S == 0) {
    return v[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < S; ++i) {
      v[i] = shuffle_pair(v[i], v[i + S], LowHalves<W, S>{}, Lanes{}) +
             shuffle_pair(v[i], v[i + S], HighHalves<W, S>{}, Lanes{});
    }
    return sum_lanes_step<T, S / 2>(v);
  }
}
// Lane j of the result is the sum of the lanes of v[j]; W vectors are summed in 2 W shuffles.
template <typename T>
inline Vec<T> sum_lanes(Vec<T>* v) {
  return sum_lanes_step<T, kLanes<T> / 2>(v);
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
