#include "kernels/cuda/panel.cuh"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr int kThreads = 256;

// The class and tap group that a kernel position falls into, and its distance from the group's
// lowest pixel.
struct TapPlace {
  int64_t of_class, group, shift, phase;
};
__device__ TapPlace place_of(const TapAxis& axis, int64_t k) {
  TapPlace at;
  at.of_class = k % axis.classes;
  const int64_t number = k / axis.classes;
  at.group = number / axis.group;
  const int64_t local = number - at.group * axis.group;
  const int64_t rank = axis.reversed ? axis.in_group(at.of_class, at.group) - 1 - local : local;
  at.shift = rank * axis.step / axis.grid_step;
  at.phase = rank * axis.step % axis.grid_step;
  return at;
}

struct Place {
  int64_t part;    // (class, panel, tap group); -1: none
  int64_t offset;  // elements
};

__device__ Place place_entry(const PanelWeightArgs& a, int64_t channel, int64_t tap) {
  const PanelLayout& l = a.layout;
  const int64_t panel = channel / l.depth, in_panel = channel - panel * l.depth;
  if (a.pattern.taps == 1) return Place{panel, in_panel * l.plane};
  const int64_t ky = tap / l.x.taps;
  const TapPlace y = place_of(l.y, ky), x = place_of(l.x, tap - ky * l.x.taps);
  const int64_t of_class = y.of_class * l.x.classes + x.of_class;
  const int64_t group = y.group * l.x.groups() + x.group;
  return Place{(of_class * l.panels + panel) * l.tap_groups() + group,
               in_panel * l.plane + (y.phase * l.phases_x + x.phase) * l.phase_plane +
                   y.shift * l.pitch + x.shift};
}

// Whether the forward pattern holds the entry at `offset` of row `row` in block `block`.
__device__ bool forward_holds(const PanelWeightArgs& a, int64_t block, int64_t row,
                              int64_t offset) {
  const int64_t at = block * (a.pattern.groups * a.pattern.depth) + row;
  int64_t low = a.forward_row_ptr[at], end = a.forward_row_ptr[at + 1];
  if (low < 0 || end > a.pattern.nnz) return false;
  while (low < end) {
    const int64_t middle = low + (end - low) / 2;
    const int64_t found = a.forward_offset[middle];
    if (found == offset) return true;
    if (found < offset) {
      low = middle + 1;
    } else {
      end = middle;
    }
  }
  return false;
}

// One row's entries of one block, part after part, by one warp.
template <typename T>
__device__ void place_segment(const PanelWeightArgs& a, int64_t segment, int64_t segments) {
  const PatternView& p = a.pattern;
  const PanelLayout& l = a.layout;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t b = segment / p.rows, row = segment - b * p.rows;
  const int64_t per_group = p.rows / p.groups, group = row / per_group;
  const int64_t channels = p.depth_of(b), in_block = l.panels * l.tap_groups();
  const int64_t parts = l.classes() * in_block;
  int64_t begin = p.row_ptr[segment], end = p.row_ptr[segment + 1];
  if (begin < 0 || end < begin || end > p.nnz || end - begin > p.block_cols() ||
      (segment == 0 && begin != 0) || (segment == segments - 1 && end != p.nnz)) {
    if (lane == 0) report(a.fault, kBadRowPtr);
    begin = end = 0;
  }
  // Every part starts at a multiple of four; three places of room each are enough for that.
  int64_t start = (begin + 3 * parts * segment) / 4 * 4;
  for (int64_t part = 0; part < parts; ++part) {
    int written = 0;
    for (int64_t first = begin; first < end; first += 32) {
      const int64_t e = first + lane;
      int64_t offset = e < end ? p.offset[e] : -1;
      if (e < end && (offset < 0 || offset >= channels * p.taps)) {
        report(a.fault, kBadOffset);
        offset = -1;
      }
      const int64_t channel = offset / p.taps, tap = offset - channel * p.taps;
      Place place{-1, 0};
      if (offset >= 0) place = place_entry(a, channel, tap);
      const bool mine = place.part == part;
      int64_t at = row * p.cols() + b * p.block_cols() + offset;
      if (mine && a.transposed) {
        const int64_t out = group * p.depth + b * p.block_depth + channel;
        const int64_t in = row - group * per_group;
        at = (out * per_group + in) * p.taps + tap;
        if (a.forward_row_ptr != nullptr) {
          const int64_t block = in / a.forward_block_depth;
          const int64_t there = (in - block * a.forward_block_depth) * p.taps + tap;
          const bool rising = e == begin || p.offset[e - 1] < offset;
          if (!rising || !forward_holds(a, block, out, there)) report(a.fault, kBadMatch);
        }
      }
      const unsigned mask = __ballot_sync(0xffffffffu, mine);
      if (mine) {
        const int64_t to = start + written + __popc(mask & ((1u << lane) - 1));
        int64_t bytes = place.offset * static_cast<int64_t>(sizeof(T));
        if (l.swizzled) bytes ^= swizzle(static_cast<int32_t>(channel % l.depth));
        store_entry(static_cast<PanelEntry<T>*>(a.out.entries) + to,
                    load_element<T>(a.dtype, a.weight, at), static_cast<int32_t>(bytes));
      }
      written += __popc(mask);
    }
    if (lane == 0) {
      const int64_t of_class = part / in_block, in = part - of_class * in_block;
      a.out.bounds[((of_class * p.blocks() + b) * in_block + in) * p.rows + row] =
          make_uint2(static_cast<unsigned>(start / 4), static_cast<unsigned>(written));
    }
    start += (written + 3) / 4 * 4;
  }
}

// The rows of a window by falling length, earlier rows first among equals, by one warp.
__device__ void order_window(const PanelWeightArgs& a, int64_t window) {
  const PatternView& p = a.pattern;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t per_group = p.rows / p.groups;
  const int64_t windows = (per_group + kPanelWindow - 1) / kPanelWindow;
  const int64_t group = window / windows, first = (window - group * windows) * kPanelWindow;
  const int rows = static_cast<int>(per_group - first < 32 ? per_group - first : 32);
  const int64_t row = group * per_group + first + lane;
  unsigned length = 0;
  for (int64_t b = 0; lane < rows && b < p.blocks(); ++b) {
    const int64_t* bounds = p.row_ptr + b * p.rows + row;
    const int64_t entries = bounds[1] - bounds[0];
    length += static_cast<unsigned>(entries < 0 || entries > p.block_cols() ? 0 : entries);
  }
  int rank = 0;
  for (int i = 0; i < rows; ++i) {
    const unsigned other = __shfl_sync(0xffffffffu, length, i);
    rank += other > length || (other == length && i < lane);
  }
  int32_t* order = a.out.order + window * kPanelWindow;
  if (lane < rows) {
    order[rank] = static_cast<int32_t>(row);
  } else {
    order[lane] = -1;
  }
}

static_assert(kPanelWindow == 32, "a lane for each row of a window");

template <typename T>
__global__ void prepare_kernel(PanelWeightArgs a) {
  const int64_t segments = a.pattern.blocks() * a.pattern.rows;
  const int64_t per_group = a.pattern.rows / a.pattern.groups;
  const int64_t items =
      segments + a.pattern.groups * ((per_group + kPanelWindow - 1) / kPanelWindow);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; i < items;
       i += warps) {
    if (i < segments) {
      place_segment<T>(a, i, segments);
    } else {
      order_window(a, i - segments);
    }
  }
}

}  // namespace

int64_t panel_bounds(const PatternView& p, const PanelLayout& l) {
  return l.classes() * p.blocks() * l.panels * l.tap_groups() * p.rows;
}

int64_t panel_entries(const PatternView& p, const PanelLayout& l) {
  return p.nnz + 3 * panel_bounds(p, l) + 4;
}

int64_t panel_windows(const PatternView& p) {
  return p.groups * ((p.rows / p.groups + kPanelWindow - 1) / kPanelWindow);
}

cudaError_t prepare_panel_weight(const PanelWeightArgs& a, const DeviceLimits& limits,
                                 cudaStream_t stream) {
  const int64_t items = a.pattern.blocks() * a.pattern.rows + panel_windows(a.pattern);
  if (items == 0) return cudaSuccess;
  const int64_t wanted = (items + kThreads / 32 - 1) / (kThreads / 32);
  const int64_t most = int64_t{32} * limits.multiprocessors;
  const dim3 grid(static_cast<unsigned>(wanted < most ? wanted : most));
  if (a.dtype == DType::f64) {
    return launch(prepare_kernel<double>, grid, dim3(kThreads), 0, stream, a);
  }
  return launch(prepare_kernel<float>, grid, dim3(kThreads), 0, stream, a);
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
