#include "kernels/cpu/masked_conv2d.h"

#include "kernels/cpu/conv_panel.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// Calls f(group, begin, end) for the rows [begin, end) of each group in [row_begin, row_end).
template <typename F>
inline void for_each_group(const PatternView& p, int64_t row_begin, int64_t row_end, F f) {
  const int64_t rows_per_group = p.rows / p.groups;
  for (int64_t begin = row_begin; begin < row_end;) {
    const int64_t group = begin / rows_per_group;
    const int64_t group_end = (group + 1) * rows_per_group;
    const int64_t end = group_end < row_end ? group_end : row_end;
    f(group, begin, end);
    begin = end;
  }
}

template <typename S>
inline void pack(const PanelPacker<S>& packer, bool scattered, const S* source,
                 int64_t first_channel, int64_t channels, Accumulator<S>* panel) {
  if (scattered) {
    packer.scattered(source, first_channel, channels, panel);
  } else {
    packer.by_runs(source, first_channel, channels, panel);
  }
}

// Writes tile rows to their places in the target.
template <typename S>
void write_rows(const MaskedConv2dArgs& a, const PointTile& t, const Accumulator<S>* tile_rows,
                int64_t begin, int64_t end) {
  using T = Accumulator<S>;
  const ConvTarget& place = a.place;
  const int64_t plane = place.height * place.width;
  for (int s = 0; s < t.runs; ++s) {
    const Run& run = t.run[s];
    const int64_t corner = (run.y * place.step_y + place.first_y) * place.width +
                           run.x * place.step_x + place.first_x;
    S* to = static_cast<S*>(a.target) + (run.image * a.pattern.rows + begin) * plane + corner;
    const T* from = tile_rows + run.at;
    for (int64_t r = begin; r < end; ++r, to += plane, from += t.tile) {
      if constexpr (sizeof(S) == sizeof(T)) {
        if (place.step_x == 1) {
          copy_widened<T>(from, reinterpret_cast<T*>(to), run.length);
          continue;
        }
      }
      for (int j = 0; j < run.length; ++j) to[j * place.step_x] = narrow<S>(from[j]);
    }
  }
}

template <typename S>
void forward(const MaskedConv2dArgs& a, int64_t tile_index, int64_t row_begin, int64_t row_end,
             Accumulator<S>* scratch) {
  using T = Accumulator<S>;
  const PatternView& p = a.pattern;
  PointTile t;
  cut_tile<T>(a.grid, tile_index * kTile<T>, &t);
  PanelPacker<S> packer(a.grid, t, p.groups * p.depth, p.taps);
  const bool scattered = packer.prefers_scattered();
  if (scattered) packer.index_points();
  T* panel = scratch;
  T* tile_rows = scratch + p.block_cols() * t.tile;
  for_each_group(p, row_begin, row_end, [&](int64_t group, int64_t begin, int64_t end) {
    start_rows(tile_rows, static_cast<const T*>(a.bias), begin, end, t.tile);
    for (int64_t b = 0; b < p.blocks(); ++b) {
      const int64_t* row_ptr = p.row_ptr + b * p.rows;
      if (row_ptr[begin] == row_ptr[end]) continue;
      pack(packer, scattered, static_cast<const S*>(a.source),
           group * p.depth + b * p.block_depth, p.depth_of(b), panel);
      product(PanelRows<T>{row_ptr, begin, end, p.offset, panel, tile_rows},
              static_cast<const T*>(a.values), t.tile);
    }
    write_rows<S>(a, t, tile_rows, begin, end);
  });
}

template <typename S>
void weight_grad(const MaskedConv2dWeightGradArgs& a, int64_t row_begin, int64_t row_end,
                 Accumulator<S>* scratch) {
  using T = Accumulator<S>;
  const PatternView& p = a.pattern;
  // The gradient of a tile is packed like a 1x1 convolution's input.
  const int64_t zero = 0;
  const uint8_t live = 1;
  ConvGrid at_point = a.grid;
  at_point.source_height = a.grid.height;
  at_point.source_width = a.grid.width;
  at_point.step_y = at_point.step_x = 1;
  at_point.tap_y = at_point.tap_x = &zero;
  at_point.live_tap = &live;
  for (int64_t first = 0; first < a.grid.points(); first += kTile<T>) {
    PointTile t;
    cut_tile<T>(a.grid, first, &t);
    PanelPacker<S> packer(a.grid, t, p.groups * p.depth, p.taps);
    PanelPacker<S> grad_packer(at_point, t, p.rows, 1);
    const bool scattered = packer.prefers_scattered();
    if (scattered) packer.index_points();
    T* panel = scratch;
    T* tile_rows = scratch + p.block_cols() * t.tile;
    for_each_group(p, row_begin, row_end, [&](int64_t group, int64_t begin, int64_t end) {
      grad_packer.by_runs(static_cast<const S*>(a.grad), begin, end - begin, tile_rows);
      for (int64_t b = 0; b < p.blocks(); ++b) {
        const int64_t* row_ptr = p.row_ptr + b * p.rows;
        if (row_ptr[begin] == row_ptr[end]) continue;
        pack(packer, scattered, static_cast<const S*>(a.source),
             group * p.depth + b * p.block_depth, p.depth_of(b), panel);
        sampled(PanelRows<T>{row_ptr, begin, end, p.offset, panel, tile_rows},
                static_cast<T*>(a.values_grad), t.tile);
      }
    });
  }
}

}  // namespace

int64_t masked_conv2d_tile(DType dtype) {
  return dtype == DType::f64 ? kTile<double> : kTile<float>;
}

int64_t masked_conv2d_scratch(const PatternView& p, DType, int64_t rows) {
  const int64_t rows_per_group = p.rows / p.groups;
  return (p.block_cols() + (rows < rows_per_group ? rows : rows_per_group)) * kTileBytes;
}

void masked_conv2d(const MaskedConv2dArgs& a, int64_t tile, int64_t row_begin, int64_t row_end,
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

void masked_conv2d_weight_grad(const MaskedConv2dWeightGradArgs& a, int64_t row_begin,
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
