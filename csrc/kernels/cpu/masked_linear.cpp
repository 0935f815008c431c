#include "kernels/cpu/masked_linear.h"

#include "kernels/cpu/masked_linear_tiles.h"
#include "kernels/cpu/panel.h"
#include "kernels/cpu/panel_pack.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// Activations of the tile's n batch entries from column `first` on, whichever way they are stored.
template <typename S>
void pack_tile(const S* source, bool transposed, int64_t batch, int64_t columns, int64_t tile_first,
               int n, int64_t first, int64_t count, int tile, Accumulator<S>* panel) {
  if (transposed) {
    pack_rows(source + first * batch + tile_first, batch, n, count, tile, panel);
  } else {
    pack_transposed(source + tile_first * columns + first, columns, n, count, tile, panel);
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
  const S* x = static_cast<const S*>(a.x);
  start_rows(tile_rows, static_cast<const T*>(a.bias), row_begin, row_end, tile);
  for (int64_t b = 0; b < p.blocks(); ++b) {
    const int64_t* row_ptr = p.row_ptr + b * p.rows;
    if (row_ptr[row_begin] == row_ptr[row_end]) continue;
    pack_tile(x, a.x_transposed, a.batch, p.cols(), first, n, b * p.block_cols(), p.depth_of(b),
              tile, panel);
    panel_product(rows_of(p, b, row_begin, row_end, tile_rows), panel, tile,
                  static_cast<const T*>(a.values));
  }
  S* y = static_cast<S*>(a.y);
  const S* residual = static_cast<const S*>(a.residual);
  const int64_t at = a.y_transposed ? row_begin * a.batch + first : first * p.rows + row_begin;
  const S* added = residual == nullptr ? nullptr : residual + at;
  if (a.y_transposed) {
    write_rows(tile_rows, row_end - row_begin, tile, n, y + at, added, a.relu, a.batch);
  } else {
    write_transposed(tile_rows, row_end - row_begin, tile, n, y + at, added, a.relu, p.rows);
  }
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
    const S *grad = static_cast<const S*>(a.grad), *x = static_cast<const S*>(a.x);
    pack_tile(grad, a.grad_transposed, a.batch, p.rows, first, n, row_begin, row_end - row_begin,
              tile, tile_rows);
    for (int64_t b = 0; b < p.blocks(); ++b) {
      const int64_t* row_ptr = p.row_ptr + b * p.rows;
      if (row_ptr[row_begin] == row_ptr[row_end]) continue;
      pack_tile(x, a.x_transposed, a.batch, p.cols(), first, n, b * p.block_cols(), p.depth_of(b),
                tile, panel);
      panel_sampled(rows_of(p, b, row_begin, row_end, tile_rows), panel, tile,
                    static_cast<T*>(a.values_grad));
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
