#include "kernels/cpu/tensor_statistics.h"

#include <cstring>

#include "kernels/cpu/statistics_math.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// Powers of the largest magnitude stay this far, in bits, from overflow and underflow, or the sum
// is scaled: 2^900 leaves room for 2^100 terms, and what underflows is 2^-100 of the sum.
constexpr double kSafe = 900.0;
constexpr int kMostFactors = 64;  // larger integer p are like any other

// What one read of a block gives.
struct Basic {
  double sum, magnitudes, squares, min, max;
  int64_t nonzero;
};

// The sum of term(|x|) over a block; n <= kBlock.
template <typename T, typename F>
inline double sum_terms(const T* x, int64_t n, F term) {
  Doubles a{}, b{};
  int64_t i = 0;
  for (; i + 2 * kWide <= n; i += 2 * kWide) {
    a += term(magnitude(load_doubles(x + i)));
    b += term(magnitude(load_doubles(x + i + kWide)));
  }
  T rest[2 * kWide] = {};
  if (i < n) {
    std::memcpy(rest, x + i, static_cast<size_t>(n - i) * sizeof(T));
    a += term(magnitude(load_doubles(rest)));
    b += term(magnitude(load_doubles(rest + kWide)));
  }
  return sum_of(a + b);
}

template <typename T>
Basic basic(const T* x, int64_t n) {
  using Lane = typename SignedOf<sizeof(T)>::type;
  constexpr int W = kLanes<T>, kParts = W / kWide;
  Doubles sum[2]{}, magnitudes[2]{}, squares[2]{};
  Vec<T> low = broadcast(x[0]), high = low;
  Vec<Lane> nonzero{};
  const auto add = [&](const T* p) {
#pragma GCC unroll 2
    for (int j = 0; j < kParts; ++j) {
      const Doubles v = load_doubles(p + j * kWide), m = magnitude(v);
      sum[j] += v;
      magnitudes[j] += m;
      squares[j] += v * v;
    }
    nonzero -= (Vec<Lane>)(load(p) != Vec<T>{});
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Vec<T> v = load(x + i);
    low = v < low ? v : low;
    high = v > high ? v : high;
    add(x + i);
  }
  T rest[W] = {};
  std::memcpy(rest, x + i, static_cast<size_t>(n - i) * sizeof(T));
  add(rest);
  T lows[W], highs[W];
  Lane counts[W];
  store(lows, low);
  store(highs, high);
  store(counts, nonzero);
  Basic found{sum_of(sum[0] + sum[1]),
              sum_of(magnitudes[0] + magnitudes[1]),
              sum_of(squares[0] + squares[1]),
              lows[0],
              highs[0],
              0};
  for (int j = 0; j < W; ++j) {
    found.min = lows[j] < found.min ? lows[j] : found.min;
    found.max = highs[j] > found.max ? highs[j] : found.max;
    found.nonzero += counts[j];
  }
  for (; i < n; ++i) {
    found.min = x[i] < found.min ? x[i] : found.min;
    found.max = x[i] > found.max ? x[i] : found.max;
  }
  return found;
}

// log2(|x| / largest) of a block's elements; largest as split_log2 has it.
struct RelativeLogs {
  bool made;
  double whole, rest;
  alignas(64) double values[kBlock];  // then some for zeros, up to a multiple of 2 kWide
};

template <typename T>
void make_logs(const T* x, int64_t n, double largest, RelativeLogs& logs) {
  constexpr bool kSubnormal = sizeof(T) == 8;
  constexpr double kOfZero = -1e300;  // its powers are 2^-1022, which no sum notices
  Doubles whole, rest;
  split_log2<kSubnormal>(broadcast(largest), whole, rest);
  logs.whole = whole[0], logs.rest = rest[0], logs.made = true;
  const auto put = [&](const T* p, double* out) {
    const Doubles m = magnitude(load_doubles(p));
    split_log2<kSubnormal>(m, whole, rest);
    const Doubles log = (whole - logs.whole) + (rest - logs.rest);
    store(out, m > 0.0 ? log : Doubles{} + kOfZero);
  };
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) put(x + i, logs.values + i);
  for (; i < n || i % (2 * kWide) != 0; i += kWide) {
    T end[kWide] = {};
    if (i < n) std::memcpy(end, x + i, static_cast<size_t>(n - i) * sizeof(T));
    put(end, logs.values + i);
  }
}

// The sum of |x|^p over a block, in units that put its largest term near 1.
ScaledSum general_power(const RelativeLogs& logs, int64_t n, double p) {
  Doubles one{}, other{};
  for (int64_t i = 0; i < n; i += 2 * kWide) {
    one += power_of_two(load(logs.values + i) * p);
    other += power_of_two(load(logs.values + i + kWide) * p);
  }
  const double sum = sum_of(one + other);
  // sum * 2^(p * log2 of the largest): the products' errors are kept, whole parts go to the
  // exponent.
  const double a = p * logs.whole, a_error = __builtin_fma(p, logs.whole, -a);
  const double b = p * logs.rest, b_error = __builtin_fma(p, logs.rest, -b);
  const double whole_a = __builtin_rint(a), whole_b = __builtin_rint(b);
  const double fraction = (a - whole_a) + (b - whole_b) + (a_error + b_error);
  return {sum * power_of_two(broadcast(fraction))[0], 0.0,
          static_cast<int64_t>(whole_a) + static_cast<int64_t>(whole_b)};
}

template <typename T>
ScaledSum power(const T* x, int64_t n, double p, const Basic& found, double largest,
                RelativeLogs& logs) {
  if (!__builtin_isfinite(largest)) return {largest, 0.0, 0};
  const double bits = static_cast<double>(exponent_of(largest));
  const bool safe = (bits < 0 ? -bits : bits) * p <= kSafe;
  if (safe && p == 1.0) return {found.magnitudes, 0.0, 0};
  if (safe && p == 2.0) return {found.squares, 0.0, 0};
  if (safe && p == 0.5) {
    return {sum_terms(x, n, [](Doubles m) { return square_root(m); }), 0.0, 0};
  }
  if (safe && p == 3.0) return {sum_terms(x, n, [](Doubles m) { return m * m * m; }), 0.0, 0};
  if (safe && p >= 3.0 && p <= kMostFactors && p == __builtin_rint(p)) {
    const int factors = static_cast<int>(p);
    return {sum_terms(x, n, [=](Doubles m) { return integer_power(m, factors); }), 0.0, 0};
  }
  if (!logs.made) make_logs(x, n, largest, logs);
  return general_power(logs, n, p);
}

template <typename T>
ScaledSum signed_sum(const T* x, int64_t n, const Basic& found, double largest) {
  if constexpr (sizeof(T) == 8) {
    constexpr int kDown = 200;  // bits, so that no partial sum overflows
    if (largest > 0x1p900 && __builtin_isfinite(largest)) {
      double sum = 0.0, lost = 0.0;
      for (int64_t i = 0; i < n; ++i) {
        const double v = scale_by(x[i], -kDown), next = sum + v, part = next - sum;
        lost += (sum - (next - part)) + (v - part);
        sum = next;
      }
      return {sum, lost, kDown};
    }
  }
  return {found.sum, 0.0, 0};
}

template <typename T>
void chunk(const StatisticsTensor& tensor, int64_t begin, int64_t end, const double* p,
           int64_t n_powers, StatisticsPart& part, ScaledSum* powers) {
  alignas(64) T buffer[kRoom<T>];
  RelativeLogs logs;
  part = nothing_found();
  for (int64_t i = 0; i < n_powers; ++i) powers[i] = {0.0, 0.0, 0};
  for (int64_t at = begin; at < end; at += kBlock) {
    int64_t n = end - at < kBlock ? end - at : kBlock;
    const T* x = load_block(tensor, at, n, buffer);
    if (n == 0) continue;
    const Basic found = basic(x, n);
    if (__builtin_isnan(found.magnitudes)) {
      part.has_nan = true;
      return;
    }
    const double largest = found.max > -found.min ? found.max : -found.min;
    accumulate(part,
               {n, found.nonzero, found.min, found.max, false, signed_sum(x, n, found, largest)});
    if (largest == 0.0) continue;
    logs.made = false;
    for (int64_t i = 0; i < n_powers; ++i) {
      accumulate(powers[i], power(x, n, p[i], found, largest, logs));
    }
  }
}

}  // namespace

void statistics_chunk(const StatisticsTensor& tensor, int64_t begin, int64_t end, const double* p,
                      int64_t n_powers, StatisticsPart* part, ScaledSum* powers) {
  if (tensor.dtype == DType::f64) {
    chunk<double>(tensor, begin, end, p, n_powers, *part, powers);
  } else {
    chunk<float>(tensor, begin, end, p, n_powers, *part, powers);
  }
}

}  // namespace fastprune::FASTPRUNE_ISA
