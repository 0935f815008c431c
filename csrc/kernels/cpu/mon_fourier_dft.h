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
    Vec<T>*y = x + places[first + k], *mirror = x + places[n - first - k];
    y[0] = cr[k] + si[k], y[1] = ci[k] - sr[k];
    mirror[0] = cr[k] - si[k], mirror[1] = ci[k] + sr[k];
  }
}

// All outputs but X_0, of what odd_sums has written.
template <typename T>
inline void odd_rest(Vec<T>* x, const int32_t* places, int64_t n, const Vec<T>* sums,
                     const T* table, Vec<T> re, Vec<T> im) {
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
template <typename T>
inline void put_sums(Vec<T>* s, Vec<T> ar, Vec<T> ai, Vec<T> br, Vec<T> bi, Vec<T>& all_re,
                     Vec<T>& all_im) {
  s[0] = ar + br, s[1] = ai + bi, s[2] = ar - br, s[3] = ai - bi;
  all_re += s[0], all_im += s[1];
}

// Length: known when compiling, or 0. work: 2 n.
template <typename T, int Length>
void dft_odd(Vec<T>* x, const FourierFactor& f, const int32_t* places, Vec<T>* work) {
  const int64_t n = Length > 0 ? Length : f.length;
  const Vec<T> re = x[places[0]], im = x[places[0] + 1];
  Vec<T> sum_re = re, sum_im = im;
  for (int64_t t = 1; t <= n / 2; ++t) {
    const Vec<T>*a = x + places[t], *b = x + places[n - t];
    put_sums<T>(work + 4 * (t - 1), a[0], a[1], b[0], b[1], sum_re, sum_im);
  }
  x[places[0]] = sum_re, x[places[0] + 1] = sum_im;
  odd_rest<T>(x, places, n, work, static_cast<const T*>(f.table), re, im);
}

// Twice an odd number n: sums and differences of the two, which are transformed as above. work:
// 4 n. Odd: known when compiling, or 0.
template <typename T, int Odd>
void dft_twice_odd(Vec<T>* x, const FourierFactor& f, const int32_t* places, Vec<T>* work) {
  const int64_t n = Odd > 0 ? Odd : f.odd;
  const int32_t* others = places + n;
  Vec<T>*a = x + places[0], *b = x + others[0], *differences = work + 2 * n;
  const Vec<T> re = a[0] + b[0], im = a[1] + b[1], re_d = a[0] - b[0], im_d = a[1] - b[1];
  Vec<T> sum_re = re, sum_im = im, sum_re_d = re_d, sum_im_d = im_d;
  for (int64_t t = 1; t <= n / 2; ++t) {
    const Vec<T>*a0 = x + places[t], *a1 = x + others[t];
    const Vec<T>*b0 = x + places[n - t], *b1 = x + others[n - t];
    put_sums<T>(work + 4 * (t - 1), a0[0] + a1[0], a0[1] + a1[1], b0[0] + b1[0], b0[1] + b1[1],
                sum_re, sum_im);
    put_sums<T>(differences + 4 * (t - 1), a0[0] - a1[0], a0[1] - a1[1], b0[0] - b1[0],
                b0[1] - b1[1], sum_re_d, sum_im_d);
  }
  a[0] = sum_re, a[1] = sum_im, b[0] = sum_re_d, b[1] = sum_im_d;
  const T* table = static_cast<const T*>(f.table);
  odd_rest<T>(x, places, n, work, table, re, im);
  odd_rest<T>(x, others, n, differences, table, re_d, im_d);
}

template <typename T>
void dft_line(const FourierLine& line, Vec<T>* x, Vec<T>* work) {
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
        each([&](const int32_t* p) { dft_odd<T, 3>(x, f, p, work); });
        break;
      case 5:
        each([&](const int32_t* p) { dft_odd<T, 5>(x, f, p, work); });
        break;
      case 6:
        each([&](const int32_t* p) { dft_twice_odd<T, 3>(x, f, p, work); });
        break;
      case 10:
        each([&](const int32_t* p) { dft_twice_odd<T, 5>(x, f, p, work); });
        break;
      default:
        if (f.odd == 1) {
          each([&](const int32_t* p) { dft_power_of_2<T>(x, f, p, work); });
        } else if (f.odd == f.length) {
          each([&](const int32_t* p) { dft_odd<T, 0>(x, f, p, work); });
        } else {
          each([&](const int32_t* p) { dft_twice_odd<T, 0>(x, f, p, work); });
        }
    }
  }
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
