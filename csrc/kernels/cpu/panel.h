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
  const T* panel;  // aligned to 64 bytes
  T* tile_rows;    // row r at tile_rows + (r - begin) * tile; aligned to 64 bytes
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

// Adds lane sums to consecutive entries, a full vector of entries at a time.
template <typename T>
struct EntrySums {
  static constexpr int W = kLanes<T>;
  Vec<T> pending[W];
  int n = 0;
  T* out;

  explicit EntrySums(T* first) : out(first) {}
  inline void push(Vec<T> products) {
    pending[n++] = products;
    if (n < W) return;
    store(out, load(out) + sum_lanes<T>(pending));
    out += W;
    n = 0;
  }
  inline void finish() {
    if (n == 0) return;
    for (int i = n; i < W; ++i) pending[i] = Vec<T>{};
    const Vec<T> sums = sum_lanes<T>(pending);
    for (int i = 0; i < n; ++i) out[i] += sums[i];
  }
};

// grads[e] += dot(tile_rows[r], panel[offset[e]]) for the entries e of the rows: the weight
// gradient at the mask. The entries of consecutive rows are consecutive.
template <typename T, int Tile>
void sampled_rows(const PanelRows<T>& a, T* grads) {
  constexpr int W = kLanes<T>;
  constexpr int V = Tile / W;
  EntrySums<T> sums(grads + a.row_ptr[a.begin]);
  for (int64_t r = a.begin; r < a.end; ++r) {
    const T* g = a.tile_rows + (r - a.begin) * Tile;
    const int64_t last = a.row_ptr[r + 1];
    for (int64_t e = a.row_ptr[r]; e < last; ++e) {
      const T* x = a.panel + static_cast<int64_t>(a.offset[e]) * Tile;
      Vec<T> products = load(g) * load(x);
      for (int v = 1; v < V; ++v) products += load(g + v * W) * load(x + v * W);
      sums.push(products);
    }
  }
  sums.finish();
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

// The same products over strips (conv_strips.h): a tile is V vectors, each with a base of its own
// in the panel, and offsets are in units of kStripUnit bytes from it.
constexpr int64_t kStripUnit = 16;
constexpr int kMaxTileVectors = 8;

template <typename T>
struct StripRows {
  using Bits = typename SignedOf<sizeof(T)>::type;

  const int64_t* row_ptr;
  int64_t begin, end;
  const uint16_t* offset;
  const T* base[kMaxTileVectors];
  bool contiguous;   // base[v] = base[0] + v * lanes
  T* tile_rows;      // row r at tile_rows + (r - begin) * V * lanes
  const Bits* live;  // V * lanes masks of the lanes that are grid points; null when all are
};

template <typename T>
inline const T* strip_address(const T* base, uint16_t offset) {
  return base + static_cast<int64_t>(offset) * (kStripUnit / static_cast<int64_t>(sizeof(T)));
}

template <typename T, int V, bool Contiguous>
void strip_product_rows(const StripRows<T>& a, const T* values) {
  constexpr int W = kLanes<T>;
  const T* base[V];
  for (int v = 0; v < V; ++v) base[v] = a.base[v];
  for (int64_t r = a.begin; r < a.end; ++r) {
    const int64_t first = a.row_ptr[r], last = a.row_ptr[r + 1];
    if (first == last) continue;
    T* out = a.tile_rows + (r - a.begin) * V * W;
    Vec<T> sum[V];
    for (int v = 0; v < V; ++v) sum[v] = load(out + v * W);
    for (int64_t e = first; e < last; ++e) {
      const Vec<T> w = broadcast(values[e]);
      if constexpr (Contiguous) {
        const T* x = strip_address(base[0], a.offset[e]);
        for (int v = 0; v < V; ++v) sum[v] += w * load(x + v * W);
      } else {
        for (int v = 0; v < V; ++v) sum[v] += w * load(strip_address(base[v], a.offset[e]));
      }
    }
    for (int v = 0; v < V; ++v) store(out + v * W, sum[v]);
  }
}

template <typename T, int V, bool Masked>
void strip_sampled_rows(const StripRows<T>& a, T* grads) {
  constexpr int W = kLanes<T>;
  using Bits = typename VectorOf<typename StripRows<T>::Bits>::type;
  EntrySums<T> sums(grads + a.row_ptr[a.begin]);
  for (int64_t r = a.begin; r < a.end; ++r) {
    Vec<T> g[V];
    for (int v = 0; v < V; ++v) g[v] = load(a.tile_rows + ((r - a.begin) * V + v) * W);
    const int64_t last = a.row_ptr[r + 1];
    for (int64_t e = a.row_ptr[r]; e < last; ++e) {
      Vec<T> products{};
      for (int v = 0; v < V; ++v) {
        Vec<T> x = load(strip_address(a.base[v], a.offset[e]));
        // A lane that is no grid point may see a real activation there: 0 * inf must not count.
        if constexpr (Masked) x = (Vec<T>)((Bits)x & (Bits)load(a.live + v * W));
        products += g[v] * x;
      }
      sums.push(products);
    }
  }
  sums.finish();
}

template <typename T, int V>
inline void strip_product_of(const StripRows<T>& a, const T* values) {
  if (a.contiguous) {
    strip_product_rows<T, V, true>(a, values);
  } else {
    strip_product_rows<T, V, false>(a, values);
  }
}
template <typename T, int V>
inline void strip_sampled_of(const StripRows<T>& a, T* grads) {
  if (a.live != nullptr) {
    strip_sampled_rows<T, V, true>(a, grads);
  } else {
    strip_sampled_rows<T, V, false>(a, grads);
  }
}

// `vectors`: 8, 4, 2 or 1.
template <typename T>
inline void strip_product(const StripRows<T>& a, const T* values, int vectors) {
  switch (vectors) {
    case 8:
      return strip_product_of<T, 8>(a, values);
    case 4:
      return strip_product_of<T, 4>(a, values);
    case 2:
      return strip_product_of<T, 2>(a, values);
    default:
      return strip_product_of<T, 1>(a, values);
  }
}
template <typename T>
inline void strip_sampled(const StripRows<T>& a, T* grads, int vectors) {
  switch (vectors) {
    case 8:
      return strip_sampled_of<T, 8>(a, grads);
    case 4:
      return strip_sampled_of<T, 4>(a, grads);
    case 2:
      return strip_sampled_of<T, 2>(a, grads);
    default:
      return strip_sampled_of<T, 1>(a, grads);
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
