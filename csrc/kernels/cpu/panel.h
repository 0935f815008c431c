// The two inner loops of every sparse product, over packed panels of activations.
//
// A register tile is V vectors of activations (batch entries or pixels); the panel holds such a
// tile for every column of one block of the weight, at the column's offset. The block is small
// enough to stay in L1, so that a nonzero costs one broadcast and V FMAs with an L1 operand.
#pragma once

#include <cstring>

#include "kernels/cpu/pattern.h"
#include "kernels/cpu/simd.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// Widest tile of a panel, in bytes: 64 floats, or what eight vectors hold.
constexpr int kTileBytes = 8 * kVectorBytes < 256 ? 8 * kVectorBytes : 256;
template <typename T>
constexpr int kTile = kTileBytes / static_cast<int>(sizeof(T));

// Narrowest tile (kTileBytes, half or a quarter of it, at least 64 bytes) that holds n activations.
template <typename T>
inline int tile_for(int64_t n) {
  int tile = kTile<T>;
  while (tile * static_cast<int>(sizeof(T)) > 64 && n <= tile / 2) tile /= 2;
  return tile;
}

// Vectors of a register tile: V accumulators per row, of two rows at a time where registers allow.
constexpr int kMaxTileVectors = 8;
#if defined(__AVX512F__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

// The rows of one block of a pattern against one register tile of activations.
template <typename T>
struct TileRows {
  using Bits = typename SignedOf<sizeof(T)>::type;

  const int64_t* row_ptr;  // of this block: place i has the entries [row_ptr[i], row_ptr[i + 1])
  const int32_t* row_at;   // of this block: the row at place i; null where it is i itself
  int64_t begin, end;      // places
  int64_t first_row;       // the row that tile_rows starts with
  const uint16_t* offset;  // per entry, in units of `Unit` bytes
  const T* base[kMaxTileVectors];  // offset 0, per vector of the tile
  bool contiguous;                 // base[v] = base[0] + v * lanes
  T* tile_rows;      // row r at tile_rows + (r - first_row) * V * lanes; aligned to 64 bytes
  const Bits* live;  // V * lanes masks of the lanes that are points; null when all are

  T* row(int64_t place, int64_t stride) const {
    return tile_rows + ((row_at == nullptr ? place : row_at[place]) - first_row) * stride;
  }
};

template <typename T, int V, int Unit, bool Contiguous>
struct TileProduct {
  static constexpr int W = kLanes<T>;
  static constexpr int64_t kUnit = Unit / static_cast<int64_t>(sizeof(T));
  const T* base[V];

  explicit TileProduct(const TileRows<T>& a) {
    for (int v = 0; v < V; ++v) base[v] = a.base[v];
  }
  inline Vec<T> x(int64_t offset, int v) const {
    return Contiguous ? load(base[0] + offset * kUnit + v * W) : load(base[v] + offset * kUnit);
  }
  inline void add(Vec<T>* sum, int64_t offset, T value) const {
    const Vec<T> w = broadcast(value);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[v] += w * x(offset, v);
  }
  // Four entries, whose offsets come in one load: loads are what the loop is bound by.
  inline void add_four(Vec<T>* sum, uint64_t offsets, const T* values) const {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      add(sum, static_cast<int64_t>((offsets >> (16 * k)) & 0xffff), values[k]);
    }
  }
  static inline uint64_t four(const uint16_t* offset) {
    uint64_t word;
    std::memcpy(&word, offset, sizeof(word));
    if constexpr (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__) {
      word = offset[0] | uint64_t{offset[1]} << 16 | uint64_t{offset[2]} << 32 |
             uint64_t{offset[3]} << 48;
    }
    return word;
  }
  inline void add_range(Vec<T>* sum, const uint16_t* offset, const T* values, int64_t i,
                        int64_t n) const {
    for (; i + 4 <= n; i += 4) add_four(sum, four(offset + i), values + i);
    for (; i < n; ++i) add(sum, offset[i], values[i]);
  }
};

// tile_rows[r] += sum over the entries of r of values[e] * x[offset[e]].
//
// Two rows run at once: one row alone is a chain of dependent additions, V of them in flight, which
// hides too little of their latency. A row's sum is made in the order of its entries either way.
template <typename T, int V, int Unit, bool Contiguous>
void product_rows(const TileRows<T>& a, const T* values) {
  constexpr int W = kLanes<T>;
  constexpr bool kPairs = 2 * V + 3 <= kVectorRegisters;
  const TileProduct<T, V, Unit, Contiguous> tile(a);
  int64_t i = a.begin;
  if constexpr (kPairs) {
    for (; i + 1 < a.end; i += 2) {
      const int64_t e0 = a.row_ptr[i], e1 = a.row_ptr[i + 1], e2 = a.row_ptr[i + 2];
      if (e0 == e2) continue;
      T *out0 = a.row(i, V * W), *out1 = a.row(i + 1, V * W);
      Vec<T> sum0[V], sum1[V];
      for (int v = 0; v < V; ++v) sum0[v] = load(out0 + v * W);
      for (int v = 0; v < V; ++v) sum1[v] = load(out1 + v * W);
      const uint16_t *o0 = a.offset + e0, *o1 = a.offset + e1;
      const T *w0 = values + e0, *w1 = values + e1;
      const int64_t n0 = e1 - e0, n1 = e2 - e1, both = n0 < n1 ? n0 : n1;
      int64_t k = 0;
      for (; k + 4 <= both; k += 4) {
        const uint64_t four0 = tile.four(o0 + k), four1 = tile.four(o1 + k);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          tile.add(sum0, static_cast<int64_t>((four0 >> (16 * j)) & 0xffff), w0[k + j]);
          tile.add(sum1, static_cast<int64_t>((four1 >> (16 * j)) & 0xffff), w1[k + j]);
        }
      }
      for (; k < both; ++k) {
        tile.add(sum0, o0[k], w0[k]);
        tile.add(sum1, o1[k], w1[k]);
      }
      tile.add_range(sum0, o0, w0, k, n0);
      tile.add_range(sum1, o1, w1, k, n1);
      for (int v = 0; v < V; ++v) store(out0 + v * W, sum0[v]);
      for (int v = 0; v < V; ++v) store(out1 + v * W, sum1[v]);
    }
  }
  for (; i < a.end; ++i) {
    const int64_t first = a.row_ptr[i], last = a.row_ptr[i + 1];
    if (first == last) continue;
    T* out = a.row(i, V * W);
    Vec<T> sum[V];
    for (int v = 0; v < V; ++v) sum[v] = load(out + v * W);
    tile.add_range(sum, a.offset + first, values + first, 0, last - first);
    for (int v = 0; v < V; ++v) store(out + v * W, sum[v]);
  }
}

template <typename T, int V, int Unit>
inline void product_of(const TileRows<T>& a, const T* values) {
  if (a.contiguous) {
    product_rows<T, V, Unit, true>(a, values);
  } else {
    product_rows<T, V, Unit, false>(a, values);
  }
}

// `vectors`: 1 to 8.
template <typename T, int Unit>
inline void product(const TileRows<T>& a, const T* values, int vectors) {
  switch (vectors) {
    case 8:
      return product_of<T, 8, Unit>(a, values);
    case 7:
      return product_of<T, 7, Unit>(a, values);
    case 6:
      return product_of<T, 6, Unit>(a, values);
    case 5:
      return product_of<T, 5, Unit>(a, values);
    case 4:
      return product_of<T, 4, Unit>(a, values);
    case 3:
      return product_of<T, 3, Unit>(a, values);
    case 2:
      return product_of<T, 2, Unit>(a, values);
    default:
      return product_of<T, 1, Unit>(a, values);
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

// grads[e] += dot(tile_rows[r], x[offset[e]]) for the entries e of the places: the weight gradient
// at the mask. The entries of consecutive places are consecutive.
template <typename T, int V, int Unit, bool Contiguous, bool Masked>
void sampled_rows(const TileRows<T>& a, T* grads) {
  constexpr int W = kLanes<T>;
  using Bits = typename VectorOf<typename TileRows<T>::Bits>::type;
  const TileProduct<T, V, Unit, Contiguous> tile(a);
  EntrySums<T> sums(grads + a.row_ptr[a.begin]);
  for (int64_t i = a.begin; i < a.end; ++i) {
    const T* row = a.row(i, V * W);
    Vec<T> g[V];
    for (int v = 0; v < V; ++v) g[v] = load(row + v * W);
    const int64_t last = a.row_ptr[i + 1];
    for (int64_t e = a.row_ptr[i]; e < last; ++e) {
      Vec<T> products{};
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        Vec<T> x = tile.x(a.offset[e], v);
        // A lane that is no point may see a real activation there: 0 * inf must not count.
        if constexpr (Masked) x = (Vec<T>)((Bits)x & (Bits)load(a.live + v * W));
        products += g[v] * x;
      }
      sums.push(products);
    }
  }
  sums.finish();
}

template <typename T, int V, int Unit>
inline void sampled_of(const TileRows<T>& a, T* grads) {
  if (a.live != nullptr) {
    sampled_rows<T, V, Unit, false, true>(a, grads);
  } else if (a.contiguous) {
    sampled_rows<T, V, Unit, true, false>(a, grads);
  } else {
    sampled_rows<T, V, Unit, false, false>(a, grads);
  }
}

template <typename T, int Unit>
inline void sampled(const TileRows<T>& a, T* grads, int vectors) {
  switch (vectors) {
    case 8:
      return sampled_of<T, 8, Unit>(a, grads);
    case 7:
      return sampled_of<T, 7, Unit>(a, grads);
    case 6:
      return sampled_of<T, 6, Unit>(a, grads);
    case 5:
      return sampled_of<T, 5, Unit>(a, grads);
    case 4:
      return sampled_of<T, 4, Unit>(a, grads);
    case 3:
      return sampled_of<T, 3, Unit>(a, grads);
    case 2:
      return sampled_of<T, 2, Unit>(a, grads);
    default:
      return sampled_of<T, 1, Unit>(a, grads);
  }
}

// The same over a panel of whole tiles (PanelTile<T>): entry offsets count its rows.
template <typename T, int Bytes>
inline TileRows<T> on_panel(TileRows<T> a, const T* panel) {
  a.contiguous = true;
  for (int v = 0; v < Bytes / kVectorBytes; ++v) a.base[v] = panel + v * kLanes<T>;
  return a;
}
template <typename T>
inline void panel_product(const TileRows<T>& a, const T* panel, int tile, const T* values) {
  constexpr int widest = kTileBytes, half = widest / 2, least = 64;
  if (tile == kTile<T>) {
    product_rows<T, widest / kVectorBytes, widest, true>(on_panel<T, widest>(a, panel), values);
  } else if (tile == kTile<T> / 2) {
    product_rows<T, half / kVectorBytes, half, true>(on_panel<T, half>(a, panel), values);
  } else {
    product_rows<T, least / kVectorBytes, least, true>(on_panel<T, least>(a, panel), values);
  }
}
template <typename T>
inline void panel_sampled(const TileRows<T>& a, const T* panel, int tile, T* grads) {
  constexpr int widest = kTileBytes, half = widest / 2, least = 64;
  if (tile == kTile<T>) {
    sampled_rows<T, widest / kVectorBytes, widest, true, false>(on_panel<T, widest>(a, panel),
                                                                grads);
  } else if (tile == kTile<T> / 2) {
    sampled_rows<T, half / kVectorBytes, half, true, false>(on_panel<T, half>(a, panel), grads);
  } else {
    sampled_rows<T, least / kVectorBytes, least, true, false>(on_panel<T, least>(a, panel), grads);
  }
}

// The rows at the places [begin, end) of block b, which are the rows [begin, end) in some order.
template <typename T>
inline TileRows<T> rows_of(const PatternView& p, int64_t b, int64_t begin, int64_t end,
                           T* tile_rows) {
  TileRows<T> rows{};
  rows.row_ptr = p.row_ptr + b * p.rows;
  rows.row_at = p.row_at == nullptr ? nullptr : p.row_at + b * p.rows;
  rows.begin = begin;
  rows.end = end;
  rows.first_row = begin;
  rows.offset = reinterpret_cast<const uint16_t*>(p.offset);
  rows.tile_rows = tile_rows;
  return rows;
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
