#include "kernels/cuda/masked_conv2d.h"

#include "kernels/cuda/panel.cuh"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// A lane reads C pixels, each at its own place.
template <typename T, int C>
struct PixelPanel {
  const char* base;
  int32_t pixel[C];  // bytes

  __device__ void load(int32_t offset, T (&x)[C]) const {
#pragma unroll
    for (int c = 0; c < C; ++c) x[c] = *reinterpret_cast<const T*>(base + (pixel[c] + offset));
  }
};

// The first grid point of a tile. Rows count from the first one of the first image.
struct TilePlace {
  int64_t image, y, x;
};
__host__ __device__ inline TilePlace place_tile(const PanelConvArgs& a, int64_t tile) {
  const int64_t across = (a.x.points + a.tile.cols - 1) / a.tile.cols;
  const int64_t row = tile / across * a.tile.rows;
  return TilePlace{row / a.y.points, row % a.y.points, tile % across * a.tile.cols};
}

// What the threads of a block share besides the rows of its warps.
template <int C>
struct Pixels {
  int64_t target[32 * C];  // element of the target's first channel, by [pixel of the lane][lane]
  int32_t place[32 * C];   // bytes into the panel; -1: no pixel
  int64_t spare_target[32 * C];
  int32_t spare_place[32 * C];
  int32_t found[32];
};

// Gives the tile's pixels to lanes: one whose place in the panel falls into bank b to lane b, so
// that a warp's loads meet no bank twice; a constant distance, a kernel position, changes nothing
// about that. What a bank has too much of goes to lanes with room. By one warp.
template <int C>
__device__ void place_pixels(const PanelConvArgs& a, const TilePlace& t, int element_bytes,
                             Pixels<C>* pixels) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int mine = 0, spare = 0;  // pixels of this lane's bank; pixels without a lane
  for (int i = 0; i < C; ++i) pixels->place[32 * i + lane] = -1;
  for (int i = 0; i < C; ++i) {
    const int p = 32 * i + lane, row = p / a.tile.cols, col = p % a.tile.cols;
    const int64_t y = t.y + row, image = t.image + y / a.y.points, x = t.x + col;
    const bool there = row < a.tile.rows && image < a.batch && x < a.x.points;
    const int place =
        static_cast<int>((row + a.tile.halo_y * (image - t.image)) * a.tile.layout.pitch + col);
    const int64_t target =
        (image * a.rows * a.target_height + a.y.first_target + y % a.y.points * a.y.target_step) *
            a.target_width +
        a.x.first_target + x * a.x.target_step;
    const int bank = place % 32;
    const unsigned same = __match_any_sync(kAll, there ? bank : 32 + lane);
    const int slot = __shfl_sync(kAll, mine, bank) + __popc(same & ((1u << lane) - 1));
    pixels->found[lane] = 0;
    __syncwarp();
    if (there && (same & ((1u << lane) - 1)) == 0) pixels->found[bank] = __popc(same);
    __syncwarp();
    mine += pixels->found[lane];
    const bool placed = there && slot < C;
    if (placed) {
      pixels->place[32 * slot + bank] = place * element_bytes;
      pixels->target[32 * slot + bank] = target;
    }
    const unsigned left = __ballot_sync(kAll, there && !placed);
    if (there && !placed) {
      const int at = spare + __popc(left & ((1u << lane) - 1));
      pixels->spare_place[at] = place * element_bytes;
      pixels->spare_target[at] = target;
    }
    spare += __popc(left);
  }
  const int used = mine < C ? mine : C, room = C - used;
  int before = room;
  for (int i = 1; i < 32; i *= 2) {
    const int other = __shfl_up_sync(kAll, before, i);
    if (lane >= i) before += other;
  }
  before -= room;
  __syncwarp();
  for (int i = 0; i < room && before + i < spare; ++i) {
    pixels->place[32 * (used + i) + lane] = pixels->spare_place[before + i];
    pixels->target[32 * (used + i) + lane] = pixels->spare_target[before + i];
  }
}

// The lowest source pixel of a tap group, at grid point 0.
__device__ int64_t lowest_pixel(const TapAxis& axis, const ConvAxisPart& part, int64_t group) {
  const int64_t first = group * axis.group;
  if (!axis.reversed) return part.first_source + first * axis.step;
  return part.first_source - (first + axis.in_group(part.of_class, group) - 1) * axis.step;
}

// For every element of a panel's channel, its element of the source; -1: padding.
__device__ void index_source(const PanelConvArgs& a, const TilePlace& t, int64_t tap_group,
                             int64_t* from) {
  const PanelLayout& l = a.tile.layout;
  const int64_t low_y = lowest_pixel(l.y, a.y, tap_group / l.x.groups());
  const int64_t low_x = lowest_pixel(l.x, a.x, tap_group % l.x.groups());
  const int64_t period = a.y.points + a.tile.halo_y;
  for (int i = static_cast<int>(threadIdx.x); i < l.plane; i += kPanelThreads) {
    const int phase = i / static_cast<int>(l.phase_plane);
    const int in_phase = i - phase * static_cast<int>(l.phase_plane);
    const int row = in_phase / static_cast<int>(l.pitch);
    const int col = in_phase - row * static_cast<int>(l.pitch);
    const int phase_y = phase / static_cast<int>(l.phases_x);
    const int phase_x = phase - phase_y * static_cast<int>(l.phases_x);
    const int64_t image = t.image + (t.y + row) / period;
    const int64_t y = (t.y + row) % period * l.y.grid_step + phase_y + low_y;
    const int64_t x = (t.x + col) * l.x.grid_step + phase_x + low_x;
    const bool there =
        image < a.batch && y >= 0 && y < a.source_height && x >= 0 && x < a.source_width;
    from[i] = there ? (image * a.groups * a.depth * a.source_height + y) * a.source_width + x : -1;
  }
}

// panel[channel][i] = source[channel][from[i]], zero where there is nothing.
template <typename S>
__device__ __forceinline__ void load_tile(const S* source, int64_t source_plane,
                                          const int64_t* from, int plane, int depth,
                                          Accumulator<S>* panel) {
  const int total = plane * depth, step = kPanelThreads / plane, rest = kPanelThreads % plane;
  int channel = static_cast<int>(threadIdx.x) / plane, i = static_cast<int>(threadIdx.x) % plane;
#pragma unroll 4
  for (int at = static_cast<int>(threadIdx.x); at < total; at += kPanelThreads) {
    const int64_t element = from[i];
    panel[at] = element < 0 ? Accumulator<S>(0) : widen(source[channel * source_plane + element]);
    channel += step;
    i += rest;
    if (i >= plane) {
      i -= plane;
      ++channel;
    }
  }
}

// Block: kPanelWarps * rows rows of one group by one tile.
template <typename S, int C, int R>
__global__ void __launch_bounds__(kPanelThreads, sizeof(S) == 8 ? 1 : 2)
    product_kernel(PanelConvArgs a, int rows, unsigned row_blocks) {
  using T = Accumulator<S>;
  struct Shared {
    WarpRows<R> rows;
    Pixels<C> pixels;
  };
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const PanelLayout& l = a.tile.layout;
  Shared& shared = *shared_memory<Shared>();
  int64_t* from = reinterpret_cast<int64_t*>(&shared + 1);
  T* panel = reinterpret_cast<T*>(from + l.plane);
  {
    const unsigned row_block = blockIdx.x % row_blocks, rest = blockIdx.x / row_blocks;
    const int64_t windows = (a.rows / a.groups + kPanelWindow - 1) / kPanelWindow;
    const int64_t group = rest % a.groups;
    const TilePlace t = place_tile(a, rest / a.groups);
    if (warp == 0) place_pixels<C>(a, t, static_cast<int>(sizeof(T)), &shared.pixels);
    if (l.tap_groups() == 1) index_source(a, t, 0, from);
    shared.rows.start(a.weight.order, group * windows + row_block * (rows / 2),
                      (group + 1) * windows, rows, rest);
  }
  PixelPanel<T, C> pixels{reinterpret_cast<const char*>(panel), {}};
#pragma unroll
  for (int c = 0; c < C; ++c) {
    // A lane without a pixel reads what another one reads: no bank more.
    const int32_t place = shared.pixels.place[32 * c + lane];
    const unsigned there = __ballot_sync(kAll, place >= 0);
    const int32_t other = __shfl_sync(kAll, place, there == 0 ? 0 : __ffs(there) - 1);
    pixels.pixel[c] = place >= 0 ? place : other >= 0 ? other : 0;
  }

  T sum[R][C] = {};
  const int tap_groups = static_cast<int>(l.tap_groups());
  const int per_block = static_cast<int>(l.panels) * tap_groups;
  const int parts = static_cast<int>(a.blocks) * per_block;
  const uint2* bounds =
      a.weight.bounds + (a.y.of_class * l.x.classes + a.x.of_class) * parts * a.rows;
  for (int part = 0; part < parts; ++part) {
    if (!shared.rows.enter(part, bounds + part * a.rows)) continue;
    const int64_t rest = shared.rows.first_column, group = rest % a.groups;
    if (tap_groups > 1) {
      index_source(a, place_tile(a, rest / a.groups), part % tap_groups, from);
      __syncthreads();
    }
    const int b = part / per_block, panel_of_block = part % per_block / tap_groups;
    const int64_t in_block = panel_of_block * l.depth, first = b * a.block_depth + in_block;
    int64_t depth = a.block_depth - in_block;
    if (depth > a.depth - first) depth = a.depth - first;
    if (depth > l.depth) depth = l.depth;
    const int64_t source_plane = a.source_height * a.source_width;
    load_tile<S>(static_cast<const S*>(a.source) + (group * a.depth + first) * source_plane,
                 source_plane, from, static_cast<int>(l.plane), static_cast<int>(depth), panel);
    __syncthreads();
    multiply_rows<R, C>(static_cast<const PanelEntry<T>*>(a.weight.entries), shared.rows, rows,
                        pixels, sum);
  }

#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (r >= rows) break;
    const int64_t row = shared.rows.row[warp][r];
    if (row < 0) continue;
    const T bias = a.bias == nullptr ? T(0) : static_cast<const T*>(a.bias)[row];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if (shared.pixels.place[32 * c + lane] < 0) continue;
      finish<S>(sum[r][c] + bias, a.target, a.residual, a.relu,
                shared.pixels.target[32 * c + lane] + row * a.target_height * a.target_width);
    }
  }
}

template <int C, int R>
constexpr int64_t shared_header() {
  return static_cast<int64_t>(sizeof(WarpRows<R>) + (sizeof(Pixels<C>) + 15) / 16 * 16);
}

template <typename S, int C, int R>
cudaError_t run_product(const PanelConvArgs& a, const DeviceLimits& limits, cudaStream_t stream) {
  const PanelLayout& l = a.tile.layout;
  const int64_t tiles = (a.x.points + a.tile.cols - 1) / a.tile.cols *
                        ((a.batch * a.y.points + a.tile.rows - 1) / a.tile.rows) * a.groups;
  const int64_t per_group = a.rows / a.groups;
  // As many rows to a warp as still give every multiprocessor two blocks: a panel serves them all.
  int rows = R;
  int64_t row_blocks = 0;
  for (;; rows -= 2) {
    row_blocks = (per_group + kPanelWarps * rows - 1) / (kPanelWarps * rows);
    const bool all_needed = per_group > kPanelWarps * (rows - 2);
    if (rows == 2 || (all_needed && tiles * row_blocks >= 2 * limits.multiprocessors)) break;
  }
  const int64_t parts = l.panels * l.tap_groups();
  if (tiles > 2147483647 / row_blocks || a.blocks > 2147483647 / parts)
    return cudaErrorInvalidValue;
  const size_t shared =
      static_cast<size_t>(shared_header<C, R>()) +
      static_cast<size_t>(l.plane) * (8 + static_cast<size_t>(l.depth) * sizeof(Accumulator<S>));
  return launch(product_kernel<S, C, R>, dim3(static_cast<unsigned>(tiles * row_blocks)),
                dim3(kPanelThreads), shared, stream, a, rows, static_cast<unsigned>(row_blocks));
}

template <typename S>
cudaError_t run_tile(const PanelConvArgs& a, const DeviceLimits& limits, cudaStream_t stream) {
  if (a.tile.columns == 128) return run_product<S, 4, 4>(a, limits, stream);
  if (a.tile.columns == 64) return run_product<S, 2, 8>(a, limits, stream);
  return run_product<S, 1, 8>(a, limits, stream);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kFar = int64_t{1} << 20;  // a halo beyond any panel

// Panel rows (columns) beyond the grid's own that the positions of one group read, and the phases
// of the stride that they fall into.
struct Halo {
  int64_t points, phases;
};
Halo halo_of(const TapAxis& axis) {
  const int64_t numbers = axis.in_group(0, 0);
  Halo h{0, 1};
  for (int64_t i = 0; i < numbers; ++i) {
    if (i * axis.step / axis.grid_step > kFar) return Halo{kFar, 1};
    h.points = i * axis.step / axis.grid_step;
    const int64_t phase = i * axis.step % axis.grid_step;
    if (phase >= h.phases) h.phases = phase + 1;
    if (h.phases > kFar) return Halo{kFar, 1};
  }
  return h;
}

// Pixels that would have to share a bank with another one of their warp's load.
int crowded(const ConvTile& tile, int64_t height, int64_t pitch) {
  int load[32] = {}, over = 0;
  for (int row = 0; row < tile.rows; ++row) {
    const int64_t first = (row + row / height * tile.halo_y) * pitch;
    for (int col = 0; col < tile.cols; ++col)
      over += ++load[(first + col) % 32] > tile.columns / 32;
  }
  return over;
}

// Cuts the grid so that few lanes and few loads are lost; false where not even a channel fits.
bool cut_grid(const PatternView& p, DType dtype, int64_t batch, int64_t height, int64_t width,
              int64_t least_height, const DeviceLimits& limits, ConvTile* tile) {
  PanelLayout& l = tile->layout;
  const Halo y = halo_of(l.y), x = halo_of(l.x);
  if (y.points >= kFar || x.points >= kFar || y.phases * x.phases > kFar) return false;
  const int64_t slots = tile->columns, all_rows = batch * height;
  const auto plane_rows = [&](int64_t rows) {
    const int64_t images = (rows + least_height - 2) / least_height + 1;
    return rows + y.points * images;
  };
  int64_t best = -1;
  const int64_t fewest = ceil_div(width, slots);
  for (int64_t pieces = fewest; pieces < fewest + 16 && pieces <= width; ++pieces) {
    const int64_t cols = ceil_div(width, pieces);
    const int64_t rows = slots / cols < all_rows ? slots / cols : all_rows;
    const int64_t plane = y.phases * x.phases * plane_rows(rows) * (cols + x.points);
    const int64_t cost = ceil_div(width, cols) * ceil_div(all_rows, rows) * (slots + plane / 4);
    if (best >= 0 && cost >= best) continue;
    best = cost;
    tile->cols = static_cast<int>(cols);
    tile->rows = static_cast<int>(rows);
  }
  tile->halo_y = static_cast<int>(y.points);
  l.pitch = tile->cols + x.points;
  int fewest_crowded = crowded(*tile, height, l.pitch);
  const int64_t least_pitch = l.pitch;
  for (int64_t pitch = least_pitch + 1; fewest_crowded > 0 && pitch < least_pitch + 8; ++pitch) {
    const int here = crowded(*tile, height, pitch);
    if (here >= fewest_crowded) continue;
    fewest_crowded = here;
    l.pitch = pitch;
  }
  l.phases_x = x.phases;
  l.phase_plane = plane_rows(tile->rows) * l.pitch;
  l.plane = y.phases * x.phases * l.phase_plane;
  // Two blocks to a multiprocessor where that leaves room for a channel: one loads while the other
  // computes.
  const int64_t element = dtype == DType::f64 ? 8 : 4;
  const int64_t header = shared_header<4, 8>() + 1024 + 8 * l.plane;
  int64_t most = (limits.shared_bytes / 2 - header) / (l.plane * element);
  if (most < 1) most = (limits.shared_bytes - header) / (l.plane * element);
  if (most < 1) return false;
  l.panels = ceil_div(p.block_depth, most);
  l.depth = ceil_div(p.block_depth, l.panels);
  return true;
}

}  // namespace

ConvTile conv_tile(const PatternView& p, TapAxis y, TapAxis x, DType dtype, int64_t batch,
                   int64_t height, int64_t width, int64_t least_height,
                   const DeviceLimits& limits) {
  ConvTile tile{};
  const int64_t points = batch * height * width;
  tile.columns = dtype == DType::f64 || (points > 32 && points <= 64) ? 64 : points > 64 ? 128 : 32;
  tile.layout.y = y;
  tile.layout.x = x;
  // A panel for all kernel positions, one for each kernel row, or, for kernels that reach beyond
  // any shared memory, one for each position.
  tile.layout.y.group = y.taps;
  tile.layout.x.group = x.taps;
  if (cut_grid(p, dtype, batch, height, width, least_height, limits, &tile)) return tile;
  tile.layout.y.group = 1;
  if (cut_grid(p, dtype, batch, height, width, least_height, limits, &tile)) return tile;
  tile.layout.x.group = 1;
  cut_grid(p, dtype, batch, height, width, least_height, limits, &tile);
  return tile;
}

cudaError_t masked_conv2d_panel(const PanelConvArgs& a, const DeviceLimits& limits,
                                cudaStream_t stream) {
  if (a.rows == 0 || a.batch == 0 || a.y.points <= 0 || a.x.points <= 0) return cudaSuccess;
  switch (a.dtype) {
    case DType::f32:
      return run_tile<float>(a, limits, stream);
    case DType::f64:
      return run_product<double, 2, 4>(a, limits, stream);
    case DType::bf16:
      return run_tile<BFloat16>(a, limits, stream);
    default:
      return run_tile<Float16>(a, limits, stream);
  }
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
