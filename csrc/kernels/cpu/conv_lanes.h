// Convolution with the batch in the lanes: a vector holds one pixel of kLanes images.
//
// The panel of a block of channels holds one vector per pixel that a tile of grid points needs,
// with its padding. A tap is then a constant number of vectors, every load is aligned, and no lane
// is lost to narrow maps, strides or borders. Sources that store the batch innermost are copied
// into the panel as they are; others are transposed, kLanes images by kLanes pixels at a time.
#pragma once

#include <cstring>

#include "kernels/cpu/activations.h"
#include "kernels/cpu/masked_conv2d.h"
#include "kernels/cpu/panel.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

constexpr int kMaxLaneKernel = 16;                 // per axis; larger kernels go by points
constexpr int64_t kLanePanelBytes = 512 << 10;     // panel and accumulators share a 1 MB L2 cache
constexpr int64_t kLaneRowsBytes = 512 << 10;      // accumulators of one tile
constexpr int64_t kLanePoints = 256;               // grid points of one tile, at most
constexpr int64_t kLaneRowChunk = 8 * kRowWindow;  // rows whose accumulators are held at once

// One axis of a tile: which panel index a tap reads. Source coordinates are sorted by their residue
// modulo the step, so that consecutive points read consecutive panel indices.
struct LaneAxis {
  struct Phase {
    int64_t residue, first, span, start;
  };
  int64_t step;
  int phases;
  Phase phase[kMaxLaneKernel];
  int64_t start_of[kMaxLaneKernel];  // tap -> panel index that point 0 reads; -1: tap not live
  int64_t extent;                    // panel indices for `count` points

  // tap(k) is the source coordinate that point 0 reads; live(k) whether the tap is used at all.
  template <typename Tap, typename Live>
  void lay_out(int64_t step_in, int64_t taps, int64_t count, Tap tap, Live live) {
    step = step_in;
    phases = 0;
    int phase_of[kMaxLaneKernel];
    int64_t at[kMaxLaneKernel];
    for (int64_t k = 0; k < taps; ++k) {
      start_of[k] = -1;
      if (!live(k)) continue;
      at[k] = floor_div(tap(k), step);
      const int64_t residue = tap(k) - at[k] * step;
      int f = 0;
      while (f < phases && phase[f].residue != residue) ++f;
      if (f == phases) phase[phases++] = Phase{residue, at[k], 0, 0};
      const int64_t low = least(phase[f].first, at[k]);
      phase[f].span = most(phase[f].first + phase[f].span, at[k]) - low;
      phase[f].first = low;
      phase_of[k] = f;
    }
    extent = 0;
    for (int f = 0; f < phases; ++f) {
      phase[f].start = extent;
      extent += count + phase[f].span;
    }
    for (int64_t k = 0; k < taps; ++k) {
      if (!live(k)) continue;
      const Phase& p = phase[phase_of[k]];
      start_of[k] = p.start + at[k] - p.first;
    }
  }

  // Panel index of a source coordinate for a tile that starts at point `first_point` and has
  // `count` points; -1 when the tile does not read it.
  int64_t index_of(int64_t source, int64_t first_point, int64_t count) const {
    const int64_t quotient = floor_div(source, step), residue = source - quotient * step;
    for (int f = 0; f < phases; ++f) {
      if (phase[f].residue != residue) continue;
      const int64_t i = quotient - phase[f].first - first_point;
      return i >= 0 && i < count + phase[f].span ? phase[f].start + i : -1;
    }
    return -1;
  }
  // Least and greatest source coordinate, plus one, that such a tile reads.
  void range(int64_t first_point, int64_t count, int64_t* low, int64_t* high) const {
    *low = *high = 0;
    for (int f = 0; f < phases; ++f) {
      const int64_t from = (phase[f].first + first_point) * step + phase[f].residue;
      const int64_t to = from + (count + phase[f].span - 1) * step + 1;
      *low = f == 0 ? from : least(*low, from);
      *high = f == 0 ? to : most(*high, to);
    }
  }
};

struct LaneLayout {
  LaneAxis y, x;
  int64_t rows, cols;        // grid points of a tile
  int64_t tiles_y, tiles_x;  // tiles per image
  int64_t groups;            // lane groups (kLanes images each) of a tile
  int64_t lane_groups;       // of the whole batch
  int64_t pitch;             // vectors per panel row
  int64_t plane;             // vectors per channel and lane group
  int64_t channel;           // vectors per channel
  int64_t row_chunk;         // rows whose accumulators are held at once
  int64_t columns;           // source columns between the first and the last that a tile reads

  int64_t points() const { return groups * rows * cols; }
  // Source pixels in the runs of a tile, at most: what each phase spans, and the end of a run that
  // begins in a phase and goes on behind it.
  int64_t sources() const {
    constexpr int64_t lanes = kVectorBytes / static_cast<int64_t>(sizeof(float));
    return y.extent * (x.extent * x.step + x.phases * lanes);
  }
};

inline bool live_in_row(const ConvGrid& g, int64_t ky) {
  for (int64_t kx = 0; kx < g.kernel_width; ++kx) {
    if (g.live_tap[ky * g.kernel_width + kx] != 0) return true;
  }
  return false;
}
inline bool live_in_column(const ConvGrid& g, int64_t kx) {
  for (int64_t ky = 0; ky < g.kernel_height; ++ky) {
    if (g.live_tap[ky * g.kernel_width + kx] != 0) return true;
  }
  return false;
}

// Sizes for tiles of rows x cols points. False when panel or accumulators would be too large.
template <typename T>
inline bool lay_out_lane_tile(const ConvGrid& g, const PatternView& p, int64_t rows, int64_t cols,
                              LaneLayout* l) {
  l->rows = rows;
  l->cols = cols;
  l->y.lay_out(
      g.step_y, g.kernel_height, rows, [&](int64_t k) { return g.tap_y[k * g.kernel_width]; },
      [&](int64_t k) { return live_in_row(g, k); });
  l->x.lay_out(
      g.step_x, g.kernel_width, cols, [&](int64_t k) { return g.tap_x[k]; },
      [&](int64_t k) { return live_in_column(g, k); });
  // Dilations beyond the map: the sizes below would not fit 64 bits.
  constexpr int64_t kMostVectors = kLanePanelBytes / kVectorBytes;
  if (l->y.extent > kMostVectors || l->x.extent > kMostVectors) return false;
  l->tiles_y = ceil_div(g.height, rows);
  l->tiles_x = ceil_div(g.width, cols);
  l->pitch = l->x.extent;
  l->plane = l->y.extent * l->pitch;
  int64_t low, high;
  l->x.range(0, cols, &low, &high);
  l->columns = least(high - low, g.source_width);
  // Maps of a few points: several lane groups make up a register tile.
  const int64_t small = l->tiles_y * l->tiles_x == 1 ? 2 * kMaxTileVectors / (rows * cols) : 1;
  l->groups = most(1, least(l->lane_groups, small));
  l->channel = (l->groups * l->plane) | 1;  // spreads the channels over all sets of the L1 cache
  return l->points() <= kLanePoints &&
         l->row_chunk * l->points() * kVectorBytes <= kLaneRowsBytes &&
         p.block_depth * l->channel * kVectorBytes <= kLanePanelBytes;
}

// The layout of a call; false where it does not apply: large kernels, enormous blocks.
template <typename T>
inline bool lay_out_lanes(const ConvGrid& g, const PatternView& p, LaneLayout* l) {
  constexpr int64_t W = kLanes<T>;
  if (g.kernel_height > kMaxLaneKernel || g.kernel_width > kMaxLaneKernel) return false;
  l->lane_groups = ceil_div(g.batch, W);
  const int64_t rows_per_group = p.rows / p.groups;
  l->row_chunk = least(most(rows_per_group, 1), kLaneRowChunk);
  // Fewest packed vectors per point: whole rows where they fit, else parts of them.
  double best_cost = 0;
  int64_t best_rows = 0, best_cols = 0;
  for (int64_t parts = 1; parts <= g.width; parts = parts < 4 ? parts + 1 : parts * 2) {
    int64_t cols = ceil_div(g.width, parts);
    if (parts > 1 && cols > kMaxTileVectors) {
      cols = ceil_div(cols, kMaxTileVectors) * kMaxTileVectors;
    }
    for (int64_t rows = 1; rows <= g.height; ++rows) {
      if (!lay_out_lane_tile<T>(g, p, rows, cols, l)) break;
      const double covered = static_cast<double>(rows * l->tiles_y) / static_cast<double>(g.height);
      const double packed =
          cols == g.width
              ? static_cast<double>(l->plane)
              : static_cast<double>(l->y.extent * ceil_div(l->pitch * l->x.step, W) * W);
      const double cost = covered * packed / static_cast<double>(rows * cols);
      if (best_rows == 0 || cost < best_cost) {
        best_cost = cost;
        best_rows = rows;
        best_cols = cols;
      }
    }
    if (best_rows != 0 && cols <= kMaxTileVectors) break;
  }
  return best_rows != 0 && lay_out_lane_tile<T>(g, p, best_rows, best_cols, l);
}

// What one item covers.
struct LaneTile {
  int64_t group, groups;  // first lane group, and how many
  int64_t y, x, rows, cols;
  int64_t points() const { return groups * rows * cols; }
  bool same_place(const LaneTile& t) const {
    return y == t.y && x == t.x && rows == t.rows && cols == t.cols;
  }
};

inline int64_t lane_items(const LaneLayout& l) {
  return ceil_div(l.lane_groups, l.groups) * l.tiles_y * l.tiles_x;
}

inline LaneTile lane_tile(const ConvGrid& g, const LaneLayout& l, int64_t item) {
  // Lane groups innermost: with the batch innermost they share cache lines and pages.
  const int64_t groups = ceil_div(l.lane_groups, l.groups), tile = item / groups;
  LaneTile t;
  t.group = item % groups * l.groups;
  t.groups = least(l.groups, l.lane_groups - t.group);
  t.y = tile / l.tiles_x * l.rows;
  t.x = tile % l.tiles_x * l.cols;
  t.rows = least(l.rows, g.height - t.y);
  t.cols = least(l.cols, g.width - t.x);
  return t;
}

// Calls f(first point, vectors) for the register tiles of an item: parts of rows of even length, or
// for narrow maps any eight points.
template <typename F>
inline void for_each_lane_tile(const LaneTile& t, F f) {
  const bool flat = t.cols <= kMaxTileVectors / 2;
  const int64_t n = flat ? t.points() : t.cols, lines = flat ? 1 : t.groups * t.rows;
  const int64_t parts = ceil_div(n, kMaxTileVectors);
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t from = n * i / parts, to = n * (i + 1) / parts;
      f(line * n + from, static_cast<int>(to - from));
    }
  }
}

// Where point i of an item stands in the panel, in vectors.
inline int64_t lane_place(const LaneLayout& l, const LaneTile& t, int64_t i) {
  const int64_t x = i % t.cols, y = i / t.cols % t.rows, group = i / (t.cols * t.rows);
  return group * l.plane + y * l.pitch + x;
}

template <typename T>
inline void place_lane_tile(const LaneLayout& l, const LaneTile& t, const T* panel, int64_t first,
                            int vectors, TileRows<T>* rows) {
  rows->contiguous = true;
  for (int v = 0; v < vectors; ++v) {
    rows->base[v] = panel + lane_place(l, t, first + v) * kLanes<T>;
    rows->contiguous = rows->contiguous && rows->base[v] == rows->base[0] + v * kLanes<T>;
  }
}

// Which source pixels an item needs, and where they go; the same for every channel.
struct LanePlaces {
  struct Run {
    int64_t source;  // first pixel, inside a plane of the source
    int32_t count;   // consecutive pixels, at most kLanes
    int32_t first;   // of their places
  };
  Run* run;
  int32_t* place;  // per pixel, in vectors inside a panel plane; -1: not needed
  int32_t* blank;  // panel vectors that no pixel fills: padding
  int64_t runs, blanks;

  static int64_t bytes(const LaneLayout& l) {
    const int64_t of_sources = l.sources() * static_cast<int64_t>(sizeof(Run) + 4);
    return ceil_div(of_sources + l.columns * 4 + l.plane * 5, 64) * 64;
  }
  LanePlaces(const LaneLayout& l, void* memory)
      : run(static_cast<Run*>(memory)),
        place(reinterpret_cast<int32_t*>(run + l.sources())),
        blank(place + l.sources()),
        column_(blank + l.plane),
        filled_(reinterpret_cast<uint8_t*>(column_ + l.columns)) {}

  // For the tile of an item; cheap when the last item's was in the same place.
  void find(const ConvGrid& g, const LaneLayout& l, const LaneTile& t, int lanes) {
    if (found_ && last_.same_place(t)) return;
    found_ = true;
    last_ = t;
    int64_t y_low, y_high, x_low, x_high;
    l.y.range(t.y, t.rows, &y_low, &y_high);
    l.x.range(t.x, t.cols, &x_low, &x_high);
    y_low = most(y_low, 0);
    x_low = most(x_low, 0);
    y_high = least(y_high, g.source_height);
    x_high = least(x_high, g.source_width);
    std::memset(filled_, 0, static_cast<size_t>(l.plane));
    for (int64_t x = x_low; x < x_high; ++x) {
      column_[x - x_low] = static_cast<int32_t>(l.x.index_of(x, t.x, t.cols));
    }
    runs = 0;
    int32_t places = 0;
    for (int64_t y = y_low; y < y_high; ++y) {
      const int64_t row = l.y.index_of(y, t.y, t.rows);
      if (row < 0) continue;
      for (int64_t x = x_low; x < x_high; ++x) {
        const int64_t column = column_[x - x_low], source = y * g.source_width + x;
        const int64_t at = column < 0 ? -1 : row * l.pitch + column;
        const bool follows = runs > 0 && run[runs - 1].count < lanes &&
                             run[runs - 1].source + run[runs - 1].count == source;
        if (!follows) {
          if (at < 0) continue;  // no run starts with a pixel that nobody needs
          run[runs++] = Run{source, 0, places};
        }
        ++run[runs - 1].count;
        place[places++] = static_cast<int32_t>(at);
        if (at >= 0) filled_[at] = 1;
      }
    }
    blanks = 0;
    for (int64_t i = 0; i < l.plane; ++i) {
      if (filled_[i] == 0) blank[blanks++] = static_cast<int32_t>(i);
    }
  }

 private:
  int32_t* column_;  // per source column of the tile: its panel column, or -1
  uint8_t* filled_;
  bool found_ = false;
  LaneTile last_{};
};

// Fills the panel with `channels` channels from `first_channel` of a source of `all` channels.
template <typename S>
void pack_lanes(const ConvGrid& g, const LaneLayout& l, const LaneTile& t, const LanePlaces& places,
                const S* source, bool batch_last, int64_t all, int64_t first_channel,
                int64_t channels, Accumulator<S>* panel) {
  using T = Accumulator<S>;
  constexpr int64_t W = kLanes<T>;
  const int64_t plane = g.source_height * g.source_width;
  const int64_t elements = g.batch * all * plane;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t k = 0; k < t.groups; ++k) {
      T* to = panel + (c * l.channel + k * l.plane) * W;
      const int64_t image = (t.group + k) * W;
      const int lanes = static_cast<int>(least(W, g.batch - image));
      for (int64_t i = 0; i < places.blanks; ++i) store(to + places.blank[i] * W, Vec<T>{});
      for (int64_t i = 0; i < places.runs; ++i) {
        const LanePlaces::Run& run = places.run[i];
        const int32_t* place = places.place + run.first;
        if (batch_last) {
          const S* from = source + ((first_channel + c) * plane + run.source) * g.batch + image;
          const int64_t next = c + 1 < channels ? plane * g.batch : 0;
          for (int j = 0; j < run.count; ++j, from += g.batch) {
            __builtin_prefetch(from + next);
            if (place[j] >= 0) store(to + place[j] * W, load_widened(from, lanes));
          }
          continue;
        }
        Vec<T> block[W];
        const int64_t first = (image * all + first_channel + c) * plane + run.source;
        const int64_t stride = all * plane;
        if (run.count == W && lanes == W) {  // unrolled, so that the block stays in registers
          const S* from = source + first;
          // Planes are too short for the processor to see the streams: ask for the next channel's.
          const int64_t next = c + 1 < channels ? plane : 0;
#pragma GCC unroll 16
          for (int j = 0; j < W; ++j) __builtin_prefetch(from + j * stride + next);
#pragma GCC unroll 16
          for (int j = 0; j < W; ++j) block[j] = load_widened(from + j * stride, W);
          transpose<T>(block);
#pragma GCC unroll 16
          for (int j = 0; j < W; ++j) {
            if (place[j] >= 0) store(to + place[j] * W, block[j]);
          }
          continue;
        }
        for (int j = 0; j < W; ++j) {
          const int64_t at = first + j * stride;
          // Beyond the run there may be other pixels, which are dropped, but not beyond the tensor.
          block[j] = j >= lanes ? Vec<T>{}
                                : load_widened(source + at, at + W <= elements ? static_cast<int>(W)
                                                                               : run.count);
        }
        transpose<T>(block);
        for (int j = 0; j < run.count; ++j) {
          if (place[j] >= 0) store(to + place[j] * W, block[j]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
