// Activations into panels: a row per feature, the batch entries of a tile in the lanes.
#pragma once

#include "kernels/cpu/activations.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// panel[k * tile + j] = source[j * stride + k] for j < n, 0 for n <= j < tile.
template <typename S>
void pack_transposed(const S* source, int64_t stride, int n, int64_t k_count, int tile,
                     Accumulator<S>* panel) {
  using T = Accumulator<S>;
  constexpr int W = kLanes<T>;
  for (int j = 0; j < tile; j += W) {
    const int here = n - j < W ? n - j : W;
    for (int64_t k = 0; k < k_count; k += W) {
      const int wide = k_count - k < W ? static_cast<int>(k_count - k) : W;
      Vec<T> block[W];
      if (here == W && wide == W) {  // unrolled, so that the block stays in registers
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = load_widened(source + (j + i) * stride + k, W);
        transpose<T>(block);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(panel + (k + i) * tile + j, block[i]);
        continue;
      }
      for (int i = 0; i < W; ++i) {
        block[i] = i < here ? load_widened(source + (j + i) * stride + k, wide) : Vec<T>{};
      }
      transpose<T>(block);
      for (int i = 0; i < wide; ++i) store(panel + (k + i) * tile + j, block[i]);
    }
  }
}

// panel[k * tile + j] = source[k * stride + j] for j < n, 0 for n <= j < tile.
template <typename S>
void pack_rows(const S* source, int64_t stride, int n, int64_t k_count, int tile,
               Accumulator<S>* panel) {
  using T = Accumulator<S>;
  constexpr int W = kLanes<T>;
  for (int64_t k = 0; k < k_count; ++k, source += stride, panel += tile) {
    for (int j = 0; j < tile; j += W) {
      const int here = n - j < W ? n - j : W;
      store(panel + j, here > 0 ? load_widened(source + j, here) : Vec<T>{});
    }
  }
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
