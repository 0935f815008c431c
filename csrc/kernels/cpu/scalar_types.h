// Element types of the kernels and their conversions. bfloat16 and float16 are stored only:
// arithmetic on them is float32.
#pragma once

#include <cstdint>
#include <cstring>

// Functions that CUDA kernels call too.
#if defined(__CUDACC__)
#define FASTPRUNE_HOST_DEVICE __host__ __device__
#else
#define FASTPRUNE_HOST_DEVICE
#endif

namespace fastprune {

enum class DType : int { f32, f64, bf16, f16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

// Unnamed: each translation unit, hence each ISA, keeps its own copy.
namespace {

FASTPRUNE_HOST_DEVICE inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
FASTPRUNE_HOST_DEVICE inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

FASTPRUNE_HOST_DEVICE inline float widen(float x) { return x; }
FASTPRUNE_HOST_DEVICE inline double widen(double x) { return x; }
FASTPRUNE_HOST_DEVICE inline float widen(BFloat16 x) {
  return bits_to_float(static_cast<uint32_t>(x.bits) << 16);
}
FASTPRUNE_HOST_DEVICE inline float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  // Scaling by 2^112 rebiases the exponent and normalises subnormals, exactly.
  const uint32_t finite = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;  // infinity or NaN, payload kept
  return bits_to_float(sign | (magnitude >= 0x0f800000u ? special : finite));
#endif
}

template <typename T>
FASTPRUNE_HOST_DEVICE inline T narrow(Accumulator<T> x);
template <>
FASTPRUNE_HOST_DEVICE inline float narrow<float>(float x) {
  return x;
}
template <>
FASTPRUNE_HOST_DEVICE inline double narrow<double>(double x) {
  return x;
}
template <>
FASTPRUNE_HOST_DEVICE inline BFloat16 narrow<BFloat16>(float x) {  // round to nearest, ties to even
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return {bits};
#else
  const uint32_t u = float_to_bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? (u >> 16) | 0x40u : rounded)};
#endif
}
template <>
FASTPRUNE_HOST_DEVICE inline Float16 narrow<Float16>(
    float x) {  // round to nearest, ties to even; overflow to infinity
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return {bits};
#else
  const uint32_t u = float_to_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  // Normal results: rebias, then round the 13 dropped bits to even.
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 aligns the last kept bit with the last bit of a float near 0.5,
  // and the addition rounds to even.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x47800000u ? 0x7c00u : h;  // 65536 and above: infinity
  h = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : h;  // NaN
  return {static_cast<uint16_t>(sign | h)};
#endif
}

}  // namespace
}  // namespace fastprune
