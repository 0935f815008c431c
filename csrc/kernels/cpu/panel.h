// The two inner loops of every sparse product, over packed panels.
//
// A panel holds, for each column k of one block of the weight, kTile consecutive activations
// (batch entries or pixels): panel[k * kTile + j]. The block is small enough to stay in L1, so that
// a nonzero costs one broadcast and kTile / lanes FMAs with an L1 operand.
#pragma once

#include "kernels/cpu/simd.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// Widest tile, in bytes: 64 floats or 32 doubles, whatever the ISA.
constexpr int kTileBytes = 256;
template <typename T>
constexpr int kTile = kTileBytes / static_cast<int>(sizeof(T));

// Narrowest tile (256, 128 or 64 bytes) that holds n activations.
template <typename T>
inline int tile_for(int64_t n) {
  int tile = kTile<T>;
  while (tile * static_cast<int>(sizeof(T)) > 64 && n <= tile / 2) tile /= 2;
  return tile;
}

template <typename T>
struct PanelRows {
  const int64_t* row_ptr;  // of this block: row r has entries [row_ptr[r], row_ptr[r + 1])
  int64_t begin, end;      // rows
  const int16_t* offset;
  const T* panel;          // aligned to 64 bytes
  T* tile_rows;            // row r at tile_rows + (r - begin) * tile; aligned to 64 bytes
};

// tile_rows[r] += sum over the entries of r of values[e] * panel[offset[e]].
template <typename T, int Tile>
void product_rows(const PanelRows<T>& a, const T* values) {
  constexpr int W = kLanes<T>;
  constexpr int V = Tile / W < 8 ? Tile / W : 8;  // accumulators held in registers
  for (int64_t r = a.begin; r < a.end; ++r) {
    const int64_t first = a.row_ptr[r], last = a.row_ptr[r + 1];
    if (first == last) continue;
    T* out = a.tile_rows + (r - a.begin) * Tile;
    for (int part = 0; part < Tile; part += V * W) {
      Vec<T> sum[V];
      for (int v = 0; v < V; ++v) sum[v] = load(out + part + v * W);
      for (int64_t e = first; e < last; ++e) {
        const T* x = a.panel + static_cast<int64_t>(a.offset[e]) * Tile + part;
        const Vec<T> w = broadcast(values[e]);
        for (int v = 0; v < V; ++v) sum[v] += w * load(x + v * W);
      }
      for (int v = 0; v < V; ++v) store(out + part + v * W, sum[v]);
    }
  }
}

template <typename T>
inline void product(const PanelRows<T>& a, const T* values, int tile) {
  constexpr int widest = kTile<T>;
  if (tile == widest) {
    product_rows<T, widest>(a, values);
  } else if (tile == widest / 2) {
    product_rows<T, widest / 2>(a, values);
  } else {
    product_rows<T, widest / 4>(a, values);
  }
}

// grads[e] += dot(tile_rows[r], panel[offset[e]]) for the entries e of the rows: the weight
// gradient at the mask. The entries of consecutive rows are consecutive, so lane sums are taken
// for a full vector of entries at a time.
template <typename T, int Tile>
void sampled_rows(const PanelRows<T>& a, T* grads) {
  constexpr int W = kLanes<T>;
  constexpr int V = Tile / W;
  Vec<T> pending[W];
  int n = 0;
  T* out = grads + a.row_ptr[a.begin];
  for (int64_t r = a.begin; r < a.end; ++r) {
    const T* g = a.tile_rows + (r - a.begin) * Tile;
    const int64_t last = a.row_ptr[r + 1];
    for (int64_t e = a.row_ptr[r]; e < last; ++e) {
      const T* x = a.panel + static_cast<int64_t>(a.offset[e]) * Tile;
      Vec<T> sum = load(g) * load(x);
      for (int v = 1; v < V; ++v) sum += load(g + v * W) * load(x + v * W);
      pending[n++] = sum;
      if (n == W) {
        store(out, load(out) + sum_lanes<T>(pending));
        out += W;
        n = 0;
      }
    }
  }
  if (n > 0) {
    for (int i = n; i < W; ++i) pending[i] = Vec<T>{};
    const Vec<T> sums = sum_lanes<T>(pending);
    for (int i = 0; i < n; ++i) out[i] += sums[i];
  }
}

template <typename T>
inline void sampled(const PanelRows<T>& a, T* grads, int tile) {
  constexpr int widest = kTile<T>;
  if (tile == widest) {
    sampled_rows<T, widest>(a, grads);
  } else if (tile == widest / 2) {
    sampled_rows<T, widest / 2>(a, grads);
  } else {
    sampled_rows<T, widest / 4>(a, grads);
  }
}

// Starts the tile rows [begin, end) at the bias, or at zero.
template <typename T>
inline void start_rows(T* tile_rows, const T* bias, int64_t begin, int64_t end, int tile) {
  for (int64_t r = begin; r < end; ++r) {
    const T b = bias == nullptr ? T(0) : bias[r];
    T* row = tile_rows + (r - begin) * tile;
    for (int j = 0; j < tile; ++j) row[j] = b;
  }
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
