#include "kernels/cpu/mon_fourier.h"
#include "kernels/cpu/simd.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 10;  // two sums each, of 32 registers
#else
constexpr int kRows = 5;
#endif

// R rows of a block whose columns are `pitch` elements apart, times the C complex vectors of x.
template <typename T, int R>
inline void row_products(const T* matrix, int64_t pitch, const Vec<T>* x, int64_t channels,
                         Vec<T>* y) {
  Vec<T> re[R] = {}, im[R] = {};
  for (int64_t j = 0; j < channels; ++j, matrix += pitch) {
    const Vec<T> xr = x[2 * j], xi = x[2 * j + 1];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const T mr = matrix[2 * r], mi = matrix[2 * r + 1];
      re[r] += xr * mr, im[r] += xi * mr;
      re[r] -= xi * mi, im[r] += xr * mi;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) y[2 * r] = re[r], y[2 * r + 1] = im[r];
}

template <typename T, int R = kRows>
inline void rows_of(int64_t rows, const T* matrix, int64_t pitch, const Vec<T>* x, int64_t channels,
                    Vec<T>* y) {
  if constexpr (R > 0) {
    if (rows == R) {
      row_products<T, R>(matrix, pitch, x, channels, y);
    } else {
      rows_of<T, R - 1>(rows, matrix, pitch, x, channels, y);
    }
  }
}

template <typename T>
void products(const MonFourierProducts& p, int64_t begin, int64_t end, Vec<T>* input) {
  const int64_t C = p.channels;
  for (int64_t f = begin; f < end; ++f) {
    const T* matrix = static_cast<const T*>(p.matrix) + f * 2 * C * C;
    Vec<T>* spectrum = static_cast<Vec<T>*>(p.spectrum) + f * p.blocks * 2 * C;
    for (int64_t i = 0; i < p.blocks * 2 * C; ++i) input[i] = spectrum[i];
    for (int64_t first = 0; first < C;) {
      const int64_t rows = matrix_block_rows(C, first);
      const int64_t parts = (rows + kRows - 1) / kRows;
      for (int64_t block = 0; block < p.blocks; ++block) {
        if (p.block_moves[block] == 0) continue;
        for (int64_t i = 0; i < parts; ++i) {
          const int64_t from = rows * i / parts, to = rows * (i + 1) / parts;
          rows_of<T>(to - from, matrix + 2 * from, 2 * rows, input + block * 2 * C, C,
                     spectrum + 2 * (block * C + first + from));
        }
      }
      matrix += 2 * rows * C;
      first += rows;
    }
  }
}

}  // namespace

int64_t mon_fourier_products_scratch(const MonFourierProducts& p) {
  return p.blocks * 2 * p.channels * kVectorBytes;
}

void mon_fourier_products(const MonFourierProducts& p, int64_t begin, int64_t end, void* scratch) {
  if (p.dtype == DType::f64) {
    products<double>(p, begin, end, static_cast<Vec<double>*>(scratch));
  } else {
    products<float>(p, begin, end, static_cast<Vec<float>*>(scratch));
  }
}

}  // namespace fastprune::FASTPRUNE_ISA
