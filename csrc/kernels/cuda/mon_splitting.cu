#include "kernels/cuda/mon_splitting.h"

#include "kernels/cuda/mon_products.cuh"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr int kMostSteps = 64;  // of a launch
constexpr int kTransposeThreads = 256, kNothingThreads = 256;

// Up to this size a matrix stays in registers, and x is padded to.
constexpr int kResidentFloats = 128, kResidentDoubles = 96;
FASTPRUNE_HOST_DEVICE constexpr int resident_quads(int64_t n) {
  return n <= 64 ? 4 : n <= 96 ? 6 : 8;
}

enum RunMode : int {
  kChunk,    // some steps from a checkpoint, for the rule over the batch
  kSamples,  // all steps, each sample until it meets the rule, and the last application
  kFinish,   // the steps that were found to be needed, and the last application
};

// What launches tell one another.
struct Control {
  unsigned ticket;
  int done;
  int steps;  // from the checkpoint
  int checkpoint;
};

struct Run {
  MonSplittingArgs a;
  const void *matrix, *resolvent;  // packed; a resident matrix is read as it came
  void* states;                    // [checkpoint][z, u][sample][n]
  double* log;                     // [step][block][2]
  Control* control;
  void* spill;  // tiles that do not fit shared memory
  int64_t spill_bytes;
  RunMode mode;
  int checkpoint;  // -1: the start, zeros
  int steps;
  int64_t made;  // before
  bool last;
};

template <typename T>
__device__ __forceinline__ T* state(const Run& run, int checkpoint, bool u, int64_t sample) {
  const int64_t plane = 2 * checkpoint + (u ? 1 : 0);
  return static_cast<T*>(run.states) + (plane * run.a.batch + sample) * run.a.n;
}

// What a block has to do: false where nothing.
__device__ __forceinline__ bool begin(const Run& run, int* steps, int* checkpoint) {
  *steps = run.steps;
  *checkpoint = run.checkpoint;
  if (run.mode == kSamples) return true;
  const volatile Control* control = run.control;
  if (run.mode == kChunk) return control->done == 0;
  *steps = control->steps;
  *checkpoint = control->checkpoint;
  return true;
}

// The last block of a chunk to come here, when the logs of all are there, applies the rule.
__device__ __forceinline__ void decide(const Run& run, double* residuals, unsigned* place) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *place = atomicAdd(&run.control->ticket, 1u);
  }
  __syncthreads();
  if (*place + 1 != gridDim.x) return;
  __threadfence();
  const int lane = static_cast<int>(threadIdx.x & 31u), blocks = static_cast<int>(gridDim.x);
  for (int i = static_cast<int>(threadIdx.x / 32); i < run.steps;
       i += static_cast<int>(blockDim.x / 32)) {
    const volatile double* log = run.log + static_cast<int64_t>(i) * blocks * 2;
    double change = 0, norm = 0;
    for (int b = lane; b < blocks; b += 32) {
      change += log[2 * b];
      norm += log[2 * b + 1];
    }
    change = sum_over_warp<1>(change);
    norm = sum_over_warp<1>(norm);
    if (lane == 0) residuals[i] = relative_residual(change, norm);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  run.control->ticket = 0;
  int i = 0;
  while (i < run.steps && goes_on(residuals[i], run.a.rule.tol)) ++i;
  if (i == run.steps && !run.last) return;
  if (i == run.steps) --i;
  run.control->done = 1;
  run.control->steps = i + 1;
  run.control->checkpoint = run.checkpoint;
  *run.a.iterations = run.made + i + 1;
  *run.a.residual = residuals[i];
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
    resident_kernel(const __grid_constant__ Run run) {
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

// kT samples to a block; the matrix comes from the cache of the device at every step.
template <typename T, int kT, bool kSpilled>
__global__ void __launch_bounds__(kMonThreads, 1) stream_kernel(const __grid_constant__ Run run) {
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
      u = state<T>(run, checkpoint, true, sample)[r];
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

// packed (n columns of the pitch) from a matrix that is stored row by row, in tiles of 32 x 32.
template <typename T>
__global__ void __launch_bounds__(kTransposeThreads)
    pack_kernel(const T* matrix, int64_t n, T* packed) {
  __shared__ T tile[32][33];
  const int64_t pitch = mon_pitch(n), row0 = int64_t{32} * blockIdx.y,
                col0 = int64_t{32} * blockIdx.x;
  const int x = static_cast<int>(threadIdx.x & 31u), y = static_cast<int>(threadIdx.x / 32);
  for (int i = y; i < 32; i += kTransposeThreads / 32) {
    const bool inside = row0 + i < n && col0 + x < n;
    tile[i][x] = inside ? matrix[(row0 + i) * n + col0 + x] : T(0);
  }
  __syncthreads();
  for (int i = y; i < 32; i += kTransposeThreads / 32) {
    if (col0 + i < n && row0 + x < pitch) packed[(col0 + i) * pitch + row0 + x] = tile[x][i];
  }
}

// A sparse product's lists, as far as a row does not see them.
__global__ void check_kernel(MonSparse m, int64_t n, uint32_t* fault) {
  if (m.row_ptr[0] != 0 || m.row_ptr[m.blocks * n] != m.entries) report(fault, kBadRowPtr);
}

__global__ void nothing_kernel(int64_t* iterations, double* residual, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  iterations[i] = 1;
  residual[i] = 0;
}

// How a call is cut into blocks, and where its scratch lies.
struct Shape {
  bool resident, spilled;
  int lanes;  // samples of a block
  int64_t blocks, element, tile_bytes;
  int64_t control, log, states, matrix, resolvent, spill, end;  // offsets
  int64_t shared(int steps, int64_t n) const {
    if (spilled) return 0;
    if (!resident) return tile_bytes;
    const int64_t history = 2 * steps * resident_rows(n) * element;
    return 32 * resident_quads(n) * element + (history > tile_bytes ? history : tile_bytes);
  }
};

int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

Shape shape_of(const MonSplittingArgs& a, const DeviceLimits& limits) {
  Shape s{};
  s.element = a.dtype == DType::f64 ? 8 : 4;
  s.resident = a.n <= (a.dtype == DType::f64 ? kResidentDoubles : kResidentFloats) &&
               (a.rule.resolvent || a.matrix != nullptr);
  const int64_t tile = mon_tile_elements(a.n) * s.element;
  const int64_t room = limits.shared_bytes - 4096;  // what the kernels have besides
  // Four samples read the matrix once; where there are few, blocks are worth more.
  s.lanes = !s.resident && 3 * a.batch > limits.multiprocessors && 4 * tile <= room ? 4 : 1;
  s.tile_bytes = s.lanes * tile;
  s.spilled = !s.resident && s.tile_bytes > room;
  s.blocks = (a.batch + s.lanes - 1) / s.lanes;
  const int64_t packed = s.resident ? 0 : aligned(a.n * mon_pitch(a.n) * s.element);
  int64_t at = aligned(sizeof(Control));
  s.log = at, at += a.rule.per_sample ? 0 : 2 * 8 * kMostSteps * s.blocks;
  s.states = at, at += a.rule.per_sample ? 0 : aligned(4 * a.batch * a.n * s.element);
  s.matrix = at, at += a.matrix != nullptr ? packed : 0;
  s.resolvent = at, at += a.rule.resolvent ? packed : 0;
  s.spill = at, at += s.spilled ? s.blocks * s.tile_bytes : 0;
  s.end = at;
  return s;
}

using Kernel = void (*)(Run);

template <typename T>
Kernel kernel_of(const Shape& s, int64_t n) {
  if (s.resident) {
    if (resident_quads(n) == 4) return resident_kernel<T, 4>;
    if constexpr (sizeof(T) == 4) {
      if (resident_quads(n) == 8) return resident_kernel<T, 8>;
    }
    return resident_kernel<T, 6>;
  }
  if (s.spilled) return stream_kernel<T, 1, true>;
  return s.lanes == 4 ? Kernel{stream_kernel<T, 4, false>} : Kernel{stream_kernel<T, 1, false>};
}

template <typename T>
cudaError_t pack(const void* matrix, int64_t n, void* packed, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>((n + 31) / 32);
  return launch(pack_kernel<T>, dim3(tiles, tiles), dim3(kTransposeThreads), 0, stream,
                static_cast<const T*>(matrix), n, static_cast<T*>(packed));
}

template <typename T>
cudaError_t solve(const MonSplittingArgs& a, char* scratch, const DeviceLimits& limits,
                  cudaStream_t stream) {
  const Shape s = shape_of(a, limits);
  for (const MonSparse* m : {&a.down, &a.up, &a.single}) {
    if (m->row_ptr == nullptr) continue;
    const cudaError_t error = launch(check_kernel, dim3(1), dim3(1), 0, stream, *m, a.n, a.fault);
    if (error != cudaSuccess) return error;
  }
  if (!s.resident) {
    cudaError_t error = cudaSuccess;
    if (a.matrix != nullptr) error = pack<T>(a.matrix, a.n, scratch + s.matrix, stream);
    if (error == cudaSuccess && a.rule.resolvent) {
      error = pack<T>(a.resolvent, a.n, scratch + s.resolvent, stream);
    }
    if (error != cudaSuccess) return error;
  }
  Run run{};
  run.a = a;
  run.matrix = scratch + s.matrix;
  run.resolvent = scratch + s.resolvent;
  run.states = scratch + s.states;
  run.log = reinterpret_cast<double*>(scratch + s.log);
  run.control = reinterpret_cast<Control*>(scratch);
  run.spill = scratch + s.spill;
  run.spill_bytes = s.tile_bytes;
  run.checkpoint = -1;
  const dim3 grid(static_cast<unsigned>(s.blocks));
  const dim3 block(static_cast<unsigned>(s.resident ? 4 * resident_rows(a.n) : kMonThreads));
  const auto start = [&](RunMode mode, int steps) {
    run.mode = mode;
    run.steps = steps;
    const int slots = mode == kChunk ? steps : 2;
    return launch(kernel_of<T>(s, a.n), grid, block, static_cast<size_t>(s.shared(slots, a.n)),
                  stream, run);
  };
  constexpr int64_t kAll = 0x7fffffff;
  if (a.rule.per_sample)
    return start(kSamples, static_cast<int>(a.max_iter < kAll ? a.max_iter : kAll));

  cudaError_t error = cudaMemsetAsync(run.control, 0, sizeof(Control), stream);
  // Steps made in vain against launches: a resident step takes a tenth of a launch.
  const int64_t least = s.resident ? 16 : 4, share = s.resident ? 2 : 4;
  int64_t most = kMostSteps;
  while (most > 1 && s.shared(static_cast<int>(most), a.n) > limits.shared_bytes - 4096) most /= 2;
  while (run.made < a.max_iter && error == cudaSuccess) {
    int64_t steps = run.made / share < least ? least : run.made / share;
    if (steps > most) steps = most;
    if (steps > a.max_iter - run.made) steps = a.max_iter - run.made;
    run.last = run.made + steps == a.max_iter;
    error = start(kChunk, static_cast<int>(steps));
    run.made += steps;
    run.checkpoint = run.checkpoint < 0 ? 0 : 1 - run.checkpoint;
  }
  return error == cudaSuccess ? start(kFinish, 0) : error;
}

}  // namespace

cudaError_t mon_nothing(int64_t* iterations, double* residual, int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const dim3 blocks(static_cast<unsigned>((count + kNothingThreads - 1) / kNothingThreads));
  return launch(nothing_kernel, blocks, dim3(kNothingThreads), 0, stream, iterations, residual,
                count);
}

int64_t mon_splitting_scratch(const MonSplittingArgs& a, const DeviceLimits& limits) {
  return a.n == 0 || a.batch == 0 ? 0 : shape_of(a, limits).end;
}

cudaError_t mon_splitting(const MonSplittingArgs& a, void* scratch, const DeviceLimits& limits,
                          cudaStream_t stream) {
  if (a.batch == 0 || a.n == 0) {
    return mon_nothing(a.iterations, a.residual, a.rule.per_sample ? a.batch : 1, stream);
  }
  char* memory = static_cast<char*>(scratch);
  return a.dtype == DType::f64 ? solve<double>(a, memory, limits, stream)
                               : solve<float>(a, memory, limits, stream);
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
