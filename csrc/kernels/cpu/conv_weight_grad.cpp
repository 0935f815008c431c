#include "kernels/cpu/conv_weight_grad.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/simd.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// Rows by channels whose sums are held in registers at once.
constexpr int kRows = 4;
#if defined(__AVX512F__)
constexpr int kChannels = 4;
#else
constexpr int kChannels = 2;
#endif

// Elements of a row of the gradient that are multiplied at a time: 4 KB, so that kRows + kChannels
// streams fit the L1 cache.
constexpr int64_t kChunkBytes = 4096;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// How one item walks: chunks of `columns` output columns by `images` of the batch.
struct Walk {
  int64_t images, columns;
  int64_t grad_stride;  // elements between packed rows; no power of two, for the cache's sets
  int64_t x_stride;     // the same for packed channels
};

// A tap's column: output column o reads phase `phase`, place o + shift of the phase's columns.
struct TapColumn {
  int64_t phase, shift;
};
TapColumn tap_column(const ConvWeightGradArgs& a, int64_t kx) {
  const int64_t q = kx * a.dilation[1] - a.padding[1];
  const int64_t shift = floor_div(q, a.stride[1]);
  return TapColumn{q - shift * a.stride[1], shift};
}

template <typename T>
Walk walk_of(const ConvWeightGradArgs& a) {
  const int64_t chunk = kChunkBytes / static_cast<int64_t>(sizeof(T));
  Walk w{};
  w.images = std::min(a.batch, chunk);
  w.columns = std::clamp<int64_t>(chunk / std::max<int64_t>(w.images, 1), 1,
                                  std::max<int64_t>(a.out_width, 1));
  const int64_t lead = kVectorBytes / static_cast<int64_t>(sizeof(T));
  w.grad_stride = ceil_div(w.columns * w.images, lead) * lead + lead;
  // Columns of one residue modulo the stride that the taps of a chunk reach.
  const int64_t reach = w.columns + (a.kernel_width - 1) * a.dilation[1] / a.stride[1] + 1;
  const int64_t columns = std::min(reach, ceil_div(a.width, a.stride[1]));
  w.x_stride = ceil_div(columns * w.images, lead) * lead + lead;
  return w;
}

// sums[o][c] += the products of n elements of kRows rows and kChannels channels, lane by lane.
template <typename T>
inline void multiply(const T* grad, int64_t grad_stride, const T* x, int64_t x_stride, int64_t n,
                     T* sums, int64_t sums_stride) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[kRows][kChannels];
#pragma GCC unroll 4
  for (int o = 0; o < kRows; ++o) {
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) acc[o][c] = load(sums + o * sums_stride + c * W);
  }
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    Vec<T> xs[kChannels];
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) xs[c] = load(x + c * x_stride + i);
#pragma GCC unroll 4
    for (int o = 0; o < kRows; ++o) {
      const Vec<T> g = load(grad + o * grad_stride + i);
#pragma GCC unroll 4
      for (int c = 0; c < kChannels; ++c) acc[o][c] += g * xs[c];
    }
  }
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    Vec<T> xs[kChannels];
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) xs[c] = load_part(x + c * x_stride + i, rest);
#pragma GCC unroll 4
    for (int o = 0; o < kRows; ++o) {
      const Vec<T> g = load_part(grad + o * grad_stride + i, rest);
#pragma GCC unroll 4
      for (int c = 0; c < kChannels; ++c) acc[o][c] += g * xs[c];
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < kRows; ++o) {
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) store(sums + o * sums_stride + c * W, acc[o][c]);
  }
}

// One item: its tile's sums, over all pixels and images in one order.
template <typename T>
class Tile {
 public:
  Tile(const ConvWeightGradArgs& args, void* scratch)
      : a_(args), w_(walk_of<T>(args)), sums_stride_(args.tile_channels * kLanes<T>) {
    sums_ = static_cast<T*>(scratch);
    grad_ = sums_ + a_.taps() * a_.tile_rows * sums_stride_;
    x_ = grad_ + a_.tile_rows * w_.grad_stride;
  }

  static int64_t bytes(const ConvWeightGradArgs& a) {
    const Walk w = walk_of<T>(a);
    return static_cast<int64_t>(sizeof(T)) *
           (a.taps() * a.tile_rows * a.tile_channels * kLanes<T> + a.tile_rows * w.grad_stride +
            a.tile_channels * w.x_stride);
  }

  // Rows [row, row + rows) of the gradient by the channels [channel, channel + channels) of x.
  void run(int64_t row, int64_t rows, int64_t channel, int64_t channels) {
    row_ = row, rows_ = rows, channel_ = channel, channels_ = channels;
    // The rows and channels that fill up the blocks stay zeros.
    std::memset(sums_, 0, static_cast<size_t>(bytes(a_)));
    for (int64_t n = 0; n < a_.batch; n += w_.images) {
      images_ = std::min(w_.images, a_.batch - n);
      for (int64_t oy = 0; oy < a_.out_height; ++oy) {
        for (int64_t ox = 0; ox < a_.out_width; ox += w_.columns) {
          chunk(n, oy, ox, std::min(ox + w_.columns, a_.out_width));
        }
      }
    }
  }

  // The sums of run(), written at weight_grad[(row, group's channel, tap)].
  void write(int64_t first_channel_of_group) const {
    const int64_t depth = a_.channels / a_.groups, taps = a_.taps();
    T* out = static_cast<T*>(a_.weight_grad);
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t o = 0; o < rows_; ++o) {
        for (int64_t c = 0; c < channels_; ++c) {
          const T* lanes = sums_ + (tap * a_.tile_rows + o) * sums_stride_ + c * kLanes<T>;
          T sum = 0;
          for (int j = 0; j < kLanes<T>; ++j) sum += lanes[j];
          out[((row_ + o) * depth + channel_ - first_channel_of_group + c) * taps + tap] = sum;
        }
      }
    }
  }

 private:
  // Output columns [begin, end) of row oy, images [n, n + images_).
  void chunk(int64_t n, int64_t oy, int64_t begin, int64_t end) {
    const T* grad = static_cast<const T*>(a_.grad);
    bool packed = false;
    for (int64_t ky = 0; ky < a_.kernel_height; ++ky) {
      const int64_t y = oy * a_.stride[0] - a_.padding[0] + ky * a_.dilation[0];
      if (y < 0 || y >= a_.height) continue;
      if (!packed) {
        for (int64_t o = 0; o < rows_; ++o) {
          copy(grad + (((row_ + o) * a_.out_height + oy) * a_.out_width + begin) * a_.batch + n,
               a_.batch, end - begin, grad_ + o * w_.grad_stride);
        }
        packed = true;
      }
      row_of_taps(n, y, ky, begin, end);
    }
  }

  void row_of_taps(int64_t n, int64_t y, int64_t ky, int64_t begin, int64_t end) {
    const T* x = static_cast<const T*>(a_.x);
    const int64_t stride = a_.stride[1];
    for (int64_t first_tap = 0; first_tap < a_.kernel_width; ++first_tap) {
      const TapColumn of = tap_column(a_, first_tap);
      const int64_t phase = of.phase;
      bool done = false;  // by an earlier tap of the same phase
      for (int64_t kx = 0; kx < first_tap; ++kx) done |= tap_column(a_, kx).phase == phase;
      if (done) continue;
      // Places of the phase that this chunk reads.
      int64_t low = begin + of.shift, high = end + of.shift;
      for (int64_t kx = first_tap + 1; kx < a_.kernel_width; ++kx) {
        const TapColumn t = tap_column(a_, kx);
        if (t.phase != phase) continue;
        low = std::min(low, begin + t.shift);
        high = std::max(high, end + t.shift);
      }
      low = std::max<int64_t>(low, 0);
      high = std::min(high, ceil_div(a_.width - phase, stride));
      if (low >= high) continue;
      for (int64_t c = 0; c < channels_; ++c) {
        copy(
            x + (((channel_ + c) * a_.height + y) * a_.width + low * stride + phase) * a_.batch + n,
            stride * a_.batch, high - low, x_ + c * w_.x_stride);
      }
      for (int64_t kx = first_tap; kx < a_.kernel_width; ++kx) {
        const TapColumn t = tap_column(a_, kx);
        if (t.phase != phase) continue;
        // Columns whose tap lies inside the image: a gradient meets no padding.
        const int64_t first = std::max(begin, low - t.shift), last = std::min(end, high - t.shift);
        if (first < last) {
          products(ky * a_.kernel_width + kx, (first - begin) * images_,
                   (first + t.shift - low) * images_, (last - first) * images_);
        }
      }
    }
  }

  void products(int64_t tap, int64_t grad_at, int64_t x_at, int64_t n) {
    T* sums = sums_ + tap * a_.tile_rows * sums_stride_;
    for (int64_t o = 0; o < rows_; o += kRows) {
      for (int64_t c = 0; c < channels_; c += kChannels) {
        multiply(grad_ + o * w_.grad_stride + grad_at, w_.grad_stride, x_ + c * w_.x_stride + x_at,
                 w_.x_stride, n, sums + o * sums_stride_ + c * kLanes<T>, sums_stride_);
      }
    }
  }

  // Columns of images_ elements, `stride` apart, side by side.
  void copy(const T* from, int64_t stride, int64_t columns, T* to) const {
    if (stride == images_) {
      std::memcpy(to, from, static_cast<size_t>(columns * images_) * sizeof(T));
      return;
    }
    for (int64_t i = 0; i < columns; ++i) {
      std::memcpy(to + i * images_, from + i * stride, static_cast<size_t>(images_) * sizeof(T));
    }
  }

  const ConvWeightGradArgs& a_;
  Walk w_;
  int64_t sums_stride_;
  T *sums_, *grad_, *x_;
  int64_t row_ = 0, rows_ = 0, channel_ = 0, channels_ = 0, images_ = 0;
};

struct Items {
  int64_t row_tiles, channel_tiles;
};
Items items_of(const ConvWeightGradArgs& a) {
  return Items{ceil_div(a.rows / a.groups, a.tile_rows),
               ceil_div(a.channels / a.groups, a.tile_channels)};
}

template <typename T>
void run(const ConvWeightGradArgs& a, int64_t begin, int64_t end, void* scratch) {
  const Items items = items_of(a);
  const int64_t group_rows = a.rows / a.groups, group_channels = a.channels / a.groups;
  Tile<T> tile(a, scratch);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t group = i / (items.row_tiles * items.channel_tiles);
    const int64_t o = i / items.channel_tiles % items.row_tiles * a.tile_rows;
    const int64_t c = i % items.channel_tiles * a.tile_channels;
    tile.run(group * group_rows + o, std::min(a.tile_rows, group_rows - o),
             group * group_channels + c, std::min(a.tile_channels, group_channels - c));
    tile.write(group * group_channels);
  }
}

}  // namespace

int64_t conv_weight_grad_items(const ConvWeightGradArgs& args) {
  const Items items = items_of(args);
  return args.groups * items.row_tiles * items.channel_tiles;
}

int64_t conv_weight_grad_scratch(const ConvWeightGradArgs& args) {
  return args.dtype == DType::f64 ? Tile<double>::bytes(args) : Tile<float>::bytes(args);
}

void conv_weight_grad(const ConvWeightGradArgs& args, int64_t begin, int64_t end, void* scratch) {
  if (args.dtype == DType::f64) {
    run<double>(args, begin, end, scratch);
  } else {
    run<float>(args, begin, end, scratch);
  }
}

}  // namespace fastprune::FASTPRUNE_ISA
