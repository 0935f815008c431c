// Packing of convolution panels: the activations that each tap sees from a tile of grid points.
#pragma once

#include <cstring>

#include "kernels/cpu/masked_conv2d.h"
#include "kernels/cpu/panel.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// Points of a tile that are consecutive in one row of one image.
struct Run {
  int64_t image, y, x;
  int at, length;  // place in the tile
};

// A tile of at most 64 points, cut into runs.
struct PointTile {
  int tile;   // padded width
  int count;  // points
  int runs;
  Run run[64];
};

template <typename T>
inline void cut_tile(const ConvGrid& g, int64_t first, PointTile* t) {
  const int64_t left = g.points() - first;
  t->count = static_cast<int>(left < kTile<T> ? left : kTile<T>);
  t->tile = tile_for<T>(t->count);
  t->runs = 0;
  int64_t x = first % g.width, y = first / g.width % g.height, image = first / g.width / g.height;
  for (int at = 0; at < t->count;) {
    const int64_t room = g.width - x;
    const int length = static_cast<int>(room < t->count - at ? room : t->count - at);
    t->run[t->runs++] = Run{image, y, x, at, length};
    at += length;
    x = 0;
    if (++y == g.height) {
      y = 0;
      ++image;
    }
  }
}

// Copies n elements by vectors of `Bytes`, the last one overlapping, rather than a scalar tail.
template <typename T, int Bytes>
inline void copy_overlapping(const T* from, T* to, int n) {
  typedef T Part __attribute__((vector_size(Bytes), aligned(1), may_alias));
  constexpr int lanes = Bytes / static_cast<int>(sizeof(T));
  int j = 0;
  for (; j + lanes <= n; j += lanes) {
    *reinterpret_cast<Part*>(to + j) = *reinterpret_cast<const Part*>(from + j);
  }
  if (j < n) {
    *reinterpret_cast<Part*>(to + n - lanes) = *reinterpret_cast<const Part*>(from + n - lanes);
  }
}

template <typename S>
inline void copy_widened(const S* from, Accumulator<S>* to, int n) {
  using T = Accumulator<S>;
  if constexpr (sizeof(S) == sizeof(T)) {
    if (n >= kLanes<T>) return copy_overlapping<T, kVectorBytes>(from, to, n);
    if (n * static_cast<int>(sizeof(T)) >= 16) return copy_overlapping<T, 16>(from, to, n);
  }
  for (int j = 0; j < n; ++j) to[j] = widen(from[j]);
}

// The way back: n narrowed elements, `step` apart in the target.
template <typename S>
inline void copy_narrowed(const Accumulator<S>* from, S* to, int n, int64_t step) {
  using T = Accumulator<S>;
  if (step != 1) {
    for (int j = 0; j < n; ++j) to[j * step] = narrow<S>(from[j]);
  } else if constexpr (sizeof(S) == sizeof(T)) {
    copy_widened<T>(from, reinterpret_cast<T*>(to), n);
  } else {
    for (int j = 0; j < n; ++j) to[j] = narrow<S>(from[j]);
  }
}

// One tap of one channel: its view of every run of the tile.
struct TapRun {
  int64_t source;  // of the run's point `low`, relative to channel 0 of image 0
  int low, high;   // points of the run that see the image; the others see padding
};

// Fills panel rows (channel, tap) for `channels` channels from `first_channel` of the source.
template <typename S>
class PanelPacker {
 public:
  using T = Accumulator<S>;

  PanelPacker(const ConvGrid& grid, const PointTile& tile, int64_t source_channels, int64_t taps)
      : grid_(grid), tile_(tile), channels_(source_channels), taps_(taps) {}

  // Whether scattered() may be used: short rows, and offsets within a tile that fit 32 bits.
  bool prefers_scattered() const {
    const int64_t plane = grid_.source_height * grid_.source_width;
    const int64_t images = tile_.run[tile_.runs - 1].image - tile_.run[0].image + 1;
    return tile_.runs > 4 && taps_ <= kMaxTaps && images * channels_ * plane < (int64_t{1} << 31);
  }

  // Before scattered(): where each point of the tile reads, per tap.
  void index_points() {
    const int64_t plane = grid_.source_height * grid_.source_width;
    const int64_t first_image = tile_.run[0].image;
    for (int64_t t = 0; t < taps_; ++t) {
      if (grid_.live_tap[t] == 0) continue;
      int32_t* index = index_[t];
      uint8_t* seen = seen_[t];
      std::memset(index, 0, sizeof(index_[t]));
      std::memset(seen, 0, sizeof(seen_[t]));
      for (int s = 0; s < tile_.runs; ++s) {
        const Run& run = tile_.run[s];
        const int64_t y = run.y * grid_.step_y + grid_.tap_y[t];
        if (y < 0 || y >= grid_.source_height) continue;
        const int64_t base = (run.image - first_image) * channels_ * plane + y * grid_.source_width;
        for (int j = 0; j < run.length; ++j) {
          const int64_t x = (run.x + j) * grid_.step_x + grid_.tap_x[t];
          if (x < 0 || x >= grid_.source_width) continue;
          index[run.at + j] = static_cast<int32_t>(base + x);
          seen[run.at + j] = 1;
        }
      }
    }
  }

  // Rows of few points each (4x4, 7x7 maps): one indexed load per point.
  void scattered(const S* source, int64_t first_channel, int64_t channels, T* panel) const {
    const int64_t plane = grid_.source_height * grid_.source_width;
    const S* base = source + (tile_.run[0].image * channels_ + first_channel) * plane;
    for (int64_t c = 0; c < channels; ++c, base += plane) {
      for (int64_t t = 0; t < taps_; ++t, panel += tile_.tile) {
        if (grid_.live_tap[t] == 0) continue;
        const int32_t* index = index_[t];
        const uint8_t* seen = seen_[t];
        for (int j = 0; j < tile_.tile; ++j) {
          // An unseen point reads index 0 of the plane, which exists, and is then replaced: the
          // padding is an exact zero whatever that pixel holds.
          const T value = widen(base[index[j]]);
          panel[j] = seen[j] != 0 ? value : T(0);
        }
      }
    }
  }

  // Rows of many points: one copy per tap and run.
  void by_runs(const S* source, int64_t first_channel, int64_t channels, T* panel) const {
    const int64_t plane = grid_.source_height * grid_.source_width;
    for (int64_t t = 0; t < taps_; ++t) {
      if (grid_.live_tap[t] == 0) continue;
      for (int s = 0; s < tile_.runs; ++s) {
        const Run& run = tile_.run[s];
        const TapRun view = look(run, t);
        const S* from = source + view.source + first_channel * plane;
        T* to = panel + t * tile_.tile + run.at;
        for (int64_t c = 0; c < channels; ++c, from += plane, to += taps_ * tile_.tile) {
          for (int j = 0; j < view.low; ++j) to[j] = T(0);
          if (grid_.step_x == 1) {
            copy_widened(from, to + view.low, view.high - view.low);
          } else {
            for (int j = view.low; j < view.high; ++j) {
              to[j] = widen(from[(j - view.low) * grid_.step_x]);
            }
          }
          for (int j = view.high; j < run.length; ++j) to[j] = T(0);
        }
      }
      if (tile_.count == tile_.tile) continue;
      for (int64_t c = 0; c < channels; ++c) {
        T* to = panel + (c * taps_ + t) * tile_.tile;
        for (int j = tile_.count; j < tile_.tile; ++j) to[j] = T(0);
      }
    }
  }

  static constexpr int64_t kMaxTaps = 49;  // 7 x 7; larger kernels go by runs

 private:
  TapRun look(const Run& run, int64_t t) const {
    TapRun view{0, 0, 0};
    const int64_t y = run.y * grid_.step_y + grid_.tap_y[t];
    const int64_t x = run.x * grid_.step_x + grid_.tap_x[t];
    if (y < 0 || y >= grid_.source_height) return view;
    int64_t low = x < 0 ? (-x + grid_.step_x - 1) / grid_.step_x : 0;
    int64_t high =
        x >= grid_.source_width ? 0 : (grid_.source_width - x + grid_.step_x - 1) / grid_.step_x;
    if (low > run.length) low = run.length;
    if (high > run.length) high = run.length;
    if (low >= high) return view;
    view.low = static_cast<int>(low);
    view.high = static_cast<int>(high);
    view.source = (run.image * channels_ * grid_.source_height + y) * grid_.source_width + x +
                  low * grid_.step_x;
    return view;
  }

  const ConvGrid& grid_;
  const PointTile& tile_;
  int64_t channels_, taps_;
  int32_t index_[kMaxTaps][64];
  uint8_t seen_[kMaxTaps][64];
};

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
