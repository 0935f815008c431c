#include "kernels/cpu/masked_linear.h"

#include "kernels/cpu/panel.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// A vector of n <= W widened elements, zeros behind them.
template <typename S>
inline Vec<Accumulator<S>> load_widened(const S* p, int n) {
  using T = Accumulator<S>;
  constexpr int W = kLanes<T>;
  alignas(kVectorBytes) T lanes[W];
  if (n == W) {
    if constexpr (sizeof(S) == sizeof(T)) return load(reinterpret_cast<const T*>(p));
    for (int j = 0; j < W; ++j) lanes[j] = widen(p[j]);
  } else {
    for (int j = 0; j < W; ++j) lanes[j] = j < n ? widen(p[j]) : T(0);
  }
  return load(lanes);
}

template <typename S>
inline void store_narrowed(S* p, Vec<Accumulator<S>> v, int n) {
  using T = Accumulator<S>;
  constexpr int W = kLanes<T>;
  if constexpr (sizeof(S) == sizeof(T)) {
    if (n == W) {
      store(reinterpret_cast<T*>(p), v);
      return;
    }
  }
  alignas(kVectorBytes) T lanes[W];
  store(lanes, v);
  if (n == W) {
    for (int j = 0; j < W; ++j) p[j] = narrow<S>(lanes[j]);
  } else {
    for (int j = 0; j < n; ++j) p[j] = narrow<S>(lanes[j]);
  }
}

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
      for (int i = 0; i < W; ++i) {
        block[i] = i < here ? load_widened(source + (j + i) * stride + k, wide) : Vec<T>{};
      }
      transpose<T>(block);
      for (int i = 0; i < wide; ++i) store(panel + (k + i) * tile + j, block[i]);
    }
  }
}

// target[j * stride + r] = rows[r * tile + j] for j < n.
template <typename S>
void write_transposed(const Accumulator<S>* rows, int64_t row_count, int tile, int n, S* target,
                      int64_t stride) {
  using T = Accumulator<S>;
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < row_count; r += W) {
    const int high = row_count - r < W ? static_cast<int>(row_count - r) : W;
    for (int j = 0; j < n; j += W) {
      const int here = n - j < W ? n - j : W;
      Vec<T> block[W];
      for (int i = 0; i < W; ++i) {
        block[i] = i < high ? load(rows + (r + i) * tile + j) : Vec<T>{};
      }
      transpose<T>(block);
      for (int i = 0; i < here; ++i) store_narrowed(target + (j + i) * stride + r, block[i], high);
    }
  }
}

template <typename S>
void forward(const MaskedLinearArgs& a, int64_t tile_index, int64_t row_begin, int64_t row_end,
             Accumulator<S>* scratch) {
  using T = Accumulator<S>;
  const PatternView& p = a.pattern;
  const int64_t first = tile_index * kTile<T>;
  const int64_t left = a.batch - first;
  const int n = static_cast<int>(left < kTile<T> ? left : kTile<T>);
  const int tile = tile_for<T>(n);
  T* panel = scratch;
  T* tile_rows = scratch + p.block_cols() * tile;
  const S* x = static_cast<const S*>(a.x) + first * p.cols();
  start_rows(tile_rows, static_cast<const T*>(a.bias), row_begin, row_end, tile);
  for (int64_t b = 0; b < p.blocks(); ++b) {
    const int64_t* row_ptr = p.row_ptr + b * p.rows;
    if (row_ptr[row_begin] == row_ptr[row_end]) continue;
    pack_transposed(x + b * p.block_cols(), p.cols(), n, p.depth_of(b) * p.taps, tile, panel);
    product(PanelRows<T>{row_ptr, row_begin, row_end, p.offset, panel, tile_rows},
            static_cast<const T*>(a.values), tile);
  }
  write_transposed(tile_rows, row_end - row_begin, tile, n,
                   static_cast<S*>(a.y) + first * p.rows + row_begin, p.rows);
}

template <typename S>
void weight_grad(const MaskedLinearWeightGradArgs& a, int64_t row_begin, int64_t row_end,
                 Accumulator<S>* scratch) {
  using T = Accumulator<S>;
  const PatternView& p = a.pattern;
  for (int64_t first = 0; first < a.batch; first += kTile<T>) {
    const int64_t left = a.batch - first;
    const int n = static_cast<int>(left < kTile<T> ? left : kTile<T>);
    const int tile = tile_for<T>(n);
    T* panel = scratch;
    T* tile_rows = scratch + p.block_cols() * tile;
    const S* grad = static_cast<const S*>(a.grad) + first * p.rows + row_begin;
    const S* x = static_cast<const S*>(a.x) + first * p.cols();
    pack_transposed(grad, p.rows, n, row_end - row_begin, tile, tile_rows);
    for (int64_t b = 0; b < p.blocks(); ++b) {
      const int64_t* row_ptr = p.row_ptr + b * p.rows;
      if (row_ptr[row_begin] == row_ptr[row_end]) continue;
      pack_transposed(x + b * p.block_cols(), p.cols(), n, p.depth_of(b) * p.taps, tile, panel);
      sampled(PanelRows<T>{row_ptr, row_begin, row_end, p.offset, panel, tile_rows},
              static_cast<T*>(a.values_grad), tile);
    }
  }
}

}  // namespace

int64_t masked_linear_tile(DType dtype) {
  return dtype == DType::f64 ? kTile<double> : kTile<float>;
}

int64_t masked_linear_scratch(const PatternView& p, DType, int64_t rows) {
  return (p.block_cols() + rows) * kTileBytes;
}

void masked_linear(const MaskedLinearArgs& a, int64_t tile, int64_t row_begin, int64_t row_end,
                   void* scratch) {
  switch (a.dtype) {
    case DType::f32:
      return forward<float>(a, tile, row_begin, row_end, static_cast<float*>(scratch));
    case DType::f64:
      return forward<double>(a, tile, row_begin, row_end, static_cast<double*>(scratch));
    case DType::bf16:
      return forward<BFloat16>(a, tile, row_begin, row_end, static_cast<float*>(scratch));
    case DType::f16:
      return forward<Float16>(a, tile, row_begin, row_end, static_cast<float*>(scratch));
  }
}

void masked_linear_weight_grad(const MaskedLinearWeightGradArgs& a, int64_t row_begin,
                               int64_t row_end, void* scratch) {
  switch (a.dtype) {
    case DType::f32:
      return weight_grad<float>(a, row_begin, row_end, static_cast<float*>(scratch));
    case DType::f64:
      return weight_grad<double>(a, row_begin, row_end, static_cast<double*>(scratch));
    case DType::bf16:
      return weight_grad<BFloat16>(a, row_begin, row_end, static_cast<float*>(scratch));
    case DType::f16:
      return weight_grad<Float16>(a, row_begin, row_end, static_cast<float*>(scratch));
  }
}

}  // namespace fastprune::FASTPRUNE_ISA
