// Large dense matrices: a launch for every step, a block for 32 rows of 32 samples. State and
// right-hand side are stored as the matrix is packed, a row of all samples after another.
#include "kernels/cuda/mon_products.cuh"
#include "kernels/cuda/mon_run.cuh"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 32;   // rows, and samples
constexpr int kParts = 4;   // of a stage's columns, a quarter of the threads to each
constexpr int kDepth = 64;  // columns of a stage
constexpr int kStages = 3;
constexpr int kSumPitch = kTile + 4;  // rows of partial sums start in different banks

template <typename T>
struct Stage {
  T w[kDepth][kTile], x[kDepth][kTile];
};
template <typename T>
constexpr size_t kShared = kStages * sizeof(Stage<T>);
static_assert(kParts * kTile * kSumPitch * sizeof(float) <= kShared<float>);

// Columns [first, first + kDepth) of a packed matrix, of this block's kTile rows.
template <typename T>
__device__ __forceinline__ void load(T (*to)[kTile], const T* packed, int64_t pitch, int64_t row,
                                     int64_t first, int64_t columns) {
  constexpr int kUnit = 16 / sizeof(T), kUnits = kTile / kUnit;
#pragma unroll
  for (int i = 0; i < kDepth * kUnits / kThreads; ++i) {
    const int at = i * kThreads + static_cast<int>(threadIdx.x), k = at / kUnits;
    const int64_t r = row + at % kUnits * kUnit;
    const bool inside = first + k < columns && r < pitch;
    copy_async_or_zero<16>(&to[k][at % kUnits * kUnit],
                           packed + (inside ? (first + k) * pitch + r : 0), inside);
  }
}

// sums[part][row][sample], in shared memory, of the packed matrix and x.
template <typename T>
__device__ __forceinline__ void multiply(const T* matrix, const T* x, int64_t n, int64_t batch,
                                         int64_t row, int64_t sample, Stage<T>* stages) {
  const int me = static_cast<int>(threadIdx.x), part = me / (kThreads / kParts);
  const int rows = me % 8 * 4, samples = me % (kThreads / kParts) / 8 * 4;
  const int64_t pitch = mon_pitch(n), wide = mon_pitch(batch);
  const int chunks = static_cast<int>((n + kDepth - 1) / kDepth);
  const auto start = [&](int chunk) {
    if (chunk < chunks) {
      Stage<T>& stage = stages[chunk % kStages];
      load(stage.w, matrix, pitch, row, int64_t{kDepth} * chunk, n);
      load(stage.x, x, wide, sample, int64_t{kDepth} * chunk, n);
    }
    commit_copies();
  };
  T sum[4][4] = {};
#pragma unroll
  for (int c = 0; c < kStages - 1; ++c) start(c);
  for (int c = 0; c < chunks; ++c) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    start(c + kStages - 1);
    const Stage<T>& stage = stages[c % kStages];
    constexpr int kOwn = kDepth / kParts;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int k = part * kOwn + i;
      const auto w = *reinterpret_cast<const Lanes<T, 4>*>(&stage.w[k][rows]);
      const auto v = *reinterpret_cast<const Lanes<T, 4>*>(&stage.x[k][samples]);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int t = 0; t < 4; ++t) sum[r][t] += w.at[r] * v.at[t];
      }
    }
  }
  wait_for_copies<0>();
  __syncthreads();
  T* sums = reinterpret_cast<T*>(stages);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    Lanes<T, 4> v;
#pragma unroll
    for (int t = 0; t < 4; ++t) v.at[t] = sum[r][t];
    *reinterpret_cast<Lanes<T, 4>*>(sums + (part * kTile + rows + r) * kSumPitch + samples) = v;
  }
  __syncthreads();
}

// finish: the last application, else a step from g.x[from] to the other one.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    step_kernel(const __grid_constant__ MonRun run, const __grid_constant__ MonGrid g, int from,
                bool finish) {
  __shared__ double residuals[1];
  __shared__ double norms[kWarps][2];
  __shared__ unsigned place;
  if (!finish && *const_cast<volatile int*>(&run.control->done) != 0) return;
  const MonSplittingArgs& a = run.a;
  const int me = static_cast<int>(threadIdx.x);
  const int64_t tiles = (a.n + kTile - 1) / kTile, wide = mon_pitch(a.batch);
  const int64_t row0 = blockIdx.x % tiles * kTile, sample0 = blockIdx.x / tiles * kTile;
  auto* stages = shared_memory<Stage<T>>();
  T* z_state = static_cast<T*>(g.z);
  T* u_state = static_cast<T*>(g.u);
  const T* input = finish ? z_state : static_cast<const T*>(g.x[from]);
  multiply(static_cast<const T*>(finish || !a.rule.resolvent ? run.matrix : run.resolvent), input,
           a.n, a.batch, row0, sample0, stages);
  const T* sums = reinterpret_cast<const T*>(stages);
  double change = 0, norm = 0;
  for (int i = me; i < kTile * kTile; i += kThreads) {
    const int64_t row = row0 + i / kTile, sample = sample0 + i % kTile;
    if (row >= a.n || sample >= a.batch) continue;
    T s = 0;
#pragma unroll
    for (int p = 0; p < kParts; ++p) s += sums[(p * kTile + i / kTile) * kSumPitch + i % kTile];
    const int64_t at = row * wide + sample;
    const T b = static_cast<const T*>(g.bias)[at];
    const T slope = a.rule.adjoint ? static_cast<const T*>(g.slope)[at] : T(0);
    T z = z_state[at];
    if (finish) {
      static_cast<T*>(a.z)[sample * a.n + row] = z;
      static_cast<T*>(a.out)[sample * a.n + row] = last_application(a.rule, s, b, slope);
      continue;
    }
    T u = a.rule.resolvent ? u_state[at] : T(0);
    const T before = z;
    advance(a.rule, s, b, step_scale(slope, static_cast<T>(a.rule.alpha)), z, u);
    z_state[at] = z;
    if (a.rule.resolvent) u_state[at] = u;
    static_cast<T*>(g.x[1 - from])[at] = product_input(a.rule, z, u, b);
    const double d = z - before, v = z;
    change += d * d;
    norm += v * v;
  }
  if (finish) return;
  change = sum_over_warp<1>(change);
  norm = sum_over_warp<1>(norm);
  if ((me & 31) == 0) {
    norms[me / 32][0] = change;
    norms[me / 32][1] = norm;
  }
  __syncthreads();
  if (me < 2) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += norms[w][me];
    run.log[2 * static_cast<int64_t>(blockIdx.x) + me] = sum;
  }
  decide(run, residuals, &place);
}

// Zeros, and the first right-hand side.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    begin_kernel(const __grid_constant__ MonRun run, const __grid_constant__ MonGrid g) {
  const int64_t wide = mon_pitch(run.a.batch), all = run.a.n * wide;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < all; i += step) {
    static_cast<T*>(g.z)[i] = 0;
    static_cast<T*>(g.u)[i] = 0;
    static_cast<T*>(g.x[0])[i] =
        product_input(run.a.rule, T(0), T(0), static_cast<const T*>(g.bias)[i]);
    static_cast<T*>(g.x[1])[i] = 0;
  }
}

template <typename T>
cudaError_t solve(MonRun run, const MonGrid& g, const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t all = run.a.n * mon_pitch(run.a.batch), most = int64_t{8} * limits.multiprocessors;
  const int64_t wanted = (all + kThreads - 1) / kThreads;
  cudaError_t error =
      launch(begin_kernel<T>, dim3(static_cast<unsigned>(wanted < most ? wanted : most)),
             dim3(kThreads), 0, stream, run, g);
  const auto step = [&](int from, bool finish) {
    if (error != cudaSuccess) return;
    error = launch(step_kernel<T>, dim3(static_cast<unsigned>(mon_grid_blocks(run.a))),
                   dim3(kThreads), kShared<T>, stream, run, g, from, finish);
  };
  run.steps = 1;
  for (int64_t i = 0; i < run.a.max_iter; ++i) {
    run.made = i;
    run.last = i + 1 == run.a.max_iter;
    step(static_cast<int>(i & 1), false);
  }
  if (run.a.matrix != nullptr) step(0, true);
  return error;
}

}  // namespace

bool mon_is_grid(const MonSplittingArgs& a, const DeviceLimits& limits) {
  const size_t element = a.dtype == DType::f64 ? 8 : 4;
  const size_t shared = a.dtype == DType::f64 ? kShared<double> : kShared<float>;
  // Below, a block reads the matrix faster than the next launch begins.
  constexpr int64_t kLeastBytes = int64_t{512} << 10;
  return !a.rule.per_sample && (a.rule.resolvent || a.matrix != nullptr) &&
         a.n * a.n * static_cast<int64_t>(element) > kLeastBytes &&
         static_cast<int64_t>(shared) + 2048 <= limits.shared_bytes;
}

int64_t mon_grid_blocks(const MonSplittingArgs& a) {
  return (a.n + kTile - 1) / kTile * ((a.batch + kTile - 1) / kTile);
}

cudaError_t mon_grid(const MonRun& run, const MonGrid& grid, const DeviceLimits& limits,
                     cudaStream_t stream) {
  return run.a.dtype == DType::f64 ? solve<double>(run, grid, limits, stream)
                                   : solve<float>(run, grid, limits, stream);
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
