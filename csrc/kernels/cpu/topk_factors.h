// The factors of a score, a block at a time: converted, gathered from strided tensors, or drawn.
#pragma once

#include <cstring>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/global_topk_mask.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // elements whose keys are in flight; a multiple of 64

// Elements [begin, begin + n) as T: in place where they are stored so, else through the buffer.
template <typename T>
const T* as_scores(DType dtype, const void* from, int64_t begin, int64_t n, T* buffer) {
  switch (dtype) {
    case DType::f32:
      if constexpr (sizeof(T) == 4) return static_cast<const T*>(from) + begin;
      return convert<float>(from, begin, n, buffer);
    case DType::f64:
      if constexpr (sizeof(T) == 8) return static_cast<const T*>(from) + begin;
      return buffer;  // not reached: float64 factors are computed in double
    case DType::bf16:
      return convert<BFloat16>(from, begin, n, buffer);
    default:
      return convert<Float16>(from, begin, n, buffer);
  }
}

// Where element `at` of a strided tensor lies.
inline int64_t strided_offset(const TopkStrides& s, int64_t at) {
  int64_t offset = 0;
  for (int d = s.dims - 1; d >= 0; --d) {
    offset += at % s.sizes[d] * s.strides[d];
    at /= s.sizes[d];
  }
  return offset;
}

template <typename S, typename T>
void read_strided(const TopkStrides& s, const void* from, int64_t begin, int64_t n, T* out) {
  const int last = s.dims - 1;
  const int64_t cols = s.sizes[last], step = s.strides[last];
  int64_t index[kTopkDims];  // of the next element
  const S* row = static_cast<const S*>(from);
  for (int64_t d = last, at = begin; d >= 0; at /= s.sizes[d--]) {
    index[d] = at % s.sizes[d];
    if (d < last) row += index[d] * s.strides[d];
  }
  int64_t column = index[last];
  for (int64_t i = 0; i < n;) {
    const int64_t run = n - i < cols - column ? n - i : cols - column;
    for (int64_t j = 0; j < run; ++j) out[i + j] = static_cast<T>(widen(row[(column + j) * step]));
    i += run;
    column = 0;
    for (int d = last - 1; d >= 0; --d) {
      row += s.strides[d];
      if (++index[d] < s.sizes[d]) break;
      row -= s.sizes[d] * s.strides[d];
      index[d] = 0;
    }
  }
}

template <typename T>
const T* as_strided_scores(DType dtype, const TopkStrides& s, const void* from, int64_t begin,
                           int64_t n, T* buffer) {
  switch (dtype) {
    case DType::f32:
      read_strided<float>(s, from, begin, n, buffer);
      break;
    case DType::f64:
      read_strided<double>(s, from, begin, n, buffer);
      break;
    case DType::bf16:
      read_strided<BFloat16>(s, from, begin, n, buffer);
      break;
    default:
      read_strided<Float16>(s, from, begin, n, buffer);
  }
  return buffer;
}

// Output number `index` of the generator SplitMix64 started with `seed`, as a fraction in [0, 1).
// Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
inline double uniform(uint64_t seed, int64_t index) {
  uint64_t z = seed + (static_cast<uint64_t>(index) + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  // 52 bits, which vectors convert by placing them behind the exponent of 1.
  const uint64_t bits = (z >> 12) | 0x3ff0000000000000u;
  double one_to_two;
  std::memcpy(&one_to_two, &bits, 8);
  return one_to_two - 1.0;
}

inline bool is_double(const TopkProblem& problem, const TopkTensor& t) {
  return problem.score == TopkScore::noise || t.dtype == DType::f64 ||
         (t.other != nullptr && t.other_dtype == DType::f64);
}

// Elements [begin, begin + n) of the first factor, n <= kBlock.
template <typename T>
const T* first_factor(const TopkProblem& problem, const TopkTensor& t, int64_t begin, int64_t n,
                      T* buffer) {
  if (problem.score == TopkScore::noise) {
    for (int64_t i = 0; i < n; ++i) {
      buffer[i] = static_cast<T>(uniform(problem.seed, t.first + begin + i));
    }
    return buffer;
  }
  if (t.values_strides == nullptr) return as_scores<T>(t.dtype, t.values, begin, n, buffer);
  return as_strided_scores(t.dtype, *t.values_strides, t.values, begin, n, buffer);
}

// The second factor, or `none` where the score has one only.
template <typename T>
const T* second_factor(const TopkTensor& t, int64_t begin, int64_t n, const T* none, T* buffer) {
  if (t.other == nullptr) return none;
  if (t.other_strides == nullptr) return as_scores<T>(t.other_dtype, t.other, begin, n, buffer);
  return as_strided_scores(t.other_dtype, *t.other_strides, t.other, begin, n, buffer);
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
