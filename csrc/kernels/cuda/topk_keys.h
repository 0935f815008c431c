// Scores and their keys in registers, four neighbouring elements to a vector load.
#pragma once

#include "kernels/cuda/global_topk_mask.h"
#include "kernels/cuda/warp.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

using Word = unsigned long long;  // what 64-bit atomics take

// How scores become keys, in a form that kernels take by value.
struct TopkKeying {
  TopkScore score;
  bool scaled, ordered;  // ordered: scores have a sign
  uint64_t seed;
};

inline TopkKeying topk_keying(const TopkScoring& s) {
  return {s.score, s.scaled,
          s.scaled || s.score == TopkScore::identity || s.score == TopkScore::product, s.seed};
}

// The high bits of a key that say it all: stored values of 16 bits, widened, end in bits that
// follow from the others.
inline int topk_key_bits(const TopkScoring& s, const TopkSource* sources, int64_t n) {
  int bits = s.wide ? 64 : 16;
  const bool plain =
      !s.scaled && (s.score == TopkScore::identity || s.score == TopkScore::magnitude);
  for (int64_t i = 0; i < n && !s.wide; ++i) {
    const int of = !plain || sources[i].dtype == DType::f32 ? 32
                   : sources[i].dtype == DType::f16         ? 19
                                                            : 16;
    bits = of > bits ? of : bits;
  }
  return bits;
}

// Unsigned, in the order of the scores; -0 and +0 share a key. Of scores without a sign the sign
// bit is dropped.
__host__ __device__ inline uint32_t topk_key(uint32_t bits, bool ordered) {
  if (!ordered) return bits << 1;
  if (bits == 0x80000000u) return bits;  // -0: the key of +0
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__host__ __device__ inline uint64_t topk_key(uint64_t bits, bool ordered) {
  constexpr uint64_t kSign = uint64_t{1} << 63;
  if (!ordered) return bits << 1;
  if (bits == kSign) return bits;
  return (bits & kSign) != 0 ? ~bits : bits | kSign;
}

// Output number `index` of the generator SplitMix64 started with `seed`, as the bits of a fraction
// in [1, 2). Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
__host__ __device__ inline uint64_t topk_noise_bits(uint64_t seed, int64_t index) {
  uint64_t z = seed + (static_cast<uint64_t>(index) + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return (z >> 12) | 0x3ff0000000000000u;
}

#if defined(__CUDACC__) || defined(FASTPRUNE_EMULATED)

// kQuads times four neighbouring elements.
template <typename Key, int kQuads>
struct TopkKeys {
  Key key[kQuads][4];
  uint32_t live;  // bit 4 q + j: a candidate
  bool nan;       // a candidate's score is NaN; it is not `live`
};

// As widen() of scalar_types.h.
__device__ __forceinline__ float stored_16(DType dtype, uint32_t bits) {
  if (dtype == DType::bf16) return __uint_as_float(bits << 16);
  // Scaling by 2^112 rebiases the exponent and normalises subnormals, exactly.
  const uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  const uint32_t finite = __float_as_uint(__fmul_rn(__uint_as_float(magnitude), 0x1p112f));
  return __uint_as_float(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

// What is needed of a tensor for every element; the rest is a read away.
struct TopkReading {
  const void *values, *other;
  const uint8_t* within;
  int64_t numel;
  const TopkSource* table;
  int index;
  uint32_t kinds;

  __device__ __forceinline__ DType dtype() const { return static_cast<DType>(kinds & 0xffu); }
  __device__ __forceinline__ DType other_dtype() const {
    return static_cast<DType>(kinds >> 8 & 0xffu);
  }
  __device__ __forceinline__ bool aligned() const { return kinds >> 16 != 0; }
  __device__ __forceinline__ const TopkSource& source() const { return table[index]; }
};

__device__ __forceinline__ TopkReading reading_of(const TopkSource* table, int index) {
  const TopkSource& s = table[index];
  const uint32_t kinds = static_cast<uint32_t>(s.dtype) |
                         static_cast<uint32_t>(s.other_dtype) << 8 |
                         static_cast<uint32_t>(s.aligned != 0) << 16;
  return {s.values, s.other, s.within, s.numel, table, index, kinds};
}

// Four elements as they lie in memory: 2 words of 16-bit elements, 4 of float32, 8 of float64.
template <typename Key>
constexpr int kRawWords = sizeof(Key);

template <typename Key>
__device__ __forceinline__ void read_quad(DType dtype, const void* from, int64_t at,
                                          uint32_t (&raw)[kRawWords<Key>]) {
  const char* bytes = static_cast<const char*>(from);
  if (dtype == DType::f32) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(bytes + 4 * at));
    raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
  } else if (sizeof(Key) == 4 || dtype != DType::f64) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(bytes + 2 * at));
    raw[0] = v.x, raw[1] = v.y;
  } else if constexpr (sizeof(Key) == 8) {
    const uint4* place = reinterpret_cast<const uint4*>(bytes + 8 * at);
    const uint4 v = __ldg(place), w = __ldg(place + 1);
    raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
    raw[4] = w.x, raw[5] = w.y, raw[6] = w.z, raw[7] = w.w;
  }
}

// The same one element after another, from a quad of which `n` elements (1 to 4) are there: the
// last stands in for the others.
template <typename Key>
__device__ __forceinline__ void read_some(DType dtype, const void* from, int64_t at, int n,
                                          uint32_t (&raw)[kRawWords<Key>]) {
  if (dtype == DType::f32) {
    const uint32_t* place = static_cast<const uint32_t*>(from) + at;
#pragma unroll
    for (int j = 0; j < 4; ++j) raw[j] = __ldg(place + (j < n ? j : n - 1));
  } else if (sizeof(Key) == 4 || dtype != DType::f64) {
    const uint16_t* place = static_cast<const uint16_t*>(from) + at;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const uint32_t low = __ldg(place + (j < n ? j : n - 1));
      const uint32_t high = __ldg(place + (j + 1 < n ? j + 1 : n - 1));
      raw[j / 2] = high << 16 | low;
    }
  } else if constexpr (sizeof(Key) == 8) {
    const uint2* place = static_cast<const uint2*>(from) + at;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint2 v = __ldg(place + (j < n ? j : n - 1));
      raw[2 * j] = v.x, raw[2 * j + 1] = v.y;
    }
  }
}

__device__ __forceinline__ void unpack_quad(DType dtype, const uint32_t* raw, float (&x)[4]) {
  if (dtype == DType::f32) {
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = __uint_as_float(raw[j]);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = stored_16(dtype, raw[j / 2] >> (16 * (j % 2)) & 0xffffu);
  }
}
__device__ __forceinline__ void unpack_quad(DType dtype, const uint32_t* raw, double (&x)[4]) {
  if (dtype == DType::f64) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint64_t bits = uint64_t{raw[2 * j + 1]} << 32 | raw[2 * j];
      x[j] = __longlong_as_double(static_cast<long long>(bits));
    }
  } else {
    float narrow[4];
    unpack_quad(dtype, raw, narrow);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = static_cast<double>(narrow[j]);
  }
}

__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float magnitude_of(float x) {
  return __uint_as_float(__float_as_uint(x) & 0x7fffffffu);
}
__device__ __forceinline__ double magnitude_of(double x) {
  return __longlong_as_double(__double_as_longlong(x) & INT64_MAX);
}

// Scores of four elements in T, but for the sign that some kinds drop when they become keys. Every
// branch is the same for all threads of a launch, or of a tensor.
template <typename T>
__device__ __forceinline__ void scale_quad(const TopkKeying& keying, T scale, T (&s)[4]) {
  if (!keying.scaled) return;
  const bool drop = keying.score == TopkScore::magnitude || keying.score == TopkScore::saliency;
#pragma unroll
  for (int j = 0; j < 4; ++j) s[j] = rounded_product(drop ? magnitude_of(s[j]) : s[j], scale);
}

template <typename T>
__device__ __forceinline__ void fuse_quad(const TopkKeying& keying, const TopkReading& t,
                                          const uint32_t* a, const uint32_t* b, T (&s)[4]) {
  unpack_quad(t.dtype(), a, s);
  if (t.other != nullptr) {
    T y[4];
    unpack_quad(t.other_dtype(), b, y);
#pragma unroll
    for (int j = 0; j < 4; ++j) s[j] = rounded_product(s[j], y[j]);
  } else if (keying.score == TopkScore::square) {
#pragma unroll
    for (int j = 0; j < 4; ++j) s[j] = rounded_product(s[j], s[j]);
  }
  scale_quad(keying, static_cast<T>(t.source().scale), s);
}

__device__ __forceinline__ bool is_double(const TopkKeying& keying, const TopkReading& t) {
  return keying.score == TopkScore::noise || t.dtype() == DType::f64 ||
         (t.other != nullptr && t.other_dtype() == DType::f64);
}

// Scores of four elements from `at` on, in float or double as Key is narrow or wide.
template <typename Score>
__device__ __forceinline__ void score_quad(const TopkKeying& keying, const TopkReading& t,
                                           int64_t at, const uint32_t* a, const uint32_t* b,
                                           Score (&s)[4]) {
  if constexpr (sizeof(Score) == 4) {
    fuse_quad(keying, t, a, b, s);
  } else if (keying.score == TopkScore::noise) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint64_t bits = topk_noise_bits(keying.seed, t.source().first + at + j);
      s[j] = __dadd_rn(__longlong_as_double(static_cast<long long>(bits)), -1.0);
    }
    scale_quad(keying, t.source().scale, s);
  } else if (is_double(keying, t)) {
    fuse_quad(keying, t, a, b, s);
  } else {
    float narrow[4];
    fuse_quad(keying, t, a, b, narrow);
#pragma unroll
    for (int j = 0; j < 4; ++j) s[j] = static_cast<double>(narrow[j]);
  }
}

__device__ __forceinline__ uint32_t score_bits(float s) { return __float_as_uint(s); }
__device__ __forceinline__ uint64_t score_bits(double s) {
  return static_cast<uint64_t>(__double_as_longlong(s));
}

// Keys of NaN lie above that of infinity and, where scores have a sign, below that of its negative.
template <typename Key>
__device__ __forceinline__ bool is_nan_between(Key least, Key most, bool ordered) {
  constexpr Key kInfinity = static_cast<Key>(sizeof(Key) == 4 ? 0x7f800000u : 0x7ff0000000000000u);
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  if (!ordered) return most > kInfinity << 1;
  return most > (kInfinity | kSign) || least < static_cast<Key>(~(kInfinity | kSign));
}

template <typename Key>
struct ScoreOf {
  using type = float;
};
template <>
struct ScoreOf<uint64_t> {
  using type = double;
};

// Elements at + q * step + 0..3 of a tensor, those before `end`. `vectors`: all of them are, and
// every quad is aligned in memory. All loads are issued before the first is used.
template <typename Key, int kQuads>
__device__ __forceinline__ TopkKeys<Key, kQuads> load_keys(const TopkKeying& keying,
                                                           const TopkReading& t, int64_t at,
                                                           int64_t step, int64_t end,
                                                           bool vectors) {
  uint32_t a[kQuads][kRawWords<Key>], b[kQuads][kRawWords<Key>], allowed[kQuads];
  const bool read = keying.score != TopkScore::noise;
  TopkKeys<Key, kQuads> out;
  if (vectors) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      if (read) read_quad<Key>(t.dtype(), t.values, at + q * step, a[q]);
    }
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      if (t.other != nullptr) read_quad<Key>(t.other_dtype(), t.other, at + q * step, b[q]);
    }
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      allowed[q] = t.within == nullptr
                       ? 0x01010101u
                       : __ldg(reinterpret_cast<const uint32_t*>(t.within + at + q * step));
    }
  } else {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int64_t left = end - (at + q * step), from = left > 0 ? at + q * step : end - 1;
      const int n = left < 1 ? 1 : left < 4 ? static_cast<int>(left) : 4;
      if (read) read_some<Key>(t.dtype(), t.values, from, n, a[q]);
      if (t.other != nullptr) read_some<Key>(t.other_dtype(), t.other, from, n, b[q]);
      allowed[q] = 0x01010101u;
      if (t.within != nullptr) {
        allowed[q] = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t byte = __ldg(t.within + from + (j < n ? j : n - 1));
          allowed[q] |= byte << (8 * j);
        }
      }
      if (left < 4) allowed[q] &= left <= 0 ? 0u : (1u << (8 * left)) - 1;
    }
  }
  Key least = ~Key{0}, most = 0;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    typename ScoreOf<Key>::type s[4];
    score_quad(keying, t, at + q * step, a[q], b[q], s);
    if (keying.ordered) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out.key[q][j] = topk_key(score_bits(s[j]), true);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) out.key[q][j] = topk_key(score_bits(s[j]), false);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      least = out.key[q][j] < least ? out.key[q][j] : least;
      most = out.key[q][j] > most ? out.key[q][j] : most;
    }
  }
  out.live = (1u << (4 * kQuads)) - 1;
  out.nan = false;
  if (vectors && t.within == nullptr && !is_nan_between(least, most, keying.ordered)) return out;
#pragma unroll
  for (int i = 0; i < 4 * kQuads; ++i) {
    const Key key = out.key[i / 4][i % 4];
    const bool candidate = (allowed[i / 4] >> (8 * (i % 4)) & 0xffu) != 0;
    const bool nan = is_nan_between(key, key, keying.ordered);
    out.nan |= candidate && nan;
    if (!candidate || nan) out.live &= ~(1u << i);
  }
  return out;
}

#endif

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
