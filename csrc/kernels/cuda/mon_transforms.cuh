// Fourier transforms of a block's maps, for mon_fourier.cu: sums over a line with a table of its
// roots of unity. Maps are short; outputs k and length - k share their sums.
#pragma once

#include "kernels/cuda/mon_math.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// Of four samples.
template <typename T>
struct Complex4 {
  Lanes<T, 4> re, im;
};
template <typename T>
struct alignas(2 * sizeof(T)) Root {
  T cosine, sine;
};

// The frequencies (ky, kx), kx <= width / 2; of those that are each other's conjugates one only.
struct Spectrum {
  int height, width;

  FASTPRUNE_HOST_DEVICE int columns() const { return width / 2 + 1; }
  FASTPRUNE_HOST_DEVICE bool own_mirror(int kx) const { return kx == 0 || 2 * kx == width; }
  FASTPRUNE_HOST_DEVICE int column_height(int kx) const {
    return own_mirror(kx) ? height / 2 + 1 : height;
  }
  FASTPRUNE_HOST_DEVICE int column_begin(int kx) const {
    return kx == 0 ? 0 : height / 2 + 1 + (kx - 1) * height;
  }
  FASTPRUNE_HOST_DEVICE int frequencies() const {
    return column_begin(columns() - 1) + column_height(columns() - 1);
  }
};

#if defined(FASTPRUNE_EMULATED) || defined(__CUDACC__)

constexpr int kMapThreads = 256;
constexpr int kLines = 4;  // of the rows that a thread transforms at once: roots are read once
constexpr int kPairs = 2;  // of outputs of a column

// e^(2 pi i k / length).
template <typename T>
__device__ __forceinline__ Root<T> root_of(int64_t k, int length) {
  const double turns = 2 * static_cast<double>(k) / length;
#if defined(FASTPRUNE_EMULATED)
  constexpr double kPi = 3.14159265358979323846;
  return {static_cast<T>(cos(kPi * turns)), static_cast<T>(sin(kPi * turns))};
#else
  return {static_cast<T>(cospi(turns)), static_cast<T>(sinpi(turns))};
#endif
}

template <typename T>
__device__ __forceinline__ void add_product(Lanes<T, 4>& sum, const Lanes<T, 4>& x, T by) {
#pragma unroll
  for (int t = 0; t < 4; ++t) sum.at[t] += x.at[t] * by;
}
template <typename T>
__device__ __forceinline__ Lanes<T, 4> added(const Lanes<T, 4>& a, const Lanes<T, 4>& b, T sign) {
  Lanes<T, 4> c;
#pragma unroll
  for (int t = 0; t < 4; ++t) c.at[t] = a.at[t] + sign * b.at[t];
  return c;
}

// Real rows, in place: x and width - x become their sum and their difference.
template <typename T>
__device__ __forceinline__ void fold_rows(Lanes<T, 4>* maps, const Spectrum& s) {
  const int half = (s.width - 1) / 2;
  for (int i = static_cast<int>(threadIdx.x); i < s.height * half; i += kMapThreads) {
    Lanes<T, 4>* row = maps + i / half * s.width;
    const int x = i % half + 1;
    const Lanes<T, 4> a = row[x], b = row[s.width - x];
    row[x] = added(a, b, T(1));
    row[s.width - x] = added(a, b, T(-1));
  }
}

// Folded real rows to their frequencies kx <= width / 2.
template <typename T>
__device__ __forceinline__ void rows_forward(const Lanes<T, 4>* maps, Complex4<T>* to,
                                             const Root<T>* roots, const Spectrum& s) {
  const int columns = s.columns(), last = (s.width - 1) / 2,
            units = (s.height + kLines - 1) / kLines;
  for (int i = static_cast<int>(threadIdx.x); i < units * columns; i += kMapThreads) {
    const int kx = i % columns, first = i / columns * kLines;
    const Lanes<T, 4>* row[kLines];
    Complex4<T> sum[kLines];
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      row[l] = maps + (first + l < s.height ? first + l : s.height - 1) * s.width;
      sum[l].re = row[l][0];
      sum[l].im = {};
    }
    int at = 0;
    for (int x = 1; x <= last; ++x) {
      at += kx;
      if (at >= s.width) at -= s.width;
      const Root<T> root = roots[at];
#pragma unroll
      for (int l = 0; l < kLines; ++l) {
        add_product(sum[l].re, row[l][x], root.cosine);
        add_product(sum[l].im, row[l][s.width - x], -root.sine);
      }
    }
    if (s.width % 2 == 0) {
      const T sign = kx % 2 == 0 ? T(1) : T(-1);
#pragma unroll
      for (int l = 0; l < kLines; ++l) add_product(sum[l].re, row[l][s.width / 2], sign);
    }
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      if (first + l < s.height) to[(first + l) * columns + kx] = sum[l];
    }
  }
}

// The real rows of frequencies that were weighted as each other's conjugates.
template <typename T>
__device__ __forceinline__ void rows_inverse(const Complex4<T>* from, Lanes<T, 4>* maps,
                                             const Root<T>* roots, const Spectrum& s) {
  const int columns = s.columns(), units = (s.height + kLines - 1) / kLines;
  for (int i = static_cast<int>(threadIdx.x); i < units * columns; i += kMapThreads) {
    const int x = i % columns, first = i / columns * kLines;
    const Complex4<T>* row[kLines];
    Lanes<T, 4> even[kLines], odd[kLines];
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      row[l] = from + (first + l < s.height ? first + l : s.height - 1) * columns;
      even[l] = {}, odd[l] = {};
    }
    int at = 0;
    for (int kx = 0; kx < columns; ++kx) {
      const Root<T> root = roots[at];
#pragma unroll
      for (int l = 0; l < kLines; ++l) {
        add_product(even[l], row[l][kx].re, root.cosine);
        add_product(odd[l], row[l][kx].im, root.sine);
      }
      at += x;
      if (at >= s.width) at -= s.width;
    }
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      if (first + l >= s.height) continue;
      Lanes<T, 4>* to = maps + (first + l) * s.width;
      to[x] = added(even[l], odd[l], T(-1));
      if (!s.own_mirror(x)) to[s.width - x] = added(even[l], odd[l], T(1));
    }
  }
}

// Columns, forward or inverse.
template <typename T>
__device__ __forceinline__ void transform_columns(const Complex4<T>* from, Complex4<T>* to,
                                                  const Root<T>* roots, const Spectrum& s,
                                                  bool inverse) {
  const int columns = s.columns(), outputs = s.height / 2 + 1;
  const int units = (outputs + kPairs - 1) / kPairs;
  for (int i = static_cast<int>(threadIdx.x); i < units * columns; i += kMapThreads) {
    const int kx = i % columns, first = i / columns * kPairs;
    Complex4<T> cosines[kPairs], sines[kPairs];
    int at[kPairs];
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      cosines[p] = from[kx];
      sines[p] = {};
      at[p] = 0;
    }
    for (int y = 1; y < s.height; ++y) {
      const Complex4<T> v = from[y * columns + kx];
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        at[p] += first + p;
        if (at[p] >= s.height) at[p] -= s.height;
        const Root<T> root = roots[at[p]];
        add_product(cosines[p].re, v.re, root.cosine);
        add_product(cosines[p].im, v.im, root.cosine);
        add_product(sines[p].re, v.re, root.sine);
        add_product(sines[p].im, v.im, root.sine);
      }
    }
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const int k = first + p, mirror = k == 0 ? 0 : s.height - k;
      if (k >= outputs) continue;
      // cosines - i sines, and cosines + i sines.
      const Complex4<T> minus{added(cosines[p].re, sines[p].im, T(1)),
                              added(cosines[p].im, sines[p].re, T(-1))};
      const Complex4<T> plus{added(cosines[p].re, sines[p].im, T(-1)),
                             added(cosines[p].im, sines[p].re, T(1))};
      to[(inverse ? mirror : k) * columns + kx] = minus;
      if (mirror != k) to[(inverse ? k : mirror) * columns + kx] = plus;
    }
  }
}

#endif

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
