// A dense square matrix times a panel: what the splitting steps spend their time in.
//
// The matrix is cut into depths of a few columns, whose rows of the panel stay in the L1 cache, and
// each depth is packed in groups of rows, the rows of a group interleaved: a product reads the
// whole matrix front to back, which is what a large one, read from afar, needs. A register tile is
// a group's rows by a few vectors of the panel; narrow panels take several groups at once, so that
// as many sums are in flight.
#pragma once

#include "kernels/cpu/simd.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

constexpr int kGroupRows = 6;

inline int64_t row_groups(int64_t n) { return (n + kGroupRows - 1) / kGroupRows; }

// Columns to a depth: 24 KB of a panel of the widest tiles. The last depth may be shorter.
constexpr int64_t kDepth = 96;
inline int64_t depth_of(int64_t n) { return n <= kDepth + kDepth / 2 ? n : kDepth; }

// Column k of row g * kGroupRows + r, 0 past the last row: of the depth that begins at column k0
// and has d columns, packed[k0 * row_groups(n) * kGroupRows + (g * d + k - k0) * kGroupRows + r].
template <typename T>
void pack_groups(int64_t n, const T* matrix, T* packed, int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; ++g) {
    for (int64_t k0 = 0; k0 < n; k0 += depth_of(n)) {
      const int64_t depth = n - k0 < depth_of(n) ? n - k0 : depth_of(n);
      T* to = packed + (k0 * row_groups(n) + g * depth) * kGroupRows;
      for (int r = 0; r < kGroupRows; ++r) {
        const int64_t row = g * kGroupRows + r;
        for (int64_t k = 0; k < depth; ++k) {
          to[k * kGroupRows + r] = row < n ? matrix[row * n + k0 + k] : T(0);
        }
      }
    }
  }
}

#if defined(__AVX512F__)
constexpr int kMostVectors = 4;
#else
constexpr int kMostVectors = 2;
#endif

// What is to happen to rows of sums that are complete: rows [first, first + count) of the panel
// that they were stored in, `width` lanes of it from `lane` on. Not inlined into the register
// tiles, of which there are many: the rows are still in the L1 cache.
struct RowsDone {
  void (*call)(const void* self, int64_t first, int64_t count, int lane, int width);
  const void* self;
  inline void operator()(int64_t first, int64_t count, int lane, int width) const {
    call(self, first, count, lane, width);
  }
};

template <typename T>
struct DenseProduct {
  const T* packed;
  int64_t n;
  const T *x, *bias;  // bias: panel that the sums start from, or null
  int lanes;
  T* sums;  // panel

  // G groups from row `first` on, of each the first R rows, times V vectors of the panel from
  // `lane` on; `rows` of them exist.
  template <int V, int G, int R>
  void tile(int64_t first, int64_t rows, int lane, int64_t k_begin, int64_t depth) const {
    constexpr int W = kLanes<T>;
    Vec<T> sum[G * R][V];
    const T* from = k_begin == 0 ? bias : sums;
#pragma GCC unroll 24
    for (int i = 0; i < G * R; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        // Past the last row there is nothing to read, and what is added is zero.
        sum[i][v] = from == nullptr || i >= rows ? Vec<T>{}
                                                 : load(from + (first + i) * lanes + lane + v * W);
      }
    }
    const int64_t group_size = depth * kGroupRows;
    const T* w = packed + k_begin * row_groups(n) * kGroupRows + first / kGroupRows * group_size;
    const T* column_at = x + k_begin * lanes + lane;
    for (int64_t k = 0; k < depth; ++k, w += kGroupRows, column_at += lanes) {
      Vec<T> column[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) column[v] = load(column_at + v * W);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const Vec<T> value = broadcast(w[g * group_size + r]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sum[g * R + r][v] += value * column[v];
        }
      }
    }
#pragma GCC unroll 24
    for (int i = 0; i < G * R; ++i) {
      if (i >= rows) break;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(sums + (first + i) * lanes + lane + v * W, sum[i][v]);
    }
  }

  template <int V>
  void columns(int lane, int64_t k_begin, int64_t depth, const RowsDone& done) const {
    constexpr int G = kMostVectors / V;
    const bool last = k_begin + depth == n;
    const auto ready = [&](int64_t row, int64_t count) {
      if (last) done(row, count, lane, V * kLanes<T>);
    };
    int64_t row = 0;
    for (; row + G * kGroupRows <= n; row += G * kGroupRows) {
      tile<V, G, kGroupRows>(row, G * kGroupRows, lane, k_begin, depth);
      ready(row, G * kGroupRows);
    }
    for (; row < n; row += kGroupRows) {
      const int64_t left = n - row < kGroupRows ? n - row : kGroupRows;
      if (left <= kGroupRows / 2) {
        tile<V, 1, kGroupRows / 2>(row, left, lane, k_begin, depth);
      } else {
        tile<V, 1, kGroupRows>(row, left, lane, k_begin, depth);
      }
      ready(row, left);
    }
  }

  void run(const RowsDone& done) const {
    const int vectors = lanes / kLanes<T>;
    const int most = vectors < kMostVectors ? vectors : kMostVectors;
    const int64_t depth = depth_of(n);
    for (int lane = 0; lane < lanes; lane += most * kLanes<T>) {
      for (int64_t k = 0; k < n; k += depth) {
        const int64_t here = n - k < depth ? n - k : depth;
        if (most == 4) {
          if constexpr (kMostVectors >= 4) columns<4>(lane, k, here, done);
        } else if (most == 2) {
          columns<2>(lane, k, here, done);
        } else {
          columns<1>(lane, k, here, done);
        }
      }
    }
  }
};

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
