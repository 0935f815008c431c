// Convolution over strips: whole rows of grid points at once.
//
// The panel of a block of channels holds, for each channel and live kernel column, the source rows
// that a strip of grid rows needs, already shifted by the column's tap and padded to a common
// pitch. A kernel row is then a constant distance: the nonzero (channel, ky, kx) reads a point's
// own position plus one offset, loads are aligned when the pitch is whole vectors, and a source row
// is packed once per kernel column instead of once per tap.
#pragma once

#include <cstring>

#include "kernels/cpu/activations.h"
#include "kernels/cpu/conv_panel.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

constexpr int kStripUnit = 16;              // bytes: entries' offsets count in these
constexpr int kMaxKernel = 16;              // per axis; larger kernels go by points
constexpr int64_t kPanelBytes = 192 << 10;  // panel and accumulators share a 1 MB L2 cache
constexpr int64_t kTileRowsBytes = 256 << 10;
constexpr int64_t kMaxStripVectors = 64;

// Source rows of one residue modulo the vertical step: panel row `start + i` of a strip that
// begins at grid row y holds source row (y + i + first) * step_y + residue.
struct Phase {
  int64_t residue, first, span, start;
};

struct StripLayout {
  int phases, columns;  // live residues; live kernel columns
  Phase phase[kMaxKernel];
  int phase_of[kMaxKernel];      // ky -> its residue's phase, -1 when no tap of ky is live
  int64_t relative[kMaxKernel];  // ky -> panel rows past the phase's start
  int column_of[kMaxKernel];     // kx -> index among the live columns, or -1
  int64_t shift[kMaxKernel];     // per live column: its horizontal tap minus min_x
  int64_t min_x;                 // least horizontal tap
  int64_t shift_end;             // greatest shift
  int64_t pitch;                 // elements per row of the panel
  int64_t rows, strips;          // grid rows per strip; strips per image
  int64_t images;                // images per item; 1 when an image has several strips
  int64_t vectors;               // vectors per strip
  int64_t panel_rows, plane;     // panel rows per image; elements per (channel, column)
  int64_t line;                  // elements of the buffer that holds one padded source row
};

// Row pitch that costs least: padding wastes lanes, an unaligned pitch splits cache lines.
template <typename T>
inline int64_t best_pitch(int64_t width) {
  const int64_t unit = kStripUnit / static_cast<int64_t>(sizeof(T));
  int64_t best = 0;
  double best_cost = 0;
  for (int64_t align = unit; align <= kLanes<T>; align *= 2) {
    const int64_t pitch = ceil_div(width, align) * align;
    const double split = 1.0 - static_cast<double>(align) / kLanes<T>;
    const double cost = static_cast<double>(pitch) * (1.0 + 0.6 * split);
    if (best == 0 || cost <= best_cost) {
      best = pitch;
      best_cost = cost;
    }
  }
  return best;
}

inline bool live_column(const ConvGrid& g, int64_t kx) {
  for (int64_t ky = 0; ky < g.kernel_height; ++ky) {
    if (g.live_tap[ky * g.kernel_width + kx] != 0) return true;
  }
  return false;
}
inline bool live_row(const ConvGrid& g, int64_t ky) {
  for (int64_t kx = 0; kx < g.kernel_width; ++kx) {
    if (g.live_tap[ky * g.kernel_width + kx] != 0) return true;
  }
  return false;
}

// Live kernel columns and their shifts, live residues and what each kernel row reads.
inline bool lay_out_taps(const ConvGrid& g, StripLayout* l) {
  if (g.kernel_height > kMaxKernel || g.kernel_width > kMaxKernel) return false;
  l->phases = l->columns = 0;
  int64_t max_x = 0;
  for (int64_t kx = 0; kx < g.kernel_width; ++kx) {
    l->column_of[kx] = -1;
    if (!live_column(g, kx)) continue;
    const int64_t x = g.tap_x[kx];
    l->min_x = l->columns == 0 ? x : least(l->min_x, x);
    max_x = l->columns == 0 ? x : most(max_x, x);
    l->column_of[kx] = l->columns;
    l->shift[l->columns++] = x;
  }
  if (l->columns == 0) return false;
  for (int c = 0; c < l->columns; ++c) l->shift[c] -= l->min_x;
  l->shift_end = max_x - l->min_x;
  for (int64_t ky = 0; ky < g.kernel_height; ++ky) {
    l->phase_of[ky] = -1;
    if (!live_row(g, ky)) continue;
    const int64_t y = g.tap_y[ky * g.kernel_width], first = floor_div(y, g.step_y);
    const int64_t residue = y - first * g.step_y;
    int f = 0;
    while (f < l->phases && l->phase[f].residue != residue) ++f;
    if (f == l->phases) l->phase[l->phases++] = Phase{residue, first, 0, 0};
    Phase& phase = l->phase[f];
    const int64_t low = least(phase.first, first);
    phase.span = most(phase.first + phase.span, first) - low;
    phase.first = low;
    l->phase_of[ky] = f;
    l->relative[ky] = first;
  }
  for (int64_t ky = 0; ky < g.kernel_height; ++ky) {
    if (l->phase_of[ky] >= 0) l->relative[ky] -= l->phase[l->phase_of[ky]].first;
  }
  return true;
}

// Sizes for strips of at most `vectors` vectors. False when the panel would be too large.
template <typename T>
inline bool lay_out_rows(const ConvGrid& g, int64_t block_depth, int64_t vectors, StripLayout* l) {
  constexpr int64_t W = kLanes<T>;
  const int64_t most_rows = vectors * W / l->pitch;
  if (most_rows == 0) return false;
  l->strips = ceil_div(g.height, most_rows);
  l->rows = ceil_div(g.height, l->strips);
  l->vectors = ceil_div(l->rows * l->pitch, W);
  l->images = l->strips > 1 ? 1 : most(1, least(g.batch, vectors / l->vectors));
  // Rows that the last vector reaches past the strip are packed too (as zeros).
  const int64_t covered = ceil_div(l->vectors * W, l->pitch);
  l->panel_rows = 0;
  for (int f = 0; f < l->phases; ++f) {
    l->phase[f].start = l->panel_rows;
    l->panel_rows += covered + l->phase[f].span;
  }
  // A vector of slack takes the overhang of a plane's last row; an odd number of cache lines per
  // plane spreads the planes over all sets of the L1 cache.
  constexpr int64_t per_line = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t lines = ceil_div(l->images * l->panel_rows * l->pitch + W, per_line);
  l->plane = (lines | 1) * per_line;
  const int64_t bytes = block_depth * l->columns * l->plane * static_cast<int64_t>(sizeof(T));
  return bytes <= kPanelBytes;
}

// The layout of a call, or false where points are the better way: tiny images, whose rows would be
// mostly padding, long rows, large kernels.
template <typename T>
inline bool lay_out_strips(const ConvGrid& g, const PatternView& p, StripLayout* l) {
  constexpr int64_t W = kLanes<T>;
  if (g.kernel_height * g.kernel_width == 1 && g.step_x == 1 && g.step_y == 1) return false;
  if (!lay_out_taps(g, l)) return false;
  l->pitch = best_pitch<T>(g.width);
  const int64_t padded = ceil_div(g.height * l->pitch, W) * W;
  if (2 * g.height * g.width < padded) return false;
  const int64_t rows = p.rows / p.groups;
  int64_t vectors = kTileRowsBytes / most(1, rows * kVectorBytes);
  vectors = most(8, least(kMaxStripVectors, vectors));
  while (!lay_out_rows<T>(g, p.block_depth, vectors, l)) {
    if (vectors == 1) return false;
    vectors /= 2;
  }
  l->line = ceil_div(l->shift_end + (l->pitch + W) * g.step_x + 2 * W, W) * W;
  return true;
}

// What one item covers: `images` images from `image`, `rows` valid rows from `y`.
struct Strip {
  int64_t image, images, y, rows;
};

inline Strip strip_of(const ConvGrid& g, const StripLayout& l, int64_t item) {
  Strip s;
  s.image = item / l.strips * l.images;
  s.images = least(l.images, g.batch - s.image);
  s.y = item % l.strips * l.rows;
  s.rows = least(l.rows, g.height - s.y);
  return s;
}

inline int64_t strip_items(const ConvGrid& g, const StripLayout& l) {
  return ceil_div(g.batch, l.images) * l.strips;
}

// Tiles of an item: vectors [0, images * vectors) cut into eights, fours, twos and ones.
template <typename T>
inline int widest_tile(int64_t vectors_left) {
  int v = kVectorBytes == 64 ? 4 : 8;
  while (v > vectors_left) v /= 2;
  return v;
}

template <typename S>
class StripPacker {
 public:
  using T = Accumulator<S>;
  static constexpr int64_t W = kLanes<T>;

  // line: layout.line elements of scratch.
  StripPacker(const ConvGrid& g, const StripLayout& l, int64_t source_channels, T* line)
      : g_(g), l_(l), channels_(source_channels), line_(line) {
    for (int64_t i = 0; i < l.line; ++i) line[i] = T(0);
    low_ = most(0, l.min_x);
    count_ = most(0, least(g.source_width - low_, l.min_x + l.line - low_));
    elements_ = g.batch * source_channels * g.source_height * g.source_width;
    row_vectors_ = ceil_div(l.pitch, W);
    for (int64_t j = 0; j < W; ++j) {
      // Lanes of a row's last vector that are grid points; the others become exact zeros.
      last_[j] = (row_vectors_ - 1) * W + j < g.width ? -1 : 0;
    }
    // Straight from the source when its rows are elements of the panel's type, one step apart, and
    // padding reaches into the first and the last vector of a row only.
    direct_ = sizeof(S) == sizeof(T) && g.step_x == 1 && -l.min_x <= W;
    for (int k = 0; k < l.columns; ++k) {
      const int64_t x = l.min_x + l.shift[k];
      const int64_t edge = g.source_width - x - (row_vectors_ - 1) * W;
      direct_ = direct_ && (edge >= 0 || row_vectors_ == 1);
      for (int64_t j = 0; j < W; ++j) {
        left_[k][j] = x + j >= 0 ? -1 : 0;
        right_[k][j] = j < edge ? last_[j] : 0;
      }
      if (row_vectors_ == 1) right_[k] &= left_[k];
    }
  }

  void pack(const Strip& s, const S* source, int64_t first_channel, int64_t channels, T* panel) {
    const int64_t plane = g_.source_height * g_.source_width;
    for (int64_t c = 0; c < channels; ++c) {
      T* planes = panel + c * l_.columns * l_.plane;
      for (int64_t i = 0; i < s.images; ++i) {
        const int64_t image = ((s.image + i) * channels_ + first_channel + c) * plane;
        T* rows = planes + i * l_.panel_rows * l_.pitch;
        for (int f = 0; f < l_.phases; ++f) pack_phase(s, l_.phase[f], source, image, rows);
      }
    }
  }

 private:
  using Mask = typename VectorOf<typename SignedOf<sizeof(T)>::type>::type;

  void pack_phase(const Strip& s, const Phase& phase, const S* source, int64_t image, T* rows) {
    const int64_t covered = ceil_div(l_.vectors * W, l_.pitch);
    for (int64_t i = 0; i < covered + phase.span; ++i) {
      T* row = rows + (phase.start + i) * l_.pitch;
      const int64_t y = (s.y + i + phase.first) * g_.step_y + phase.residue;
      if (i >= s.rows + phase.span || y < 0 || y >= g_.source_height || count_ == 0) {
        for (int k = 0; k < l_.columns; ++k, row += l_.plane) {
          for (int64_t j = 0; j < row_vectors_; ++j) store(row + j * W, Vec<T>{});
        }
        continue;
      }
      const int64_t start = image + y * g_.source_width;
      if constexpr (sizeof(S) == sizeof(T)) {
        // A row's vectors may reach into its neighbours, whose values are masked, but not out of
        // the tensor.
        const int64_t reach = start + l_.min_x + l_.shift_end + row_vectors_ * W;
        if (direct_ && start + l_.min_x >= 0 && reach <= elements_) {
          const T* from = reinterpret_cast<const T*>(source) + start + l_.min_x;
          for (int k = 0; k < l_.columns; ++k, row += l_.plane) {
            masked_row(from + l_.shift[k], row, left_[k], right_[k]);
          }
          continue;
        }
      }
      copy_widened(source + start + low_, line_ + (low_ - l_.min_x), static_cast<int>(count_));
      for (int k = 0; k < l_.columns; ++k, row += l_.plane) {
        int64_t j = 0;
        for (; j + 1 < row_vectors_; ++j) store(row + j * W, points(line_ + l_.shift[k], j * W));
        store(row + j * W, masked(points(line_ + l_.shift[k], j * W), last_));
      }
    }
  }

  static Vec<T> masked(Vec<T> v, Mask m) { return (Vec<T>)((Mask)v & m); }

  // One row of the panel, in whole vectors: what they write past the pitch is overwritten by the
  // next row, or falls into the plane's slack.
  void masked_row(const T* from, T* row, Mask left, Mask right) const {
    int64_t j = 0;
    if (row_vectors_ > 1) {
      store(row, masked(load(from), left));
      for (j = 1; j + 1 < row_vectors_; ++j) store(row + j * W, load(from + j * W));
    }
    store(row + j * W, masked(load(from + j * W), right));
  }

  Vec<T> points(const T* from, int64_t j) const {
    if (g_.step_x == 1) return load(from + j);
    if (g_.step_x == 2) {
      return shuffle_pair(load(from + 2 * j), load(from + 2 * j + W), Even{},
                          std::make_integer_sequence<int, W>{});
    }
    alignas(kVectorBytes) T lanes[W];
    for (int64_t i = 0; i < W; ++i) lanes[i] = from[(j + i) * g_.step_x];
    return load(lanes);
  }
  struct Even {
    static constexpr int index(int j) { return 2 * j; }
  };

  const ConvGrid& g_;
  const StripLayout& l_;
  int64_t channels_;
  T* line_;
  int64_t low_, count_;  // first source column in the line, and how many
  int64_t elements_;     // of the source
  int64_t row_vectors_;
  bool direct_;
  Mask last_, left_[kMaxKernel], right_[kMaxKernel];
};

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
