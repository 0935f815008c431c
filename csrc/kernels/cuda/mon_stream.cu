// A few samples to a block, which reads the matrix at every step.
#include "kernels/cuda/mon_products.cuh"
#include "kernels/cuda/mon_run.cuh"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

// kT samples to a block; the matrix comes from the cache of the device at every step.
template <typename T, int kT, bool kSpilled>
__global__ void __launch_bounds__(kMonThreads, 1)
    stream_kernel(const __grid_constant__ MonRun run) {
  __shared__ double residuals[kMostSteps];
  __shared__ double norms[2][kMonWarps][2 * kT];
  __shared__ int running[kT];
  __shared__ unsigned place;
  int steps, checkpoint;
  if (!begin(run, &steps, &checkpoint)) return;
  const MonSplittingArgs& a = run.a;
  const int n = static_cast<int>(a.n), pitch = static_cast<int>(mon_pitch(n));
  const int me = static_cast<int>(threadIdx.x), warp = me / 32, lane = me & 31;
  // A thread's elements are all of one sample.
  const int t = me % kT;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kT, sample = first + t;
  const bool live = sample < a.batch;
  void* memory = shared_memory<char>();
  if (kSpilled) memory = static_cast<char*>(run.spill) + blockIdx.x * run.spill_bytes;
  const MonTile<T, kT> tile(memory, n);
  const T* bias = static_cast<const T*>(a.bias) + sample * n;
  const T* slope = a.rule.adjoint ? static_cast<const T*>(a.slope) + sample * n : nullptr;

  for (int r = me / kT; r < n; r += kMonThreads / kT) {
    T z = 0, u = 0;
    if (checkpoint >= 0 && live) {
      z = state<T>(run, checkpoint, false, sample)[r];
      if (steps > 0) u = state<T>(run, checkpoint, true, sample)[r];
    }
    tile.z[r].at[t] = z;
    tile.u[r].at[t] = u;
    tile.x[r].at[t] = live ? product_input(a.rule, z, u, bias[r]) : T(0);
  }
  if (me < kT) running[me] = first + me < a.batch ? 1 : 0;
  __syncthreads();

  // The product with W, and how many partial sums it is.
  const auto apply = [&]() {
    if (a.matrix != nullptr) {
      multiply_dense(static_cast<const T*>(run.matrix), n, tile.x, tile.y);
      return mon_groups(n);
    }
    multiply_factors(a, tile);
    return 1;
  };
  const auto product = [&](int r, int groups, T diagonal) {
    T s = diagonal == 0 ? T(0) : diagonal * tile.x[r].at[t];
    for (int g = 0; g < groups; ++g) s += tile.y[g * pitch + r].at[t];
    return s;
  };
  const T diagonal = a.matrix != nullptr ? T(0) : static_cast<T>(a.diagonal);

  for (int i = 0; i < steps; ++i) {
    int groups = mon_groups(n);
    if (a.rule.resolvent) {
      multiply_dense(static_cast<const T*>(run.resolvent), n, tile.x, tile.y);
    } else {
      groups = apply();
    }
    __syncthreads();
    double change = 0, norm = 0;
    if (running[t] != 0) {
      for (int r = me / kT; r < n; r += kMonThreads / kT) {
        const T s = product(r, groups, a.rule.resolvent ? T(0) : diagonal);
        const T before = tile.z[r].at[t], b = bias[r];
        const T scale =
            slope == nullptr ? T(0) : step_scale(slope[r], static_cast<T>(a.rule.alpha));
        T z = before, u = tile.u[r].at[t];
        advance(a.rule, s, b, scale, z, u);
        tile.z[r].at[t] = z;
        tile.u[r].at[t] = u;
        tile.x[r].at[t] = product_input(a.rule, z, u, b);
        const double d = z - before, v = z;
        change += d * d;
        norm += v * v;
      }
    }
    if (run.mode != kFinish) {
      change = sum_over_warp<kT>(change);
      norm = sum_over_warp<kT>(norm);
      if (lane < kT) {
        norms[i & 1][warp][2 * lane] = change;
        norms[i & 1][warp][2 * lane + 1] = norm;
      }
    }
    __syncthreads();
    if (run.mode == kFinish) continue;
    if (run.mode == kChunk) {
      if (me >= 2) continue;
      double sum = 0;
      for (int w = 0; w < kMonWarps; ++w) {
        for (int j = 0; j < kT; ++j) sum += norms[i & 1][w][2 * j + me];
      }
      run.log[(static_cast<int64_t>(i) * gridDim.x + blockIdx.x) * 2 + me] = sum;
      continue;
    }
    if (me < kT && running[me] != 0) {
      change = norm = 0;
      for (int w = 0; w < kMonWarps; ++w) {
        change += norms[i & 1][w][2 * me];
        norm += norms[i & 1][w][2 * me + 1];
      }
      const double now = relative_residual(change, norm);
      a.iterations[first + me] = i + 1;
      a.residual[first + me] = now;
      if (!goes_on(now, a.rule.tol)) running[me] = 0;
    }
    __syncthreads();
    int left = 0;
    for (int j = 0; j < kT; ++j) left += running[j];
    if (left == 0) break;
  }

  if (run.mode == kChunk) {
    const int next = run.checkpoint < 0 ? 0 : 1 - run.checkpoint;
    for (int r = me / kT; live && r < n; r += kMonThreads / kT) {
      state<T>(run, next, false, sample)[r] = tile.z[r].at[t];
      state<T>(run, next, true, sample)[r] = tile.u[r].at[t];
    }
    decide(run, residuals, &place);
    return;
  }
  for (int r = me / kT; r < n; r += kMonThreads / kT) tile.x[r].at[t] = tile.z[r].at[t];
  __syncthreads();
  const int groups = apply();
  __syncthreads();
  for (int r = me / kT; live && r < n; r += kMonThreads / kT) {
    const T s = product(r, groups, diagonal);
    static_cast<T*>(a.z)[sample * n + r] = tile.z[r].at[t];
    static_cast<T*>(a.out)[sample * n + r] =
        last_application(a.rule, s, bias[r], slope == nullptr ? T(0) : slope[r]);
  }
}

template <typename T>
auto kernel_for(int samples, bool spilled) {
  if (spilled) return stream_kernel<T, 1, true>;
  return samples == 4 ? stream_kernel<T, 4, false> : stream_kernel<T, 1, false>;
}

}  // namespace

cudaError_t mon_stream(const MonRun& run, int samples, int64_t blocks, int64_t shared,
                       cudaStream_t stream) {
  const bool spilled = run.spill != nullptr;
  return launch(run.a.dtype == DType::f64 ? kernel_for<double>(samples, spilled)
                                          : kernel_for<float>(samples, spilled),
                dim3(static_cast<unsigned>(blocks)), dim3(kMonThreads), static_cast<size_t>(shared),
                stream, run);
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
