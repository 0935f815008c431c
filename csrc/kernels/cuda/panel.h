// A weight as the CUDA-core products read it: entries in the order of a pattern, each with its
// value and its place in a panel of activations in shared memory.
#pragma once

#include "kernels/cpu/pattern.h"
#include "kernels/cuda/device.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// A block of threads is kWarps warps; a warp owns a few rows and reads all their entries.
constexpr int kPanelWarps = 16;
// Rows are dealt to the warps of a block by length, inside windows of this many rows.
constexpr int kPanelWindow = 2 * kPanelWarps;

// The kernel positions along one axis, in classes that are multiplied apart: position k is number
// k / classes of class k % classes. A forward product has one class; an input gradient one for each
// residue modulo the stride that a position can have, for which `step` is then exact. Numbers are
// cut into groups, each with a panel of its own, where a panel of all would not fit.
struct TapAxis {
  int64_t taps = 1;
  int64_t classes = 1;
  int64_t step = 1;       // source pixels between neighbouring numbers
  bool reversed = false;  // higher numbers read lower pixels
  int64_t grid_step = 1;  // source pixels between neighbouring grid points
  int64_t group = 1;      // numbers per group

  FASTPRUNE_HOST_DEVICE int64_t numbers(int64_t of_class) const {
    return (taps - of_class + classes - 1) / classes;
  }
  FASTPRUNE_HOST_DEVICE int64_t groups() const { return (numbers(0) + group - 1) / group; }
  // Numbers of one group of one class; 0 where a class ends earlier than others.
  FASTPRUNE_HOST_DEVICE int64_t in_group(int64_t of_class, int64_t g) const {
    const int64_t left = numbers(of_class) - g * group;
    return left < 0 ? 0 : left < group ? left : group;
  }
};

// Where an entry stands in its panel. Elements of one channel: [phase][row][column], where the
// phases of a stride are stored apart, so that neighbouring grid points are neighbours.
struct PanelLayout {
  int64_t depth = 1;   // channels of a panel
  int64_t panels = 1;  // of one block of the pattern
  int64_t plane = 1;   // elements of a channel
  int64_t phase_plane = 1, pitch = 1;
  int64_t phases_x = 1;
  bool swizzled = false;  // linear: see swizzle()
  TapAxis y, x;

  FASTPRUNE_HOST_DEVICE int64_t classes() const { return y.classes * x.classes; }
  FASTPRUNE_HOST_DEVICE int64_t tap_groups() const { return y.groups() * x.groups(); }
};

// Rows of a linear panel are written column by column: quads of columns are permuted so that eight
// neighbouring quads of rows fall into different banks. Bytes, to be combined by exclusive or.
FASTPRUNE_HOST_DEVICE inline int32_t swizzle(int32_t k) { return (k >> 2 & 7) << 4; }

// The prepared weight. Entries of row r in part (panel, tap group) of block b and class c:
// bounds[((c * blocks + b) * panels * tap groups + part) * rows + r] = (first entry / 4, entries).
struct PanelWeightView {
  void* entries;   // PanelEntry of the accumulator type, 16-byte aligned
  uint2* bounds;   // classes * blocks * panels * tap groups * rows
  int32_t* order;  // rows of window w, longest first, -1 behind the last: kPanelWindow values each
};

struct PanelWeightArgs {
  PatternView pattern;  // on the device, not trusted
  bool transposed;
  // Where transposed: the forward pattern, which must describe the same mask. Null: not compared.
  const int64_t* forward_row_ptr;
  const int16_t* forward_offset;
  int64_t forward_block_depth;
  DType dtype;         // of the weight
  const void* weight;  // dense, rows x cols of the forward pattern
  PanelLayout layout;
  PanelWeightView out;
  uint32_t* fault;
};

// Capacities of the arrays above.
int64_t panel_entries(const PatternView& pattern, const PanelLayout& layout);
int64_t panel_bounds(const PatternView& pattern, const PanelLayout& layout);
int64_t panel_windows(const PatternView& pattern);
inline int64_t panel_entry_bytes(DType dtype) { return dtype == DType::f64 ? 16 : 8; }

// One launch. Bad bounds and offsets are skipped and reported.
cudaError_t prepare_panel_weight(const PanelWeightArgs& args, const DeviceLimits& limits,
                                 cudaStream_t stream);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
