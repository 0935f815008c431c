// One sample to a block, its matrix in registers.
#include "kernels/cuda/mon_products.cuh"
#include "kernels/cuda/mon_run.cuh"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr int kResidentFloats = 128, kResidentDoubles = 96;

// Columns are padded to 16 times this.
FASTPRUNE_HOST_DEVICE constexpr int resident_quads(int64_t n) {
  return n <= 64 ? 4 : n <= 96 ? 6 : 8;
}

// A matrix in registers: four lanes to a row, four columns of every 16 to a lane.
template <typename T, int kQuads>
struct Resident {
  T w[kQuads][4];

  __device__ __forceinline__ void load(const void* matrix, int n, int row, int part) {
    const T* from = static_cast<const T*>(matrix) + static_cast<int64_t>(row) * n;
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = 16 * j + 4 * part + i;
        w[j][i] = row < n && k < n ? from[k] : T(0);
      }
    }
  }
  // The row's product, in all its lanes. x: zeros behind its end.
  __device__ __forceinline__ T times(const T* x, int part) const {
    const auto* quads = reinterpret_cast<const Lanes<T, 4>*>(x) + part;
    T sum[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const Lanes<T, 4> v = quads[4 * j];
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i & 1] += w[j][i] * v.at[i];
    }
    T all = sum[0] + sum[1];
    all += __shfl_xor_sync(kAllLanes, all, 1);
    return all + __shfl_xor_sync(kAllLanes, all, 2);
  }
};

FASTPRUNE_HOST_DEVICE inline int resident_rows(int64_t n) {
  return static_cast<int>((n + 7) / 8 * 8);
}

// One sample to a block; z and u are in registers, in all lanes of their row.
template <typename T, int kQuads>
__global__ void __launch_bounds__(64 * kQuads, sizeof(T) == 4 && kQuads < 8 ? 2 : 1)
    resident_kernel(const __grid_constant__ MonRun run) {
  __shared__ double residuals[kMostSteps];
  __shared__ unsigned place;
  int steps, checkpoint;
  if (!begin(run, &steps, &checkpoint)) return;
  const MonSplittingArgs& a = run.a;
  const int n = static_cast<int>(a.n), rows = resident_rows(n), threads = 4 * rows;
  const int me = static_cast<int>(threadIdx.x), row = me / 4, part = me & 3;
  const int64_t sample = blockIdx.x, at = sample * n + row;
  const bool live = row < n;

  constexpr int kWidth = 16 * kQuads;
  T* x = shared_memory<T>();    // two of them in turns
  T* history = x + 2 * kWidth;  // [step][change, z][row]
  for (int i = me; i < 2 * kWidth; i += threads) x[i] = 0;
  Resident<T, kQuads> matrix;
  matrix.load(a.rule.resolvent ? a.resolvent : a.matrix, n, row, part);
  const T b = live ? static_cast<const T*>(a.bias)[at] : T(0);
  const T slope = live && a.rule.adjoint ? static_cast<const T*>(a.slope)[at] : T(0);
  const T scale = step_scale(slope, static_cast<T>(a.rule.alpha));
  T z = 0, u = 0;
  if (checkpoint >= 0 && live) {
    z = state<T>(run, checkpoint, false, sample)[row];
    u = state<T>(run, checkpoint, true, sample)[row];
  }
  __syncthreads();
  if (live && part == 0) x[row] = product_input(a.rule, z, u, b);
  __syncthreads();

  for (int i = 0; i < steps; ++i) {
    const T s = matrix.times(x + (i & 1) * kWidth, part);
    const T before = z;
    advance(a.rule, s, b, scale, z, u);
    if (live && part == 0) x[(i + 1 & 1) * kWidth + row] = product_input(a.rule, z, u, b);
    const int slot = run.mode == kChunk ? i : i & 1;
    if (run.mode != kFinish && part < 2) {
      history[(2 * slot + part) * rows + row] = !live ? T(0) : part == 0 ? z - before : z;
    }
    __syncthreads();
    if (run.mode != kSamples) continue;
    // Every warp finds the same.
    double change = 0, norm = 0;
    for (int r = me & 31; r < rows; r += 32) {
      const double d = history[2 * slot * rows + r], v = history[(2 * slot + 1) * rows + r];
      change += d * d;
      norm += v * v;
    }
    const double now = relative_residual(sum_over_warp<1>(change), sum_over_warp<1>(norm));
    if (i + 1 < steps && goes_on(now, a.rule.tol)) continue;
    if (me == 0) {
      a.iterations[sample] = i + 1;
      a.residual[sample] = now;
    }
    break;
  }

  if (run.mode == kChunk) {
    for (int i = me / 32; i < steps; i += threads / 32) {
      double change = 0, norm = 0;
      for (int r = me & 31; r < rows; r += 32) {
        const double d = history[2 * i * rows + r], v = history[(2 * i + 1) * rows + r];
        change += d * d;
        norm += v * v;
      }
      change = sum_over_warp<1>(change);
      norm = sum_over_warp<1>(norm);
      if ((me & 31) != 0) continue;
      double* log = run.log + (static_cast<int64_t>(i) * gridDim.x + blockIdx.x) * 2;
      log[0] = change;
      log[1] = norm;
    }
    if (live && part < 2) {
      state<T>(run, run.checkpoint < 0 ? 0 : 1 - run.checkpoint, part == 1, sample)[row] =
          part == 0 ? z : u;
    }
    decide(run, residuals, &place);
    return;
  }
  MonTile<T, 1> tile(history, n);
  __syncthreads();
  if (live && part == 0) {
    x[row] = z;
    tile.x[row].at[0] = z;
  }
  __syncthreads();
  T s;
  if (a.matrix != nullptr) {
    if (a.rule.resolvent) matrix.load(a.matrix, n, row, part);
    s = matrix.times(x, part);
  } else {
    multiply_factors(a, tile);
    __syncthreads();
    s = live ? tile.y[row].at[0] + static_cast<T>(a.diagonal) * z : T(0);
  }
  if (!live || part != 0) return;
  static_cast<T*>(a.z)[at] = z;
  static_cast<T*>(a.out)[at] = last_application(a.rule, s, b, slope);
}

template <typename T>
auto kernel_for(int64_t n) {
  if (resident_quads(n) == 4) return resident_kernel<T, 4>;
  if constexpr (sizeof(T) == 4) {
    if (resident_quads(n) == 8) return resident_kernel<T, 8>;
  }
  return resident_kernel<T, 6>;
}

}  // namespace

bool mon_is_resident(const MonSplittingArgs& a) {
  return a.n <= (a.dtype == DType::f64 ? kResidentDoubles : kResidentFloats) &&
         (a.rule.resolvent || a.matrix != nullptr);
}

int64_t mon_resident_shared(DType dtype, int64_t n, int steps) {
  const int64_t element = dtype == DType::f64 ? 8 : 4;
  const int64_t history = int64_t{2} * steps * resident_rows(n), tile = mon_tile_elements(n);
  return (32 * resident_quads(n) + (history > tile ? history : tile)) * element;
}

cudaError_t mon_resident(const MonRun& run, int64_t blocks, cudaStream_t stream) {
  const int64_t n = run.a.n;
  const int steps = run.mode == kChunk ? run.steps : 2;
  return launch(run.a.dtype == DType::f64 ? kernel_for<double>(n) : kernel_for<float>(n),
                dim3(static_cast<unsigned>(blocks)),
                dim3(static_cast<unsigned>(4 * resident_rows(n))),
                static_cast<size_t>(mon_resident_shared(run.a.dtype, n, steps)), stream, run);
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
