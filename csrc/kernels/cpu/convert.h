// Elements of any stored type as float or double, a block at a time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cpu/scalar_types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastprune::FASTPRUNE_ISA {
namespace {

// Elements [begin, begin + n) of `from`, which holds S, in the buffer.
template <typename S, typename T>
const T* convert(const void* from, int64_t begin, int64_t n, T* buffer) {
  const S* p = static_cast<const S*>(from) + begin;
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<S, Float16> && std::is_same_v<T, float>) {
    for (; i + 8 <= n; i += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i));
      _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(halves));
    }
  }
#endif
  for (; i < n; ++i) buffer[i] = static_cast<T>(widen(p[i]));
  return buffer;
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
