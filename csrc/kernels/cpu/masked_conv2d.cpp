#include "kernels/cpu/masked_conv2d.h"

#include "kernels/cpu/conv_strips.h"

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

// Copies n results, `step` apart, to their place in the target, finished.
template <typename S>
inline void write_results(const MaskedConv2dArgs& a, const Accumulator<S>* from, S* to, int n) {
  using T = Accumulator<S>;
  constexpr int W = kLanes<T>;
  const int64_t step = a.place.step_x;
  if (a.residual == nullptr && !a.relu) return copy_narrowed<S>(from, to, n, step);
  const S* added = a.residual == nullptr
                       ? nullptr
                       : static_cast<const S*>(a.residual) + (to - static_cast<S*>(a.target));
  for (int j = 0; j < n; j += W) {
    const int here = n - j < W ? n - j : W;
    if (step == 1) {
      finish_vector<S>(load_part(from + j, here), to + j, added == nullptr ? nullptr : added + j,
                       a.relu, here);
      continue;
    }
    for (int i = j; i < j + here; ++i) {
      to[i * step] = finish<S>(from[i], added == nullptr ? nullptr : added + i * step, a.relu);
    }
  }
}

// Writes tile rows to their places in the target.
template <typename S>
void write_points(const MaskedConv2dArgs& a, const PointTile& t, const Accumulator<S>* tile_rows,
                  int64_t begin, int64_t end) {
  const ConvTarget& place = a.place;
  const int64_t plane = place.height * place.width;
  for (int s = 0; s < t.runs; ++s) {
    const Run& run = t.run[s];
    const int64_t corner =
        (run.y * place.step_y + place.first_y) * place.width + run.x * place.step_x + place.first_x;
    S* to = static_cast<S*>(a.target) + (run.image * a.pattern.rows + begin) * plane + corner;
    const Accumulator<S>* from = tile_rows + run.at;
    for (int64_t r = begin; r < end; ++r, to += plane, from += t.tile) {
      write_results<S>(a, from, to, run.length);
    }
  }
}

template <typename S>
void forward_points(const MaskedConv2dArgs& a, int64_t tile_index, int64_t row_begin,
                    int64_t row_end, Accumulator<S>* scratch) {
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
      pack(packer, scattered, static_cast<const S*>(a.source), group * p.depth + b * p.block_depth,
           p.depth_of(b), panel);
      panel_product(rows_of(p, b, begin, end, tile_rows), panel, t.tile,
                    static_cast<const T*>(a.values));
    }
    write_points<S>(a, t, tile_rows, begin, end);
  });
}

template <typename S>
void weight_grad_points(const MaskedConv2dWeightGradArgs& a, int64_t row_begin, int64_t row_end,
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
  at_point.kernel_height = at_point.kernel_width = 1;
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
        panel_sampled(rows_of(p, b, begin, end, tile_rows), panel, t.tile,
                      static_cast<T*>(a.values_grad));
      }
    });
  }
}

// Scratch of a call by strips: the panel, the padded source row, one padded output line, and the
// rows of all tiles of an item, tile after tile.
template <typename T>
struct StripScratch {
  T *panel, *line, *output, *tile_rows;

  static int64_t elements(const StripLayout& l, const PatternView& p, int64_t rows) {
    const int64_t vectors = l.images * l.vectors;
    return p.block_depth * l.columns * l.plane + l.line +
           (vectors + 1 + vectors * rows) * kLanes<T>;
  }
  StripScratch(const StripLayout& l, const PatternView& p, T* memory)
      : panel(memory),
        line(panel + p.block_depth * l.columns * l.plane),
        output(line + l.line),
        tile_rows(output + (l.images * l.vectors + 1) * kLanes<T>) {}
};

// Calls f(first vector, vectors) for the tiles of an item.
template <typename T, typename F>
inline void for_each_tile(int64_t vectors, F f) {
  for (int64_t v = 0; v < vectors;) {
    const int width = widest_tile<T>(vectors - v);
    f(v, width);
    v += width;
  }
}

template <typename T>
inline void place_strip(const StripLayout& l, const T* panel, int64_t first, int width,
                        TileRows<T>* tile) {
  TileRows<T>& rows = *tile;
  rows.contiguous = true;
  for (int v = 0; v < width; ++v) {
    const int64_t image = (first + v) / l.vectors, place = (first + v) % l.vectors;
    rows.base[v] = panel + image * l.panel_rows * l.pitch + place * kLanes<T>;
    rows.contiguous = rows.contiguous && rows.base[v] == rows.base[0] + v * kLanes<T>;
  }
}

// Copies the output lines of the rows [begin, end) from the tiles to the target.
template <typename S>
void write_strip(const MaskedConv2dArgs& a, const StripLayout& l, const Strip& s,
                 const StripScratch<Accumulator<S>>& memory, int64_t begin, int64_t end) {
  using T = Accumulator<S>;
  constexpr int64_t W = kLanes<T>;
  const ConvTarget& place = a.place;
  const int64_t count = end - begin, vectors = s.images * l.vectors;
  const int64_t plane = place.height * place.width;
  S* corner = static_cast<S*>(a.target) + (s.image * a.pattern.rows + begin) * plane +
              (s.y * place.step_y + place.first_y) * place.width + place.first_x;
  const int width = static_cast<int>(a.grid.width);
  if (l.pitch == widest_tile<T>(vectors) * W) {
    // One output row per tile: straight to its place.
    for (int64_t v = 0; v < vectors; v += l.pitch / W) {
      const int64_t image = v / l.vectors, y = v % l.vectors * W / l.pitch;
      if (y >= s.rows) continue;  // the last strip of an image may be short
      const T* from = memory.tile_rows + v * count * W;
      S* to = corner + image * a.pattern.rows * plane + y * place.step_y * place.width;
      for (int64_t r = 0; r < count; ++r, from += l.pitch, to += plane) {
        write_results<S>(a, from, to, width);
      }
    }
    return;
  }
  for (int64_t r = 0; r < count; ++r) {
    for_each_tile<T>(vectors, [&](int64_t v, int tile) {
      const T* from = memory.tile_rows + (v * count + r * tile) * W;
      for (int i = 0; i < tile; ++i) store(memory.output + (v + i) * W, load(from + i * W));
    });
    for (int64_t i = 0; i < s.images; ++i) {
      S* to = corner + (i * a.pattern.rows + r) * plane;
      const T* from = memory.output + i * l.vectors * W;
      for (int64_t y = 0; y < s.rows; ++y) {
        write_results<S>(a, from, to, width);
        from += l.pitch;
        to += place.step_y * place.width;
      }
    }
  }
}

template <typename S>
void forward_strips(const MaskedConv2dArgs& a, const StripLayout& l, int64_t item,
                    int64_t row_begin, int64_t row_end, StripPacker<S>* packer,
                    const StripScratch<Accumulator<S>>& memory) {
  using T = Accumulator<S>;
  const PatternView& p = a.pattern;
  const Strip s = strip_of(a.grid, l, item);
  const int64_t vectors = s.images * l.vectors;
  for_each_group(p, row_begin, row_end, [&](int64_t group, int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    for_each_tile<T>(vectors, [&](int64_t v, int width) {
      start_rows(memory.tile_rows + v * count * kLanes<T>, static_cast<const T*>(a.bias), begin,
                 end, width * kLanes<T>);
    });
    for (int64_t b = 0; b < p.blocks(); ++b) {
      const int64_t* row_ptr = p.row_ptr + b * p.rows;
      if (row_ptr[begin] == row_ptr[end]) continue;
      packer->pack(s, static_cast<const S*>(a.source), group * p.depth + b * p.block_depth,
                   p.depth_of(b), memory.panel);
      for_each_tile<T>(vectors, [&](int64_t v, int width) {
        TileRows<T> rows = rows_of(p, b, begin, end, memory.tile_rows + v * count * kLanes<T>);
        rows.offset = a.panel_offset;
        place_strip(l, memory.panel, v, width, &rows);
        product<T, kStripUnit>(rows, static_cast<const T*>(a.values), width);
      });
    }
    write_strip<S>(a, l, s, memory, begin, end);
  });
}

// Brings the output gradients of the rows [begin, end) into the tiles; zeros between the points.
template <typename S>
void read_strip(const MaskedConv2dWeightGradArgs& a, const StripLayout& l, const Strip& s,
                const StripScratch<Accumulator<S>>& memory, int64_t begin, int64_t end) {
  using T = Accumulator<S>;
  constexpr int64_t W = kLanes<T>;
  const int64_t count = end - begin, vectors = s.images * l.vectors;
  for (int64_t i = 0; i < vectors * W; ++i) memory.output[i] = T(0);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; i < s.images; ++i) {
      const S* from =
          static_cast<const S*>(a.grad) +
          (((s.image + i) * a.pattern.rows + begin + r) * a.grid.height + s.y) * a.grid.width;
      T* to = memory.output + i * l.vectors * W;
      for (int64_t y = 0; y < s.rows; ++y) {
        copy_widened(from, to, static_cast<int>(a.grid.width));
        from += a.grid.width;
        to += l.pitch;
      }
    }
    for_each_tile<T>(vectors, [&](int64_t v, int width) {
      T* to = memory.tile_rows + (v * count + r * width) * W;
      for (int i = 0; i < width; ++i) store(to + i * W, load(memory.output + (v + i) * W));
    });
  }
}

// Masks of the lanes of a tile that are grid points, or null when every row of the strip that the
// tile covers is one (lanes past a row's end are zeros in the panel).
template <typename T>
const typename TileRows<T>::Bits* live_lanes(const StripLayout& l, const Strip& s, int64_t first,
                                             int width, typename TileRows<T>::Bits* bits) {
  constexpr int64_t W = kLanes<T>;
  bool all = true;
  for (int64_t i = 0; i < width * W; ++i) {
    const int64_t at = (first + i / W) % l.vectors * W + i % W;
    const bool live = at / l.pitch < s.rows;
    bits[i] = live ? -1 : 0;
    all = all && live;
  }
  return all ? nullptr : bits;
}

template <typename S>
void weight_grad_strips(const MaskedConv2dWeightGradArgs& a, const StripLayout& l,
                        int64_t row_begin, int64_t row_end,
                        const StripScratch<Accumulator<S>>& memory) {
  using T = Accumulator<S>;
  const PatternView& p = a.pattern;
  StripPacker<S> packer(a.grid, l, p.groups * p.depth, memory.line);
  for (int64_t item = 0; item < strip_items(a.grid, l); ++item) {
    const Strip s = strip_of(a.grid, l, item);
    const int64_t vectors = s.images * l.vectors;
    for_each_group(p, row_begin, row_end, [&](int64_t group, int64_t begin, int64_t end) {
      read_strip<S>(a, l, s, memory, begin, end);
      for (int64_t b = 0; b < p.blocks(); ++b) {
        const int64_t* row_ptr = p.row_ptr + b * p.rows;
        if (row_ptr[begin] == row_ptr[end]) continue;
        packer.pack(s, static_cast<const S*>(a.source), group * p.depth + b * p.block_depth,
                    p.depth_of(b), memory.panel);
        for_each_tile<T>(vectors, [&](int64_t v, int width) {
          typename TileRows<T>::Bits bits[kMaxTileVectors * kLanes<T>];
          TileRows<T> rows =
              rows_of(p, b, begin, end, memory.tile_rows + v * (end - begin) * kLanes<T>);
          rows.offset = a.panel_offset;
          rows.live = live_lanes<T>(l, s, v, width, bits);
          place_strip(l, memory.panel, v, width, &rows);
          sampled<T, kStripUnit>(rows, static_cast<T*>(a.values_grad), width);
        });
      }
    });
  }
}

template <typename S>
void forward(const MaskedConv2dArgs& a, int64_t begin, int64_t end, int64_t row_begin,
             int64_t row_end, void* scratch) {
  using T = Accumulator<S>;
  T* memory = static_cast<T*>(scratch);
  if (a.way == ConvWay::lanes) {
    return masked_conv2d_lanes(a, begin, end, row_begin, row_end, scratch);
  }
  if (a.way == ConvWay::points) {
    for (int64_t i = begin; i < end; ++i) forward_points<S>(a, i, row_begin, row_end, memory);
    return;
  }
  StripLayout layout;
  lay_out_strips<T>(a.grid, a.pattern, &layout);
  const StripScratch<T> parts(layout, a.pattern, memory);
  StripPacker<S> packer(a.grid, layout, a.pattern.groups * a.pattern.depth, parts.line);
  for (int64_t i = begin; i < end; ++i) {
    forward_strips<S>(a, layout, i, row_begin, row_end, &packer, parts);
  }
}

template <typename S>
void weight_grad(const MaskedConv2dWeightGradArgs& a, int64_t row_begin, int64_t row_end,
                 void* scratch) {
  using T = Accumulator<S>;
  T* memory = static_cast<T*>(scratch);
  if (a.way == ConvWay::lanes) {
    return masked_conv2d_lanes_weight_grad(a, row_begin, row_end, scratch);
  }
  if (a.way == ConvWay::points) {
    weight_grad_points<S>(a, row_begin, row_end, memory);
    return;
  }
  StripLayout layout;
  lay_out_strips<T>(a.grid, a.pattern, &layout);
  weight_grad_strips<S>(a, layout, row_begin, row_end, StripScratch<T>(layout, a.pattern, memory));
}

template <typename T>
bool translate(const ConvGrid& g, const PatternView& p, uint16_t* offset) {
  StripLayout l;
  if (!lay_out_strips<T>(g, p, &l)) return false;
  // Position inside a channel's planes, per tap, in units of kStripUnit.
  constexpr int64_t unit = kStripUnit / static_cast<int64_t>(sizeof(T));
  int64_t of_tap[kMaxKernel * kMaxKernel] = {};
  for (int64_t t = 0; t < p.taps; ++t) {
    const int64_t ky = t / g.kernel_width, kx = t % g.kernel_width;
    if (g.live_tap[t] == 0) continue;
    of_tap[t] =
        (l.column_of[kx] * l.plane + (l.phase[l.phase_of[ky]].start + l.relative[ky]) * l.pitch) /
        unit;
  }
  const int64_t per_channel = l.columns * l.plane / unit;
  const SmallDivider by_taps(p.taps);
  for (int64_t e = 0; e < p.nnz; ++e) {
    const int64_t channel = by_taps(p.offset[e]);
    offset[e] =
        static_cast<uint16_t>(channel * per_channel + of_tap[p.offset[e] - channel * p.taps]);
  }
  return true;
}

// Lanes in use: of a strip's rows, and of the batch in the lanes.
// Whether the batch goes to the lanes: what decides is which way leaves fewer lanes empty. Large
// contiguous sources are better walked image by image: kLanes images at once are too many pages.
template <typename T>
bool prefers_lanes(const ConvGrid& g, const PatternView& p) {
  constexpr int64_t W = kLanes<T>;
  constexpr int64_t kManyBytes = 16 << 20;
  const double filled =
      static_cast<double>(g.batch) / static_cast<double>(most(1, ceil_div(g.batch, W) * W));
  StripLayout l;
  if (!lay_out_strips<T>(g, p, &l)) return filled >= 0.5;
  const double whole = static_cast<double>(g.width) / static_cast<double>(l.pitch);
  const int64_t bytes = g.batch * p.groups * p.depth * g.source_height * g.source_width *
                        static_cast<int64_t>(sizeof(T));
  if (bytes > kManyBytes && whole > 0.85) return false;
  return filled > (l.pitch % W == 0 ? 0.8 : 0.56) * whole;
}

template <typename T>
ConvWay way_of(const ConvGrid& g, const PatternView& p, DType dtype, bool lanes, uint16_t* offset) {
  if ((lanes || prefers_lanes<T>(g, p)) && lane_offsets(g, p, dtype, offset)) return ConvWay::lanes;
  return translate<T>(g, p, offset) ? ConvWay::strips : ConvWay::points;
}

template <typename T>
int64_t items_of(const ConvGrid& g, const PatternView& p, bool strips) {
  if (!strips) return ceil_div(g.points(), kTile<T>);
  StripLayout l;
  lay_out_strips<T>(g, p, &l);
  return strip_items(g, l);
}

template <typename T>
int64_t scratch_of(const ConvGrid& g, const PatternView& p, bool strips, int64_t rows) {
  const int64_t rows_per_group = p.rows / p.groups;
  const int64_t held = rows < rows_per_group ? rows : rows_per_group;
  if (!strips) return (p.block_cols() + held) * kTileBytes;
  StripLayout l;
  lay_out_strips<T>(g, p, &l);
  return StripScratch<T>::elements(l, p, held) * static_cast<int64_t>(sizeof(T));
}

}  // namespace

ConvWay conv_way(const ConvGrid& g, const PatternView& p, DType dtype, bool lanes,
                 uint16_t* offset) {
  return dtype == DType::f64 ? way_of<double>(g, p, dtype, lanes, offset)
                             : way_of<float>(g, p, dtype, lanes, offset);
}

int64_t masked_conv2d_items(const ConvGrid& g, const PatternView& p, DType dtype, ConvWay way) {
  if (way == ConvWay::lanes) return lane_sizes(g, p, dtype).items;
  const bool strips = way == ConvWay::strips;
  return dtype == DType::f64 ? items_of<double>(g, p, strips) : items_of<float>(g, p, strips);
}

int64_t masked_conv2d_scratch(const ConvGrid& g, const PatternView& p, DType dtype, ConvWay way,
                              int64_t rows) {
  if (way == ConvWay::lanes) return lane_sizes(g, p, dtype).scratch;
  const bool strips = way == ConvWay::strips;
  return dtype == DType::f64 ? scratch_of<double>(g, p, strips, rows)
                             : scratch_of<float>(g, p, strips, rows);
}

void masked_conv2d(const MaskedConv2dArgs& a, int64_t begin, int64_t end, int64_t row_begin,
                   int64_t row_end, void* scratch) {
  switch (a.dtype) {
    case DType::f32:
      return forward<float>(a, begin, end, row_begin, row_end, scratch);
    case DType::f64:
      return forward<double>(a, begin, end, row_begin, row_end, scratch);
    case DType::bf16:
      return forward<BFloat16>(a, begin, end, row_begin, row_end, scratch);
    case DType::f16:
      return forward<Float16>(a, begin, end, row_begin, row_end, scratch);
  }
}

void masked_conv2d_weight_grad(const MaskedConv2dWeightGradArgs& a, int64_t row_begin,
                               int64_t row_end, void* scratch) {
  switch (a.dtype) {
    case DType::f32:
      return weight_grad<float>(a, row_begin, row_end, scratch);
    case DType::f64:
      return weight_grad<double>(a, row_begin, row_end, scratch);
    case DType::bf16:
      return weight_grad<BFloat16>(a, row_begin, row_end, scratch);
    case DType::f16:
      return weight_grad<Float16>(a, row_begin, row_end, scratch);
  }
}

}  // namespace fastprune::FASTPRUNE_ISA
