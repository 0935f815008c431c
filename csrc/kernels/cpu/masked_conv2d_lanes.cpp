// Drivers of the convolution with the batch in the lanes (conv_lanes.h).
#include "kernels/cpu/conv_lanes.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// Scratch of one thread: the panel, the tables of an item, and the rows of all its register tiles.
template <typename T>
struct LaneScratch {
  T *panel, *tile_rows;
  void* tables;
  int32_t *tile_first, *tile_vectors;  // per point: the register tile that holds it

  static int64_t bytes(const LaneLayout& l, const PatternView& p) {
    return (p.block_depth * l.channel + l.row_chunk * l.points()) * kVectorBytes +
           LanePlaces::bytes(l) + 2 * 4 * kLanePoints;
  }
  LaneScratch(const LaneLayout& l, const PatternView& p, void* memory)
      : panel(static_cast<T*>(memory)),
        tile_rows(panel + p.block_depth * l.channel * kLanes<T>),
        tables(tile_rows + l.row_chunk * l.points() * kLanes<T>),
        tile_first(reinterpret_cast<int32_t*>(static_cast<char*>(tables) + LanePlaces::bytes(l))),
        tile_vectors(tile_first + kLanePoints) {}

  void index_points(const LaneTile& t) {
    for_each_lane_tile(t, [&](int64_t first, int vectors) {
      for (int v = 0; v < vectors; ++v) {
        tile_first[first + v] = static_cast<int32_t>(first);
        tile_vectors[first + v] = vectors;
      }
    });
  }
  // The vector of point i in row r of `count` held rows.
  T* at(int64_t i, int64_t r, int64_t count) const {
    return tile_rows +
           (tile_first[i] * count + r * tile_vectors[i] + i - tile_first[i]) * kLanes<T>;
  }
};

// Calls f(begin, end) for parts of the rows [row_begin, row_end) of one group each, at most `chunk`
// rows long, cut at windows.
template <typename F>
inline void for_each_chunk(const PatternView& p, int64_t row_begin, int64_t row_end, int64_t chunk,
                           F f) {
  const int64_t rows_per_group = p.rows / p.groups;
  for (int64_t begin = row_begin; begin < row_end;) {
    const int64_t group = begin / rows_per_group;
    const int64_t end = least(least((group + 1) * rows_per_group, row_end), begin + chunk);
    f(group, begin, end);
    begin = end;
  }
}

// Runs of points of an item that follow each other in the target: f(first point, count, offset of
// the first one in a plane, lane group).
template <typename F>
inline void for_each_point_run(const LaneTile& t, const ConvTarget& place, int64_t grid_width,
                               int64_t most_points, F f) {
  const bool whole =
      t.cols == grid_width && place.step_x == 1 && place.step_y == 1 && place.width == grid_width;
  const int64_t rows = whole ? 1 : t.rows, length = whole ? t.rows * t.cols : t.cols;
  for (int64_t k = 0; k < t.groups; ++k) {
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t x = 0; x < length; x += most_points) {
        const int64_t at = ((t.y + y) * place.step_y + place.first_y) * place.width +
                           (t.x + x) * place.step_x + place.first_x;
        f((k * rows + y) * length + x, static_cast<int>(least(most_points, length - x)), at,
          t.group + k);
      }
    }
  }
}

template <typename S>
void write_lanes(const MaskedConv2dArgs& a, const LaneTile& t,
                 const LaneScratch<Accumulator<S>>& memory, int64_t begin, int64_t end) {
  using T = Accumulator<S>;
  constexpr int W = kLanes<T>;
  const ConvTarget& place = a.place;
  const int64_t plane = place.height * place.width, count = end - begin, batch = a.grid.batch;
  S* target = static_cast<S*>(a.target);
  const S* residual = static_cast<const S*>(a.residual);
  const auto added = [&](int64_t at) { return residual == nullptr ? nullptr : residual + at; };
  if (a.target_batch_last) {
    for_each_lane_tile(t, [&](int64_t first, int vectors) {
      const T* from = memory.tile_rows + first * count * W;
      int64_t spot[kMaxTileVectors];
      int lanes[kMaxTileVectors];
      bool whole = true;
      for (int v = 0; v < vectors; ++v) {
        const int64_t i = first + v, x = i % t.cols, y = i / t.cols % t.rows;
        const int64_t image = (t.group + i / (t.cols * t.rows)) * W;
        const int64_t pixel = ((t.y + y) * place.step_y + place.first_y) * place.width +
                              (t.x + x) * place.step_x + place.first_x;
        spot[v] = (begin * plane + pixel) * batch + image;
        lanes[v] = static_cast<int>(least(W, batch - image));
        whole = whole && lanes[v] == W;
      }
      for (int64_t r = 0; r < count; ++r, from += vectors * W) {
        const int64_t row = r * plane * batch;
        for (int v = 0; v < vectors; ++v) {
          finish_vector<S>(load(from + v * W), target + row + spot[v], added(row + spot[v]), a.relu,
                           whole ? W : lanes[v]);
        }
      }
    });
    return;
  }
  for (int64_t r = 0; r < count; ++r) {
    for_each_point_run(t, place, a.grid.width, W, [&](int64_t first, int n, int64_t at, int64_t k) {
      Vec<T> block[W];
      const int lanes = static_cast<int>(least(W, batch - k * W));
      if (n == W && lanes == W && place.step_x == 1) {
        // Unrolled, so that the block stays in registers.
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) block[j] = load(memory.at(first + j, r, count));
        transpose<T>(block);
        const int64_t to = (k * W * a.pattern.rows + begin + r) * plane + at;
        const int64_t stride = a.pattern.rows * plane;
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          finish_vector<S>(block[i], target + to + i * stride, added(to + i * stride), a.relu, W);
        }
        return;
      }
      for (int j = 0; j < n; ++j) block[j] = load(memory.at(first + j, r, count));
      for (int j = n; j < W; ++j) block[j] = Vec<T>{};
      transpose<T>(block);
      for (int i = 0; i < lanes; ++i) {
        const int64_t to = ((k * W + i) * a.pattern.rows + begin + r) * plane + at;
        if (place.step_x == 1) {
          finish_vector<S>(block[i], target + to, added(to), a.relu, n);
          continue;
        }
        alignas(kVectorBytes) T points[W];
        store(points, block[i]);
        for (int j = 0; j < n; ++j) {
          const int64_t spot = to + j * place.step_x;
          target[spot] = finish<S>(points[j], added(spot), a.relu);
        }
      }
    });
  }
}

template <typename S>
void forward(const MaskedConv2dArgs& a, int64_t item_begin, int64_t item_end, int64_t row_begin,
             int64_t row_end, void* scratch) {
  using T = Accumulator<S>;
  constexpr int W = kLanes<T>;
  const PatternView& p = a.pattern;
  LaneLayout l;
  lay_out_lanes<T>(a.grid, p, &l);
  LaneScratch<T> memory(l, p, scratch);
  LanePlaces places(l, memory.tables);
  for (int64_t item = item_begin; item < item_end; ++item) {
    const LaneTile t = lane_tile(a.grid, l, item);
    places.find(a.grid, l, t, W);
    memory.index_points(t);
    int64_t packed = -1;  // which block of which group the panel holds
    for_each_chunk(
        p, row_begin, row_end, l.row_chunk, [&](int64_t group, int64_t begin, int64_t end) {
          const int64_t count = end - begin;
          for_each_lane_tile(t, [&](int64_t first, int vectors) {
            start_rows(memory.tile_rows + first * count * W, static_cast<const T*>(a.bias), begin,
                       end, vectors * W);
          });
          for (int64_t b = 0; b < p.blocks(); ++b) {
            if (p.row_ptr[b * p.rows + begin] == p.row_ptr[b * p.rows + end]) continue;
            if (packed != group * p.blocks() + b) {
              pack_lanes<S>(a.grid, l, t, places, static_cast<const S*>(a.source),
                            a.source_batch_last, p.groups * p.depth,
                            group * p.depth + b * p.block_depth, p.depth_of(b), memory.panel);
              packed = group * p.blocks() + b;
            }
            for_each_lane_tile(t, [&](int64_t first, int vectors) {
              TileRows<T> rows = rows_of(p, b, begin, end, memory.tile_rows + first * count * W);
              rows.offset = a.panel_offset;
              place_lane_tile(l, t, memory.panel, first, vectors, &rows);
              product<T, kVectorBytes>(rows, static_cast<const T*>(a.values), vectors);
            });
          }
          write_lanes<S>(a, t, memory, begin, end);
        });
  }
}

// Brings the output gradients of the rows [begin, end) into the register tiles of an item.
template <typename S>
void read_lanes(const MaskedConv2dWeightGradArgs& a, const LaneTile& t,
                const LaneScratch<Accumulator<S>>& memory, int64_t begin, int64_t end) {
  using T = Accumulator<S>;
  constexpr int W = kLanes<T>;
  const int64_t plane = a.grid.height * a.grid.width, count = end - begin, batch = a.grid.batch;
  const int64_t elements = batch * a.pattern.rows * plane;
  const S* grad = static_cast<const S*>(a.grad);
  const ConvTarget place{a.grid.height, a.grid.width, 0, 0, 1, 1};
  for (int64_t r = 0; r < count; ++r) {
    for_each_point_run(t, place, a.grid.width, W, [&](int64_t first, int n, int64_t at, int64_t k) {
      const int lanes = static_cast<int>(least(W, batch - k * W));
      if (a.grad_batch_last) {
        for (int j = 0; j < n; ++j) {
          const S* from = grad + ((begin + r) * plane + at + j) * batch + k * W;
          store(memory.at(first + j, r, count), load_widened(from, lanes));
        }
        return;
      }
      Vec<T> block[W];
      for (int i = 0; i < W; ++i) {
        const int64_t from = ((k * W + i) * a.pattern.rows + begin + r) * plane + at;
        block[i] = i >= lanes ? Vec<T>{} : load_widened(grad + from, from + W <= elements ? W : n);
      }
      transpose<T>(block);
      for (int j = 0; j < n; ++j) store(memory.at(first + j, r, count), block[j]);
    });
  }
}

template <typename S>
void weight_grad(const MaskedConv2dWeightGradArgs& a, int64_t row_begin, int64_t row_end,
                 void* scratch) {
  using T = Accumulator<S>;
  constexpr int W = kLanes<T>;
  const PatternView& p = a.pattern;
  LaneLayout l;
  lay_out_lanes<T>(a.grid, p, &l);
  LaneScratch<T> memory(l, p, scratch);
  LanePlaces places(l, memory.tables);
  for (int64_t item = 0; item < lane_items(l); ++item) {
    const LaneTile t = lane_tile(a.grid, l, item);
    places.find(a.grid, l, t, W);
    memory.index_points(t);
    for_each_chunk(
        p, row_begin, row_end, l.row_chunk, [&](int64_t group, int64_t begin, int64_t end) {
          const int64_t count = end - begin;
          read_lanes<S>(a, t, memory, begin, end);
          for (int64_t b = 0; b < p.blocks(); ++b) {
            if (p.row_ptr[b * p.rows + begin] == p.row_ptr[b * p.rows + end]) continue;
            pack_lanes<S>(a.grid, l, t, places, static_cast<const S*>(a.source),
                          a.source_batch_last, p.groups * p.depth,
                          group * p.depth + b * p.block_depth, p.depth_of(b), memory.panel);
            for_each_lane_tile(t, [&](int64_t first, int vectors) {
              TileRows<T> rows = rows_of(p, b, begin, end, memory.tile_rows + first * count * W);
              rows.offset = a.panel_offset;
              place_lane_tile(l, t, memory.panel, first, vectors, &rows);
              sampled<T, kVectorBytes>(rows, static_cast<T*>(a.values_grad), vectors);
            });
          }
        });
  }
}

// Where each entry reads in the panel, in vectors.
template <typename T>
bool translate(const ConvGrid& g, const PatternView& p, uint16_t* offset) {
  LaneLayout l;
  if (!lay_out_lanes<T>(g, p, &l)) return false;
  int64_t of_tap[kMaxLaneKernel * kMaxLaneKernel] = {};
  for (int64_t t = 0; t < p.taps; ++t) {
    if (g.live_tap[t] == 0) continue;
    of_tap[t] = l.y.start_of[t / g.kernel_width] * l.pitch + l.x.start_of[t % g.kernel_width];
  }
  const SmallDivider by_taps(p.taps);
  for (int64_t e = 0; e < p.nnz; ++e) {
    const int64_t channel = by_taps(p.offset[e]);
    offset[e] = static_cast<uint16_t>(channel * l.channel + of_tap[p.offset[e] - channel * p.taps]);
  }
  return true;
}

template <typename T>
LaneSizes sizes(const ConvGrid& g, const PatternView& p) {
  LaneLayout l;
  lay_out_lanes<T>(g, p, &l);
  return LaneSizes{lane_items(l), LaneScratch<T>::bytes(l, p)};
}

}  // namespace

bool lanes_fit(const ConvGrid& g, const PatternView& p, DType dtype) {
  LaneLayout l;
  return dtype == DType::f64 ? lay_out_lanes<double>(g, p, &l) : lay_out_lanes<float>(g, p, &l);
}

bool lane_offsets(const ConvGrid& g, const PatternView& p, DType dtype, uint16_t* offset) {
  return dtype == DType::f64 ? translate<double>(g, p, offset) : translate<float>(g, p, offset);
}

LaneSizes lane_sizes(const ConvGrid& g, const PatternView& p, DType dtype) {
  return dtype == DType::f64 ? sizes<double>(g, p) : sizes<float>(g, p);
}

void masked_conv2d_lanes(const MaskedConv2dArgs& a, int64_t begin, int64_t end, int64_t row_begin,
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

void masked_conv2d_lanes_weight_grad(const MaskedConv2dWeightGradArgs& a, int64_t row_begin,
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
