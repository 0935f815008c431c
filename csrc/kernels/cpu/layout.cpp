#include "kernels/cpu/layout.h"

#include "kernels/cpu/activations.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// Blocks of kLanes x kLanes in registers. `from` is walked along its rows, four blocks at a time,
// so that each of the kLanes streams is read for a few cache lines in a row.
template <typename T>
void transpose_blocks(const T* from, int64_t rows, int64_t cols, T* to, int64_t begin,
                      int64_t end) {
  constexpr int W = kLanes<T>;
  constexpr int64_t kStrip = 4 * W;
  for (int64_t j0 = begin; j0 < end; j0 += kStrip) {
    const int64_t strip = least(end, j0 + kStrip);
    for (int64_t i = 0; i < rows; i += W) {
      const int high = static_cast<int>(least(W, rows - i));
      for (int64_t j = j0; j < strip; j += W) {
        const int wide = static_cast<int>(least(W, strip - j));
        Vec<T> block[W];
        if (high == W && wide == W) {  // unrolled, so that the block stays in registers
#pragma GCC unroll 16
          for (int k = 0; k < W; ++k) block[k] = load(from + (i + k) * cols + j);
          transpose<T>(block);
#pragma GCC unroll 16
          for (int k = 0; k < W; ++k) store(to + (j + k) * rows + i, block[k]);
          continue;
        }
        for (int k = 0; k < W; ++k) {
          block[k] = k < high ? load_part(from + (i + k) * cols + j, wide) : Vec<T>{};
        }
        transpose<T>(block);
        for (int k = 0; k < wide; ++k) store_part(to + (j + k) * rows + i, block[k], high);
      }
    }
  }
}

void transpose_halves(const uint16_t* from, int64_t rows, int64_t cols, uint16_t* to, int64_t begin,
                      int64_t end) {
  constexpr int64_t kBlock = 32;  // a cache line of either side
  for (int64_t j0 = begin; j0 < end; j0 += kBlock) {
    for (int64_t i0 = 0; i0 < rows; i0 += kBlock) {
      for (int64_t j = j0; j < least(end, j0 + kBlock); ++j) {
        for (int64_t i = i0; i < least(rows, i0 + kBlock); ++i)
          to[j * rows + i] = from[i * cols + j];
      }
    }
  }
}

template <typename S>
void affine_planes(const AffineArgs& a, int64_t begin, int64_t end) {
  using T = Accumulator<S>;
  constexpr int64_t W = kLanes<T>;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t c = p % a.channels;
    const Vec<T> scale = broadcast(static_cast<const T*>(a.scale)[c]);
    const Vec<T> shift = broadcast(static_cast<const T*>(a.shift)[c]);
    const S* x = static_cast<const S*>(a.x) + p * a.inner;
    S* y = static_cast<S*>(a.y) + p * a.inner;
    for (int64_t i = 0; i < a.inner; i += W) {
      const int n = static_cast<int>(least(W, a.inner - i));
      finish_vector<S>(load_widened(x + i, n) * scale + shift, y + i, nullptr, a.relu, n);
    }
  }
}

}  // namespace

void transpose_matrix(DType dtype, const void* from, int64_t rows, int64_t cols, void* to,
                      int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::f32:
      return transpose_blocks(static_cast<const float*>(from), rows, cols, static_cast<float*>(to),
                              begin, end);
    case DType::f64:
      return transpose_blocks(static_cast<const double*>(from), rows, cols,
                              static_cast<double*>(to), begin, end);
    default:
      return transpose_halves(static_cast<const uint16_t*>(from), rows, cols,
                              static_cast<uint16_t*>(to), begin, end);
  }
}

void affine(const AffineArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::f32:
      return affine_planes<float>(a, begin, end);
    case DType::f64:
      return affine_planes<double>(a, begin, end);
    case DType::bf16:
      return affine_planes<BFloat16>(a, begin, end);
    case DType::f16:
      return affine_planes<Float16>(a, begin, end);
  }
}

}  // namespace fastprune::FASTPRUNE_ISA
