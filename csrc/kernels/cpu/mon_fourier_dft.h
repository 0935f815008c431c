// Discrete Fourier transforms of lines of complex vectors (a vector of real, one of imaginary
// parts), in place. The lanes are transforms of their own.
#pragma once

#include "kernels/cpu/mon_fourier.h"
#include "kernels/cpu/simd.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

template <typename T>
inline void dft_2(Vec<T>* x, const int32_t* places) {
  Vec<T>*a = x + places[0], *b = x + places[1];
  const Vec<T> ar = a[0], ai = a[1], br = b[0], bi = b[1];
  a[0] = ar + br, a[1] = ai + bi;
  b[0] = ar - br, b[1] = ai - bi;
}

// Powers of 2 from 4 on: Stockham's passes by 4, the last by 2 where that is left. work: 4 n.
template <typename T>
void dft_power_of_2(Vec<T>* x, const FourierFactor& f, const int32_t* places, Vec<T>* work) {
  const int64_t n = f.length;
  const T* table = static_cast<const T*>(f.table);
  Vec<T>*from = work, *to = work + 2 * n;
  for (int64_t i = 0; i < n; ++i) {
    from[2 * i] = x[places[i]], from[2 * i + 1] = x[places[i] + 1];
  }
  int64_t left = n, stride = 1;
  for (; left >= 4; left /= 4, stride *= 4) {
    const int64_t quarter = left / 4;
    for (int64_t p = 0; p < quarter; ++p) {
      const auto twiddle = [&](int64_t times, T& re, T& im) {
        re = table[2 * (times * p * stride)], im = table[2 * (times * p * stride) + 1];
      };
      T r1, i1, r2, i2, r3, i3;
      twiddle(1, r1, i1), twiddle(2, r2, i2), twiddle(3, r3, i3);
      for (int64_t q = 0; q < stride; ++q) {
        const Vec<T>* a = from + 2 * (q + stride * p);
        const Vec<T>*b = a + 2 * stride * quarter, *c = b + 2 * stride * quarter,
              *d = c + 2 * stride * quarter;
        const Vec<T> sr = a[0] + c[0], si = a[1] + c[1], dr = a[0] - c[0], di = a[1] - c[1];
        const Vec<T> tr = b[0] + d[0], ti = b[1] + d[1], er = b[0] - d[0], ei = b[1] - d[1];
        Vec<T>* y = to + 2 * (q + stride * 4 * p);
        const auto put = [&](int64_t i, Vec<T> re, Vec<T> im, T wr, T wi) {
          y[2 * stride * i] = re * wr - im * wi, y[2 * stride * i + 1] = re * wi + im * wr;
        };
        y[0] = sr + tr, y[1] = si + ti;
        put(1, dr + ei, di - er, r1, i1);
        put(2, sr - tr, si - ti, r2, i2);
        put(3, dr - ei, di + er, r3, i3);
      }
    }
    Vec<T>* swap = from;
    from = to, to = swap;
  }
  if (left == 2) {
    for (int64_t q = 0; q < stride; ++q) {
      const Vec<T>*a = from + 2 * q, *b = a + 2 * stride;
      Vec<T>*y = to + 2 * q, *y1 = y + 2 * stride;
      y[0] = a[0] + b[0], y[1] = a[1] + b[1];
      y1[0] = a[0] - b[0], y1[1] = a[1] - b[1];
    }
    from = to;
  }
  for (int64_t i = 0; i < n; ++i) {
    x[places[i]] = from[2 * i], x[places[i] + 1] = from[2 * i + 1];
  }
}

template <typename T>
struct Complex {
  Vec<T> re, im;
};
template <typename T>
inline Complex<T> operator+(Complex<T> a, Complex<T> b) {
  return {a.re + b.re, a.im + b.im};
}
template <typename T>
inline Complex<T> operator-(Complex<T> a, Complex<T> b) {
  return {a.re - b.re, a.im - b.im};
}
template <typename T>
inline Complex<T> load_complex(const Vec<T>* p) {
  return {p[0], p[1]};
}
template <typename T>
inline void store_complex(Vec<T>* p, Complex<T> x) {
  p[0] = x.re, p[1] = x.im;
}

// X_k = c - i s and X_-k = c + i s.
template <typename T>
inline void put_pair(Vec<T>* x, Vec<T>* mirror, Vec<T> cr, Vec<T> ci, Vec<T> sr, Vec<T> si) {
  x[0] = cr + si, x[1] = ci - sr;
  mirror[0] = cr - si, mirror[1] = ci + sr;
}

// Odd lengths n: with s_t = x_t + x_-t and d_t = x_t - x_-t, t <= n / 2,
// X_k = x_0 + sum_t s_t cos(2 pi k t / n) - i sum_t d_t sin(2 pi k t / n), and X_-k with the other
// sign. K outputs k, and their X_-k, from the block of the table that starts with output `first`.
template <typename T, int K>
inline void odd_outputs(Vec<T>* x, const int32_t* places, int64_t n, int64_t half, int64_t first,
                        const Vec<T>* sums, const T* table, Vec<T> re, Vec<T> im) {
  Vec<T> cr[K], ci[K], sr[K], si[K];
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k) cr[k] = re, ci[k] = im, sr[k] = Vec<T>{}, si[k] = Vec<T>{};
  for (int64_t t = 0; t < half; ++t, sums += 4, table += 2 * K) {
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      cr[k] += sums[0] * table[k], ci[k] += sums[1] * table[k];
      sr[k] += sums[2] * table[K + k], si[k] += sums[3] * table[K + k];
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k) {
    const int64_t at = first + k;
    put_pair<T>(x + places[at], x + places[n - at], cr[k], ci[k], sr[k], si[k]);
  }
}

// All outputs but X_0, from the sums and differences.
template <typename T>
__attribute__((always_inline)) inline void odd_rest(Vec<T>* x, const int32_t* places, int64_t n,
                                                    const Vec<T>* sums, const T* table, Vec<T> re,
                                                    Vec<T> im) {
  const int64_t half = n / 2;
  int64_t k = 1;
  for (; k + 3 <= half; k += 4, table += 8 * half) {
    odd_outputs<T, 4>(x, places, n, half, k, sums, table, re, im);
  }
  switch (half + 1 - k) {
    case 3:
      odd_outputs<T, 3>(x, places, n, half, k, sums, table, re, im);
      break;
    case 2:
      odd_outputs<T, 2>(x, places, n, half, k, sums, table, re, im);
      break;
    case 1:
      odd_outputs<T, 1>(x, places, n, half, k, sums, table, re, im);
      break;
    default:
      break;
  }
}

// Primes p = 4 q + 1. In the order of the powers of g, output g^a takes input g^b times the cosine
// c(a + b) of g^(a + b); as g^2q = -1, that has period 2 q. So the sums of the outputs a and
// a + q hang on s_b + s_(b + q) only, their differences on s_b - s_(b + q): half the products. The
// table has for K outputs a and each b < q: (c(a + b) + c(a + b + q)) / 2 of each a,
// (c(a + b) - c(a + b + q)) / 2, then the sines for output a of inputs b and b + q, for output
// a + q of b and b + q.
template <typename T, int K>
inline void split_outputs(Vec<T>* x, const int32_t* places, int64_t n, int64_t first,
                          const Vec<T>* sums, const T* table, Vec<T> re, Vec<T> im) {
  const int64_t quarter = n / 4;
  Vec<T> ur[K], ui[K], vr[K] = {}, vi[K] = {}, ar[K] = {}, ai[K] = {}, br[K] = {}, bi[K] = {};
#pragma GCC unroll 2
  for (int k = 0; k < K; ++k) ur[k] = re, ui[k] = im;
  for (int64_t t = 0; t < quarter; ++t, sums += 8, table += 6 * K) {
#pragma GCC unroll 2
    for (int k = 0; k < K; ++k) {
      const T* of = table + k;
      ur[k] += sums[0] * of[0], ui[k] += sums[1] * of[0];
      vr[k] += sums[2] * of[K], vi[k] += sums[3] * of[K];
      ar[k] += sums[4] * of[2 * K], ai[k] += sums[5] * of[2 * K];
      br[k] += sums[4] * of[4 * K], bi[k] += sums[5] * of[4 * K];
      ar[k] += sums[6] * of[3 * K], ai[k] += sums[7] * of[3 * K];
      br[k] += sums[6] * of[5 * K], bi[k] += sums[7] * of[5 * K];
    }
  }
#pragma GCC unroll 2
  for (int k = 0; k < K; ++k) {
    const int64_t a = first + k, b = a + quarter;
    put_pair<T>(x + places[a], x + places[n - a], ur[k] + vr[k], ui[k] + vi[k], ar[k], ai[k]);
    put_pair<T>(x + places[b], x + places[n - b], ur[k] - vr[k], ui[k] - vi[k], br[k], bi[k]);
  }
}
template <typename T>
inline void split_rest(Vec<T>* x, const int32_t* places, int64_t n, const Vec<T>* sums,
                       const T* table, Vec<T> re, Vec<T> im) {
  const int64_t quarter = n / 4;
  int64_t k = 1;
  for (; k + 1 <= quarter; k += 2, table += 12 * quarter) {
    split_outputs<T, 2>(x, places, n, k, sums, table, re, im);
  }
  if (k <= quarter) split_outputs<T, 1>(x, places, n, k, sums, table, re, im);
}

// One value of an odd length n, or both of twice that: their sum and their difference, which are
// transformed apart.
template <typename T, int Copies>
__attribute__((always_inline)) inline void load_copies(const Vec<T>* x, const int32_t* places,
                                                       int64_t t, int64_t n, Complex<T>* values) {
  const Complex<T> a = load_complex<T>(x + places[t]);
  values[0] = a;
  if constexpr (Copies == 2) {
    const Complex<T> b = load_complex<T>(x + places[n + t]);
    values[0] = a + b, values[1] = a - b;
  }
}

// Writes the sums and differences of x_t and x_-t, 2 n vectors for each copy; first: x_0 of the
// copies, all: X_0.
template <typename T, int Copies>
__attribute__((always_inline)) inline void odd_sums(const Vec<T>* x, const int32_t* places,
                                                    int64_t n, bool split, Vec<T>* to,
                                                    Complex<T>* first, Complex<T>* all) {
  const auto load = [&](int64_t t, Complex<T>* values) __attribute__((always_inline)) {
    load_copies<T, Copies>(x, places, t, n, values);
  };
  load(0, first);
  for (int c = 0; c < Copies; ++c) all[c] = first[c];
  Complex<T> a[Copies], minus_a[Copies], b[Copies], minus_b[Copies];
  if (split) {
    for (int64_t t = 1; t <= n / 4; ++t, to += 8) {
      const int64_t u = t + n / 4;
      load(t, a), load(n - t, minus_a), load(u, b), load(n - u, minus_b);
#pragma GCC unroll 2
      for (int c = 0; c < Copies; ++c) {
        Vec<T>* s = to + c * 2 * n;
        const Complex<T> sum_a = a[c] + minus_a[c], sum_b = b[c] + minus_b[c], sum = sum_a + sum_b;
        store_complex<T>(s, sum), store_complex<T>(s + 2, sum_a - sum_b);
        store_complex<T>(s + 4, a[c] - minus_a[c]), store_complex<T>(s + 6, b[c] - minus_b[c]);
        all[c] = all[c] + sum;
      }
    }
  } else {
    for (int64_t t = 1; t <= n / 2; ++t, to += 4) {
      load(t, a), load(n - t, minus_a);
#pragma GCC unroll 2
      for (int c = 0; c < Copies; ++c) {
        Vec<T>* s = to + c * 2 * n;
        const Complex<T> sum = a[c] + minus_a[c];
        store_complex<T>(s, sum), store_complex<T>(s + 2, a[c] - minus_a[c]);
        all[c] = all[c] + sum;
      }
    }
  }
}
template <typename T>
__attribute__((always_inline)) inline void odd_outputs_of(Vec<T>* x, const FourierFactor& f,
                                                          const int32_t* places, int64_t n,
                                                          bool split, const Vec<T>* sums, Vec<T> re,
                                                          Vec<T> im) {
  const T* table = static_cast<const T*>(f.table);
  if (split) {
    split_rest<T>(x, places, n, sums, table, re, im);
  } else {
    odd_rest<T>(x, places, n, sums, table, re, im);
  }
}

// An odd number n of values, or (Copies: 2) twice that. work: 2 n for each copy. Odd: n where it is
// known when compiling, or 0.
template <typename T, int Odd, int Copies>
void dft_odd(Vec<T>* x, const FourierFactor& f, const int32_t* places, Vec<T>* work) {
  const int64_t n = Odd > 0 ? Odd : f.odd;
  const bool split = Odd == 0 && f.split;
  Complex<T> first[Copies], all[Copies];
  odd_sums<T, Copies>(x, places, n, split, work, first, all);
  for (int c = 0; c < Copies; ++c) {
    const int32_t* of = places + c * n;
    store_complex<T>(x + of[0], all[c]);
    odd_outputs_of<T>(x, f, of, n, split, work + c * 2 * n, first[c].re, first[c].im);
  }
}

template <typename T>
__attribute__((noinline)) void dft_line(const FourierLine& line, Vec<T>* x, Vec<T>* work) {
  for (int i = 0; i < line.factors; ++i) {
    const FourierFactor& f = line.factor[i];
    const int32_t* end = f.places + line.length;
    const auto each = [&](auto transform) {
      for (const int32_t* p = f.places; p < end; p += f.length) transform(p);
    };
    switch (f.length) {
      case 2:
        each([&](const int32_t* p) { dft_2<T>(x, p); });
        break;
      case 3:
        each([&](const int32_t* p) { dft_odd<T, 3, 1>(x, f, p, work); });
        break;
      case 5:
        each([&](const int32_t* p) { dft_odd<T, 5, 1>(x, f, p, work); });
        break;
      case 6:
        each([&](const int32_t* p) { dft_odd<T, 3, 2>(x, f, p, work); });
        break;
      case 10:
        each([&](const int32_t* p) { dft_odd<T, 5, 2>(x, f, p, work); });
        break;
      default:
        if (f.odd == 1) {
          each([&](const int32_t* p) { dft_power_of_2<T>(x, f, p, work); });
        } else if (f.odd == f.length) {
          each([&](const int32_t* p) { dft_odd<T, 0, 1>(x, f, p, work); });
        } else {
          each([&](const int32_t* p) { dft_odd<T, 0, 2>(x, f, p, work); });
        }
    }
  }
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
