// From tiles of sums, a row of the weight by a few batch entries, to the result.
#pragma once

#include "kernels/cpu/activations.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// target[r * stride + j] = rows[r * tile + j] for j < n, finished.
template <typename S>
void write_rows(const Accumulator<S>* rows, int64_t row_count, int tile, int n, S* target,
                const S* residual, bool relu, int64_t stride) {
  constexpr int W = kLanes<Accumulator<S>>;
  for (int64_t r = 0; r < row_count; ++r) {
    for (int j = 0; j < n; j += W) {
      const int64_t at = r * stride + j;
      finish_vector<S>(load(rows + r * tile + j), target + at,
                       residual == nullptr ? nullptr : residual + at, relu, n - j < W ? n - j : W);
    }
  }
}

// target[j * stride + r] = rows[r * tile + j] for j < n, finished.
template <typename S>
void write_transposed(const Accumulator<S>* rows, int64_t row_count, int tile, int n, S* target,
                      const S* residual, bool relu, int64_t stride) {
  using T = Accumulator<S>;
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < row_count; r += W) {
    const int high = row_count - r < W ? static_cast<int>(row_count - r) : W;
    for (int j = 0; j < n; j += W) {
      const int here = n - j < W ? n - j : W;
      Vec<T> block[W];
      if (high == W && here == W && residual == nullptr) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = load(rows + (r + i) * tile + j);
        transpose<T>(block);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          finish_vector<S>(block[i], target + (j + i) * stride + r, nullptr, relu, W);
        }
        continue;
      }
      for (int i = 0; i < W; ++i) {
        block[i] = i < high ? load(rows + (r + i) * tile + j) : Vec<T>{};
      }
      transpose<T>(block);
      for (int i = 0; i < here; ++i) {
        const int64_t at = (j + i) * stride + r;
        finish_vector<S>(block[i], target + at, residual == nullptr ? nullptr : residual + at, relu,
                         high);
      }
    }
  }
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
