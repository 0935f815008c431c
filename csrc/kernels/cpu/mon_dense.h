// A dense square matrix times a panel: what the splitting steps spend their time in.
//
// The matrix is packed in groups of rows, the rows of a group interleaved, so that a group is read
// front to back. A register tile is a group's rows by a few vectors of the panel; narrow panels
// take several groups at once, so that as many sums are in flight.
#pragma once

#include "kernels/cpu/simd.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

constexpr int kGroupRows = 6;

inline int64_t row_groups(int64_t n) { return (n + kGroupRows - 1) / kGroupRows; }

// packed[(g * n + k) * kGroupRows + r] = matrix[(g * kGroupRows + r) * n + k], 0 past the end.
template <typename T>
void pack_groups(int64_t n, const T* matrix, T* packed, int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; ++g) {
    T* to = packed + g * n * kGroupRows;
    for (int r = 0; r < kGroupRows; ++r) {
      const int64_t row = g * kGroupRows + r;
      for (int64_t k = 0; k < n; ++k) to[k * kGroupRows + r] = row < n ? matrix[row * n + k] : T(0);
    }
  }
}

#if defined(__AVX512F__)
constexpr int kMostVectors = 4;
#else
constexpr int kMostVectors = 2;
#endif
// Columns of the matrix at a time: their rows of the panel stay in the L1 cache.
constexpr int64_t kDepthBytes = 24 << 10;

// G groups, of each the first R rows, times V vectors of the panel's lanes from `x` on.
template <typename T, int V, int G, int R>
struct RegisterTile {
  static constexpr int W = kLanes<T>;
  Vec<T> sums[G * R][V];

  inline void start(const T* from, int64_t row, int lanes) {
#pragma GCC unroll 24
    for (int i = 0; i < G * R; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sums[i][v] = from == nullptr ? Vec<T>{} : load(from + (row + i) * lanes + v * W);
      }
    }
  }
  // w: of the first group, group_size elements before the next.
  inline void add(const T* w, int64_t group_size, const T* x, int lanes, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, w += kGroupRows, x += lanes) {
      Vec<T> column[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) column[v] = load(x + v * W);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const Vec<T> value = broadcast(w[g * group_size + r]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sums[g * R + r][v] += value * column[v];
        }
      }
    }
  }
};

template <typename T, typename F>
struct DenseProduct {
  static constexpr int W = kLanes<T>;
  const T* packed;
  int64_t n;
  const T *x, *bias;  // bias: panel that the sums start from, or null
  int lanes;
  T* partial;  // panel, used where n is more than one depth
  const F& finish;

  // Rows [first, first + rows) of the lanes from `lane` on; rows <= G * R.
  template <int V, int G, int R>
  void rows(int64_t first, int64_t row_count, int lane, int64_t depth_begin, int64_t depth) const {
    RegisterTile<T, V, G, R> tile;
    const bool whole = row_count == G * R;
    const T* from = depth_begin == 0 ? bias : partial;
    if (whole || from == nullptr) {
      tile.start(from == nullptr ? nullptr : from + lane, first, lanes);
    } else {
      for (int i = 0; i < G * R; ++i) {
        for (int v = 0; v < V; ++v) {
          tile.sums[i][v] =
              i < row_count ? load(from + (first + i) * lanes + lane + v * W) : Vec<T>{};
        }
      }
    }
    tile.add(packed + (first / kGroupRows * n + depth_begin) * kGroupRows, n * kGroupRows,
             x + depth_begin * lanes + lane, lanes, depth);
    const bool last = depth_begin + depth == n;
#pragma GCC unroll 24
    for (int i = 0; i < G * R; ++i) {
      if (i >= row_count) break;
      const int64_t at = (first + i) * lanes + lane;
      if (last) {
        finish.template operator()<V>(tile.sums[i], at, lane);
      } else {
        for (int v = 0; v < V; ++v) store(partial + at + v * W, tile.sums[i][v]);
      }
    }
  }

  template <int V>
  void columns(int lane, int64_t depth_begin, int64_t depth) const {
    constexpr int G = kMostVectors / V;
    int64_t row = 0;
    for (; row + G * kGroupRows <= n; row += G * kGroupRows) {
      rows<V, G, kGroupRows>(row, G * kGroupRows, lane, depth_begin, depth);
    }
    for (; row < n; row += kGroupRows) {
      const int64_t left = n - row;
      if (left <= kGroupRows / 2) {
        rows<V, 1, kGroupRows / 2>(row, left, lane, depth_begin, depth);
      } else {
        rows<V, 1, kGroupRows>(row, left < kGroupRows ? left : kGroupRows, lane, depth_begin,
                               depth);
      }
    }
  }

  void run() const {
    const int most = lanes / W < kMostVectors ? lanes / W : kMostVectors;
    int64_t depth = kDepthBytes / (most * kVectorBytes);
    if (n <= depth + depth / 2) depth = n;
    for (int lane = 0; lane < lanes; lane += most * W) {
      for (int64_t k = 0; k < n; k += depth) {
        const int64_t here = n - k < depth ? n - k : depth;
        if (most == 4) {
          if constexpr (kMostVectors >= 4) columns<4>(lane, k, here);
        } else if (most == 2) {
          columns<2>(lane, k, here);
        } else {
          columns<1>(lane, k, here);
        }
      }
    }
  }
};

// Row r of the product is handed to finish.operator()<V>(sums, place in the panel, lane).
template <typename T, typename F>
void dense_product(const T* packed, int64_t n, const T* x, const T* bias, int lanes, T* partial,
                   const F& finish) {
  DenseProduct<T, F>{packed, n, x, bias, lanes, partial, finish}.run();
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
