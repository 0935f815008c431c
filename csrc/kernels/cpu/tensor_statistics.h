// Sums, powers, extremes and counts of many tensors in one read, and what the Gini index needs.
//
// Work is cut into chunks of fixed size; a chunk's results are a function of its elements alone,
// and chunks are combined in order, so that the number of threads changes no bit. Sums of powers
// carry an exponent of their own: |w|^50 overflows no sum, and neither does the square of 1e300.
//
// The Gini index needs the order of the magnitudes. Their bits are integer keys in the same order;
// keys are counted in bins, runs of bins are brought together in bounded memory, and every bin ends
// as a GiniGroup: exact integers, whatever the order in which its elements arrived.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/scalar_types.h"

namespace fastprune {

constexpr int64_t kStatisticsChunk = 32768;  // elements

struct StatisticsTensor {
  const void* values;     // numel elements of `dtype`
  const uint8_t* within;  // numel bytes, nonzero = counts, or null: all do
  int64_t numel;
  DType dtype;
};

// (hi + lo) * 2^exponent: compensated, and in no danger of overflow.
struct ScaledSum {
  double hi, lo;
  int64_t exponent;
};

// What one chunk, tensor or network comes to. Nothing found: counts and sums 0, min > max.
struct StatisticsPart {
  int64_t count, nonzero;
  double min, max;
  bool has_nan;  // the rest is then meaningless
  ScaledSum sum;
};

// Some magnitudes, as integers u above a common base: how many, sum of u, and the sum of
// |u_i - u_j| over the pairs i < j. Exact for less than 2^40 of them.
struct GiniGroup {
  int64_t count;
  unsigned __int128 sum, pairs;
};

// Magnitudes, not zero, whose key is in [lo, lo + span). Bin b holds the 2^shift keys from
// lo + (b << shift) on. Keys are the bits of |w| in float32 or, wide, in float64.
struct GiniRange {
  bool wide;
  uint64_t lo, span;
  int shift;
};

// Unnamed: each translation unit, hence each ISA, keeps its own copy.
namespace {

inline bool is_zero(const ScaledSum& s) { return s.hi == 0.0 && s.lo == 0.0; }

// 2^n for any n, by way of what __builtin_ldexp takes.
inline double scale_by(double x, int64_t n) {
  return __builtin_ldexp(x, n < -5000 ? -5000 : n > 5000 ? 5000 : static_cast<int>(n));
}

inline int64_t exponent_of(double x) {
  int e = 0;
  __builtin_frexp(x, &e);
  return e;
}

// a += b, with the rounding error of the addition kept in a.lo.
inline void accumulate(ScaledSum& a, ScaledSum b) {
  if (is_zero(b)) return;
  if (is_zero(a)) {
    a = b;
    return;
  }
  if (a.exponent != b.exponent && __builtin_isfinite(a.hi) && __builtin_isfinite(b.hi)) {
    // The larger one's leading bit moves to 2^0; of the smaller one, what is 2^-1000 below is lost.
    const int64_t of_a = a.exponent + exponent_of(a.hi == 0.0 ? a.lo : a.hi);
    const int64_t of_b = b.exponent + exponent_of(b.hi == 0.0 ? b.lo : b.hi);
    const int64_t common = of_a > of_b ? of_a : of_b;
    a = {scale_by(a.hi, a.exponent - common), scale_by(a.lo, a.exponent - common), common};
    b = {scale_by(b.hi, b.exponent - common), scale_by(b.lo, b.exponent - common), common};
  }
  const double sum = a.hi + b.hi, part = sum - a.hi;
  const double error = (a.hi - (sum - part)) + (b.hi - part);
  a.hi = sum;
  a.lo = __builtin_isfinite(sum) ? a.lo + (error + b.lo) : 0.0;
}

inline StatisticsPart nothing_found() {
  return {0, 0, __builtin_inf(), -__builtin_inf(), false, {0.0, 0.0, 0}};
}

inline void accumulate(StatisticsPart& a, const StatisticsPart& b) {
  a.count += b.count;
  a.nonzero += b.nonzero;
  a.min = b.min < a.min ? b.min : a.min;
  a.max = b.max > a.max ? b.max : a.max;
  a.has_nan |= b.has_nan;
  accumulate(a.sum, b.sum);
}

}  // namespace

FASTPRUNE_PER_ISA(
    // Elements [begin, end) of one tensor, at most kStatisticsChunk: the part, and the sum of |w|^p
    // for each of n_powers exponents p > 0.
    void statistics_chunk(const StatisticsTensor& tensor, int64_t begin, int64_t end,
                          const double* p, int64_t n_powers, StatisticsPart* part,
                          ScaledSum* powers);
    // Adds the elements [begin, end) in the range to counts[bin].
    void gini_histogram(const StatisticsTensor& tensor, int64_t begin, int64_t end,
                        const GiniRange& range, uint32_t* counts);
    // Writes what is left of their keys inside the bin to out[cursors[bin]++]: uint16 or, wide,
    // uint64.
    void gini_scatter(const StatisticsTensor& tensor, int64_t begin, int64_t end,
                      const GiniRange& range, uint32_t* cursors, void* out);
    // The group of `count` such numbers below 2^bits; they are overwritten.
    // scratch: kGiniScratch bytes.
    GiniGroup gini_group(bool wide, void* keys, int64_t count, int bits, void* scratch);)

constexpr int64_t kGiniScratch = int64_t{4} << 15;

}  // namespace fastprune
