#include "kernels/cuda/masked_linear.h"

#include "kernels/cuda/panel.cuh"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr int kStagePitch = kPanelWindow + 1;  // odd: the lanes of a warp write to many banks

// A row of the panel holds the tile's columns; a lane reads C neighbours at once.
template <typename T, int C>
struct ColumnPanel {
  const char* base;
  int32_t lane_bytes;

  __device__ void load(int32_t offset, T (&x)[C]) const {
    struct alignas(sizeof(T) * C) Columns {
      T value[C];
    };
    const Columns here = *reinterpret_cast<const Columns*>(base + (offset ^ lane_bytes));
#pragma unroll
    for (int c = 0; c < C; ++c) x[c] = here.value[c];
  }
};

template <typename S>
struct alignas(4 * sizeof(S)) Quad {
  S value[4];
};

// panel[k][n] = x[first_n + n][first_k + k], zero past the batch. Eight lanes read 32 neighbouring
// elements of a row of x, four rows at once; what they write falls into 32 banks (swizzle()).
template <typename S, int C>
__device__ __forceinline__ void load_panel(const PanelLinearArgs& a, int64_t first_n,
                                           int64_t first_k, int depth, char* panel) {
  using T = Accumulator<S>;
  const S* x = static_cast<const S*>(a.x);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  constexpr int row_bytes = 32 * C * static_cast<int>(sizeof(T)), column_blocks = 8 * C;
  const bool wide =
      a.depth % 4 == 0 && first_k % 4 == 0 && reinterpret_cast<uintptr_t>(x) % sizeof(Quad<S>) == 0;
  const int units = column_blocks * ((depth + 31) / 32);
#pragma unroll 2
  for (int u = warp; u < units; u += kPanelWarps) {
    const int k = u / column_blocks * 32 + lane % 8 * 4;
    const int n = u % column_blocks * 4 + lane / 8;
    const bool there = first_n + n < a.batch;
    const int left = depth - k;
    const S* from = x + (first_n + n) * a.depth + first_k + k;
    T value[4] = {};
    if (wide && there && left >= 4) {
      const Quad<S> q = *reinterpret_cast<const Quad<S>*>(from);
#pragma unroll
      for (int i = 0; i < 4; ++i) value[i] = widen(q.value[i]);
    } else if (there) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < left) value[i] = widen(from[i]);
      }
    }
    char* to = panel + k * row_bytes + ((n * static_cast<int>(sizeof(T))) ^ swizzle(k));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < left) *reinterpret_cast<T*>(to + i * row_bytes) = value[i];
    }
  }
}

// Block: kPanelWarps * rows rows of the pattern by 32 * C batch entries.
template <typename S, int C, int R>
__global__ void __launch_bounds__(kPanelThreads, sizeof(S) == 8 ? 1 : 2)
    product_kernel(PanelLinearArgs a, int rows, unsigned row_blocks) {
  using T = Accumulator<S>;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  char* memory = shared_memory<char>();
  WarpRows<R>& mine = *reinterpret_cast<WarpRows<R>*>(memory);
  char* panel = memory + sizeof(WarpRows<R>);
  const ColumnPanel<T, C> columns{panel, lane * static_cast<int>(C * sizeof(T))};
  const PanelEntry<T>* entries = static_cast<const PanelEntry<T>*>(a.weight.entries);
  mine.start(a.weight.order, blockIdx.x % row_blocks * (rows / 2),
             (a.rows + kPanelWindow - 1) / kPanelWindow, rows,
             static_cast<int64_t>(blockIdx.x / row_blocks) * (32 * C));

  T sum[R][C] = {};
  const int panels = static_cast<int>(a.tile.layout.panels);
  const int parts = static_cast<int>(a.blocks) * panels;
  for (int part = 0; part < parts; ++part) {
    if (!mine.enter(part, a.weight.bounds + part * a.rows)) continue;
    const int b = part / panels;
    const int64_t in_block = (part - b * panels) * a.tile.layout.depth;
    const int64_t first_k = b * a.block_depth + in_block;
    int64_t depth = a.block_depth - in_block;
    if (depth > a.depth - first_k) depth = a.depth - first_k;
    if (depth > a.tile.layout.depth) depth = a.tile.layout.depth;
    load_panel<S, C>(a, mine.first_column, first_k, static_cast<int>(depth), panel);
    __syncthreads();
    multiply_rows<R, C>(entries, mine, rows, columns, sum);
  }

  // Window by window through shared memory, so that a row of y is written in runs.
  const int64_t first_n = mine.first_column;
  T* stage = reinterpret_cast<T*>(panel);
#pragma unroll
  for (int w = 0; w < R / 2; ++w) {
    if (2 * w >= rows) break;
    const int64_t first_row = (mine.first_window + w) * kPanelWindow;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t row = mine.row[warp][2 * w + i];
      if (row < 0) continue;
      T* to = stage + lane * C * kStagePitch + (row - first_row);
#pragma unroll
      for (int c = 0; c < C; ++c) to[c * kStagePitch] = sum[2 * w + i][c];
    }
    __syncthreads();
    const int64_t r = first_row + lane;
    if (r >= a.rows) continue;
    const T bias = a.bias == nullptr ? T(0) : static_cast<const T*>(a.bias)[r];
    for (int n = warp; n < 32 * C && first_n + n < a.batch; n += kPanelWarps) {
      finish<S>(stage[n * kStagePitch + lane] + bias, a.y, a.residual, a.relu,
                (first_n + n) * a.rows + r);
    }
  }
}

template <typename S, int C, int R>
cudaError_t run_product(const PanelLinearArgs& a, const DeviceLimits& limits, cudaStream_t stream) {
  using T = Accumulator<S>;
  const int64_t tiles = (a.batch + 32 * C - 1) / (32 * C);
  // As many rows to a warp as still give every multiprocessor two blocks: a panel serves them all.
  int rows = R;
  int64_t row_blocks = 0;
  for (;; rows -= 2) {
    row_blocks = (a.rows + kPanelWarps * rows - 1) / (kPanelWarps * rows);
    if (rows == 2 || tiles * row_blocks >= 2 * limits.multiprocessors) break;
  }
  if (tiles > 2147483647 / row_blocks || a.blocks > 2147483647 / a.tile.layout.panels)
    return cudaErrorInvalidValue;
  const size_t panel = static_cast<size_t>(a.tile.layout.depth * a.tile.layout.plane) * sizeof(T);
  const size_t stage = size_t{32} * C * kStagePitch * sizeof(T);
  return launch(product_kernel<S, C, R>, dim3(static_cast<unsigned>(tiles * row_blocks)),
                dim3(kPanelThreads), sizeof(WarpRows<R>) + (panel > stage ? panel : stage), stream,
                a, rows, static_cast<unsigned>(row_blocks));
}

template <typename S>
cudaError_t run_tile(const PanelLinearArgs& a, const DeviceLimits& limits, cudaStream_t stream) {
  if (a.tile.columns == 128) return run_product<S, 4, 6>(a, limits, stream);
  if (a.tile.columns == 64) return run_product<S, 2, 8>(a, limits, stream);
  return run_product<S, 1, 8>(a, limits, stream);
}

}  // namespace

LinearTile linear_tile(const PatternView& p, DType dtype, int64_t batch,
                       const DeviceLimits& limits) {
  LinearTile tile{};
  tile.columns = dtype == DType::f64 || (batch > 32 && batch <= 64) ? 64 : batch > 64 ? 128 : 32;
  const int64_t row_bytes = tile.columns * (dtype == DType::f64 ? 8 : 4);
  // Two blocks to a multiprocessor, each with a kilobyte that the system takes: one loads while the
  // other computes.
  const int64_t most = (limits.shared_bytes / 2 - 3072) / row_bytes / 4 * 4;
  tile.layout.panels = (p.block_depth + most - 1) / most;
  tile.layout.depth = ((p.block_depth + tile.layout.panels - 1) / tile.layout.panels + 3) / 4 * 4;
  tile.layout.plane = tile.columns;
  tile.layout.swizzled = true;
  return tile;
}

cudaError_t masked_linear_panel(const PanelLinearArgs& a, const DeviceLimits& limits,
                                cudaStream_t stream) {
  if (a.rows == 0 || a.batch == 0) return cudaSuccess;
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
