#include "kernels/cpu/mon_fourier.h"
#include "kernels/cpu/simd.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 8;  // three sums each, of 32 registers
#else
constexpr int kRows = 4;  // two sums each, of 16
#endif

// R rows of a block whose columns are `pitch` elements apart, times the C complex vectors of x.
template <typename T, int R>
inline void row_products(const T* matrix, int64_t pitch, const Vec<T>* x, int64_t channels,
                         Vec<T>* y) {
#if defined(__AVX512F__)
  // Three products instead of four: with a = sum mr xr, b = sum mi xi and
  // c = sum (mr + mi)(xr + xi), the result is (a - b) + i (c - a - b). Additions have units of
  // their own beside those of products on some processors, and cost no more on the others.
  Vec<T> a[R] = {}, b[R] = {}, c[R] = {};
  for (int64_t j = 0; j < channels; ++j, matrix += pitch) {
    const Vec<T> xr = x[2 * j], xi = x[2 * j + 1], xs = xr + xi;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> mr = broadcast(matrix[2 * r]), mi = broadcast(matrix[2 * r + 1]);
      a[r] += xr * mr, b[r] += xi * mi, c[r] += xs * (mr + mi);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) y[2 * r] = a[r] - b[r], y[2 * r + 1] = c[r] - a[r] - b[r];
#else
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
#endif
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

// Images in the lanes: a block of rows is read once for all of them.
template <typename T>
void image_products(const MonFourierProducts& p, int64_t begin, int64_t end, Vec<T>* input) {
  const int64_t C = p.layout.channels, blocks = p.layout.blocks();
  for (int64_t f = begin; f < end; ++f) {
    const T* matrix = static_cast<const T*>(p.matrix) + f * 2 * C * C;
    Vec<T>* spectrum = static_cast<Vec<T>*>(p.spectrum) + f * blocks * 2 * C;
    for (int64_t i = 0; i < blocks * 2 * C; ++i) input[i] = spectrum[i];
    for (int64_t b = 0; b < matrix_blocks(C); ++b) {
      const int64_t first = matrix_block_begin(C, b), rows = matrix_block_begin(C, b + 1) - first;
      const int64_t parts = (rows + kRows - 1) / kRows;
      for (int64_t block = 0; block < blocks; ++block) {
        if (p.block_moves[block] == 0) continue;
        for (int64_t i = 0; i < parts; ++i) {
          const int64_t from = rows * i / parts, to = rows * (i + 1) / parts;
          rows_of<T>(to - from, matrix + 2 * from, 2 * rows, input + block * 2 * C, C,
                     spectrum + 2 * (block * C + first + from));
        }
      }
      matrix += 2 * rows * C;
    }
  }
}

// Channels in the lanes: a column of a block is one vector (or V), real and imaginary parts side by
// side, which is multiplied by the real and by the imaginary parts of I images. x: [channel][image]
// [2]; y: [image][block's vectors].
template <typename T, int I>
void column_products(const T* matrix, const T* end, int64_t pitch, const T* x, int64_t channels,
                     T* y) {
  constexpr int W = kLanes<T>, V = 2 * kMatrixRows > W ? 2 * kMatrixRows / W : 1;
  // Few sums at a time where a column is many vectors.
  for (int v = 0; v < V; ++v) {
    Vec<T> re[I] = {}, im[I] = {};
    const T* column = matrix + v * W;
    for (int64_t j = 0; j < channels; ++j, column += pitch) {
      const T* images = x + j * 2 * I;
      // Behind the column are other columns, which do no harm, but for the last ones.
      const int64_t left = end - column;
      if (left <= 0) break;
      const Vec<T> m = left >= W ? load(column) : load_part(column, static_cast<int>(left));
#pragma GCC unroll 8
      for (int i = 0; i < I; ++i) re[i] += m * images[2 * i], im[i] += m * images[2 * i + 1];
    }
    for (int i = 0; i < I; ++i) {
      T* to = y + i * 2 * V * W + v * W;
      store(to, re[i]), store(to + V * W, im[i]);
    }
  }
}

template <typename T>
void channel_products(const MonFourierProducts& p, int64_t begin, int64_t end, T* input) {
  constexpr int W = kLanes<T>, V = 2 * kMatrixRows > W ? 2 * kMatrixRows / W : 1, kImages = 4;
  const int64_t C = p.layout.channels, batch = p.layout.batch, groups = p.layout.per_block();
  T* y = input + 2 * kImages * C;
  for (int64_t f = begin; f < end; ++f) {
    const T* matrix = static_cast<const T*>(p.matrix) + f * 2 * C * C;
    const T* matrix_end = matrix + 2 * C * C;
    T* spectrum = static_cast<T*>(p.spectrum) + f * batch * groups * 2 * W;
    int64_t image[kImages];
    int count = 0;
    const auto multiply = [&] {
      for (int i = 0; i < count; ++i) {
        const T* from = spectrum + image[i] * groups * 2 * W;
        for (int64_t c = 0; c < C; ++c) {
          const T* at = from + c / W * 2 * W + c % W;
          input[2 * (c * count + i)] = at[0], input[2 * (c * count + i) + 1] = at[W];
        }
      }
      const T* block = matrix;
      for (int64_t b = 0; b < matrix_blocks(C); ++b) {
        const int64_t first = matrix_block_begin(C, b), rows = matrix_block_begin(C, b + 1) - first;
        const auto run = [&](auto products) { products(block, matrix_end, 2 * rows, input, C, y); };
        switch (count) {
          case 1:
            run(&column_products<T, 1>);
            break;
          case 2:
            run(&column_products<T, 2>);
            break;
          case 3:
            run(&column_products<T, 3>);
            break;
          default:
            run(&column_products<T, kImages>);
        }
        for (int i = 0; i < count; ++i) {
          const T *re = y + i * 2 * V * W, *im = re + V * W;
          T* to = spectrum + image[i] * groups * 2 * W;
          for (int64_t r = 0; r < rows; ++r) {
            T* at = to + (first + r) / W * 2 * W + (first + r) % W;
            at[0] = re[2 * r] - im[2 * r + 1], at[W] = re[2 * r + 1] + im[2 * r];
          }
        }
        block += 2 * rows * C;
      }
      count = 0;
    };
    for (int64_t n = 0; n < batch; ++n) {
      if (p.block_moves[n] != 0) image[count++] = n;
      if (count == kImages) multiply();
    }
    if (count > 0) multiply();
  }
}

}  // namespace

int64_t mon_fourier_products_scratch(const MonFourierProducts& p) {
  // Either the input of all blocks, or that of four images and what a block makes of them.
  const int64_t vectors = p.layout.blocks() * 2 * p.layout.channels;
  return (vectors + 8 * p.layout.channels) * kVectorBytes + 8 * 2 * kMatrixRows * kVectorBytes;
}

void mon_fourier_products(const MonFourierProducts& p, int64_t begin, int64_t end, void* scratch) {
  const auto run = [&](auto by_images, auto by_channels) {
    if (p.layout.channel_lanes) {
      by_channels();
    } else {
      by_images();
    }
  };
  if (p.layout.dtype == DType::f64) {
    run([&] { image_products<double>(p, begin, end, static_cast<Vec<double>*>(scratch)); },
        [&] { channel_products<double>(p, begin, end, static_cast<double*>(scratch)); });
  } else {
    run([&] { image_products<float>(p, begin, end, static_cast<Vec<float>*>(scratch)); },
        [&] { channel_products<float>(p, begin, end, static_cast<float*>(scratch)); });
  }
}

}  // namespace fastprune::FASTPRUNE_ISA
