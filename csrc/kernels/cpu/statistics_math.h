// What tensor_statistics computes with: blocks of elements as float or double, |w|^p in double.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/tensor_statistics.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastprune::FASTPRUNE_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // elements that stay in L1 while every statistic reads them
template <typename T>
constexpr int64_t kRoom = kBlock + kLanes<T>;  // of a buffer for them

using Doubles = Vec<double>;
using Words = Vec<uint64_t>;
constexpr int kWide = kLanes<double>;

// ---- Blocks ------------------------------------------------------------------------------------

#if defined(__AVX512F__)
using Lanes = __m512i;
template <typename T>
constexpr bool kCompresses = true;
inline Lanes load_lanes(const void* p) { return _mm512_loadu_si512(p); }
// The lanes of the bits that are set come first. In the register: compressing stores are several
// times slower on some processors.
template <typename T>
inline Lanes pack_lanes(Lanes v, uint32_t kept) {
  if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_compress_epi32(static_cast<__mmask16>(kept), v);
  } else {
    return _mm512_maskz_compress_epi64(static_cast<__mmask8>(kept), v);
  }
}
inline void store_lanes(void* p, Lanes v) { _mm512_storeu_si512(p, v); }
// Bit j: byte j is not 0.
template <typename T>
inline uint32_t bytes_set(const uint8_t* p, int64_t n) {
  constexpr int W = kLanes<T>;
  const __m128i bytes =
      _mm_maskz_loadu_epi8(static_cast<__mmask16>(n < W ? (1u << n) - 1 : (1ull << W) - 1), p);
  return _mm_test_epi8_mask(bytes, bytes);
}
#elif defined(__AVX2__)
using Lanes = __m256i;
template <typename T>
constexpr bool kCompresses = sizeof(T) == 4;
inline Lanes load_lanes(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
struct PackTable {
  uint64_t lanes[256];  // of each mask, a byte for each lane that is kept
  constexpr PackTable() : lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      int at = 0;
      for (int j = 0; j < 8; ++j) {
        if ((mask >> j & 1) != 0) lanes[mask] |= static_cast<uint64_t>(j) << (8 * at++);
      }
    }
  }
};
constexpr PackTable kPack;
template <typename T>
inline Lanes pack_lanes(Lanes v, uint32_t kept) {
  const __m128i order = _mm_cvtsi64_si128(static_cast<int64_t>(kPack.lanes[kept]));
  return _mm256_permutevar8x32_epi32(v, _mm256_cvtepu8_epi32(order));
}
inline void store_lanes(void* p, Lanes v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
template <typename T>
inline uint32_t bytes_set(const uint8_t* p, int64_t n) {
  uint64_t bytes = 0;
  std::memcpy(&bytes, p, n < 8 ? static_cast<size_t>(n) : 8);
  const __m128i zeros =
      _mm_cmpeq_epi8(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)), _mm_setzero_si128());
  return ~static_cast<uint32_t>(_mm_movemask_epi8(zeros)) & 255;
}
#else
template <typename T>
constexpr bool kCompresses = false;
#endif

#if defined(__AVX2__)
// Moves to out the x[i] for which keep(vector of x, i) has its bit set, and returns their number.
// There is room for a vector more in out, which may be x.
template <typename T, typename Keep>
int64_t compress(const T* x, int64_t n, T* out, Keep keep) {
  constexpr int W = kLanes<T>;
  int64_t found = 0;
  const auto step = [&](Lanes v, uint32_t kept) {
    store_lanes(out + found, pack_lanes<T>(v, kept));
    found += __builtin_popcount(kept);
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Lanes v = load_lanes(x + i);
    step(v, keep(v, i));
  }
  if (i < n) {
    T rest[W] = {};
    std::memcpy(rest, x + i, static_cast<size_t>(n - i) * sizeof(T));
    const Lanes v = load_lanes(rest);
    step(v, keep(v, i) & ((1u << (n - i)) - 1));
  }
  return found;
}
#endif

// The elements among [begin, begin + n) of the tensor that are within, n <= kBlock; n becomes their
// number. In place where they are stored so, else in the buffer, which has kRoom<T>.
template <typename T>
const T* load_block(const StatisticsTensor& t, int64_t begin, int64_t& n, T* buffer) {
  const T* x = buffer;
  switch (t.dtype) {
    case DType::f32:
      if constexpr (sizeof(T) == 4) {
        x = static_cast<const T*>(t.values) + begin;
      } else {
        convert<float>(t.values, begin, n, buffer);
      }
      break;
    case DType::f64:
      if constexpr (sizeof(T) == 8) x = static_cast<const T*>(t.values) + begin;
      break;  // float64 is never read as float
    case DType::bf16:
      convert<BFloat16>(t.values, begin, n, buffer);
      break;
    default:
      convert<Float16>(t.values, begin, n, buffer);
  }
  if (t.within == nullptr) return x;
  const uint8_t* within = t.within + begin;
  if constexpr (kCompresses<T>) {
#if defined(__AVX2__)
    n = compress(x, n, buffer, [&](Lanes, int64_t i) { return bytes_set<T>(within + i, n - i); });
#endif
  } else {
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      buffer[kept] = x[i];
      kept += within[i] != 0 ? 1 : 0;
    }
    n = kept;
  }
  return buffer;
}

// ---- Powers ------------------------------------------------------------------------------------

inline Doubles load_doubles(const double* p) { return load(p); }
inline Doubles load_doubles(const float* p) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_cvtps_pd(_mm256_loadu_ps(p));  // gcc converts halves of it apart
#else
  typedef float Half __attribute__((vector_size(kVectorBytes / 2), aligned(1), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Half*>(p), Doubles);
#endif
}

inline Doubles magnitude(Doubles x) { return (Doubles)((Words)x & (uint64_t{~uint64_t{0}} >> 1)); }

inline double sum_of(Doubles v) {
  double parts[kWide];
  store(parts, v);
  for (int half = kWide / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) parts[j] += parts[j + half];
  }
  return parts[0];
}

// c[0] + c[1] x + ..., by halves: a chain of products as long as the polynomial would leave the
// processor waiting. powers: x, x^2, x^4, x^8.
template <int N>
inline Doubles polynomial_part(const double* c, const Doubles* powers) {
  if constexpr (N == 1) {
    return Doubles{} + c[0];
  } else {
    constexpr int kLevel = N > 8 ? 3 : N > 4 ? 2 : N > 2 ? 1 : 0, kHalf = 1 << kLevel;
    return polynomial_part<N - kHalf>(c + kHalf, powers) * powers[kLevel] +
           polynomial_part<kHalf>(c, powers);
  }
}
template <int N>
inline Doubles polynomial(Doubles x, const double (&c)[N]) {
  const Doubles x2 = x * x, x4 = x2 * x2, powers[4] = {x, x2, x4, x4 * x4};
  return polynomial_part<N>(c, powers);
}

// log2 of x > 0, apart: an integer, and log2 of a number in [sqrt(1/2), sqrt(2)). With
// r = (m - 1) / (m + 1), log m = 2 (r + r^3/3 + r^5/5 + ...); |r| < 0.1716, so that what the ten
// terms leave out is below 2^-55. Subnormal: whether x may be, in double.
template <bool Subnormal>
inline void split_log2(Doubles x, Doubles& whole, Doubles& rest) {
  constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcd, kOne = 0x3ff0000000000000;
  Doubles lift{};
  if constexpr (Subnormal) {
    const auto tiny = x < 0x1p-1022;
    x = tiny ? x * 0x1p54 : x;
    lift = tiny ? lift + 54.0 : lift;
  }
  const Words bits = (Words)x;
  const Words biased = (bits + (kOne - kRootHalf)) >> 52;
  const Doubles m = (Doubles)(bits - ((biased - 1023) << 52));
  // An integer below 2^52 in the low bits of 2^52 is that sum.
  whole = (Doubles)(biased | uint64_t{0x4330000000000000}) - (0x1p52 + 1023.0) - lift;
  const Doubles r = (m - 1.0) / (m + 1.0), z = r * r;
  constexpr double k = 2.8853900817779268;  // 2 / ln 2
  static constexpr double kTerms[10] = {k,      k / 3,  k / 5,  k / 7,  k / 9,
                                        k / 11, k / 13, k / 15, k / 17, k / 19};
  rest = r * polynomial(z, kTerms);
}

// 2^t for t < 1000; below 2^-1022 that. With f = t - round(t), 2^f is its Taylor series up to
// (f ln 2)^13 / 13!: what is left out is below 2^-57.
inline Doubles power_of_two(Doubles t) {
  t = t < -1022.0 ? Doubles{} - 1022.0 : t;
  const Doubles shifted = t + 0x1.8p52;  // the integer ends up in the low bits
  const Doubles f = t - (shifted - 0x1.8p52);
  constexpr double l = 0.69314718055994531;
  constexpr double l2 = l * l / 2, l3 = l2 * l / 3, l4 = l3 * l / 4, l5 = l4 * l / 5,
                   l6 = l5 * l / 6, l7 = l6 * l / 7, l8 = l7 * l / 8, l9 = l8 * l / 9,
                   l10 = l9 * l / 10, l11 = l10 * l / 11, l12 = l11 * l / 12, l13 = l12 * l / 13;
  static constexpr double kTerms[14] = {1, l, l2, l3, l4, l5, l6, l7, l8, l9, l10, l11, l12, l13};
  const Doubles s = polynomial(f, kTerms);
  return (Doubles)((Words)s + ((Words)shifted << 52));
}

inline Doubles square_root(Doubles x) {
#if defined(__AVX512F__)
  // From a 14-bit estimate y of 1 / sqrt(x) and e = 1 - x y^2: sqrt(x) = x y (1 - e)^(-1/2), whose
  // series up to e^3 leaves out less than 2^-56. What s^2 misses of x, which one FMA gives exactly,
  // then rounds s to the nearest but for one x in 2^28. Half the time of the instruction.
  const __m512d v = (__m512d)x;
  const __mmask8 positive = _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_GT_OQ);
  const Doubles y = (Doubles)_mm512_maskz_rsqrt14_pd(positive, v);
  const Doubles s = x * y, e = 1.0 - s * y;
  const Doubles series = (e * (5.0 / 16) + 3.0 / 8) * e + 0.5;
  const Doubles root = s + s * e * series, half = (y * 0.5) * (e * 0.5 + 1.0);
  const Doubles missed = (Doubles)_mm512_fnmadd_pd((__m512d)root, (__m512d)root, v);
  return (Doubles)_mm512_fmadd_pd((__m512d)missed, (__m512d)half, (__m512d)root);
#else
  for (int j = 0; j < kWide; ++j) x[j] = __builtin_sqrt(x[j]);
  return x;
#endif
}

inline Doubles integer_power(Doubles x, int p) {  // p >= 1
  while ((p & 1) == 0) x *= x, p >>= 1;
  Doubles y = x;
  while ((p >>= 1) != 0) {
    x *= x;
    if ((p & 1) != 0) y *= x;
  }
  return y;
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
