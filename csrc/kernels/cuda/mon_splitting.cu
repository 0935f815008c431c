#include "kernels/cuda/mon_splitting.h"

#include "kernels/cuda/mon_products.cuh"
#include "kernels/cuda/mon_run.cuh"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr int kTransposeThreads = 256, kNothingThreads = 256;
constexpr int64_t kStatic = 4096;  // shared memory that kernels have besides, at most

// to: columns of to_pitch elements, zeros behind the rows. In tiles of 32 x 32.
template <typename T>
__global__ void __launch_bounds__(kTransposeThreads)
    transpose_kernel(const T* from, int64_t from_pitch, int64_t rows, int64_t columns, T* to,
                     int64_t to_pitch) {
  __shared__ T tile[32][33];
  const int64_t tiles = (columns + 31) / 32;
  const int64_t row0 = blockIdx.x / tiles * 32, column0 = blockIdx.x % tiles * 32;
  const int x = static_cast<int>(threadIdx.x & 31u), y = static_cast<int>(threadIdx.x / 32);
  for (int i = y; i < 32; i += kTransposeThreads / 32) {
    const bool inside = row0 + i < rows && column0 + x < columns;
    tile[i][x] = inside ? from[(row0 + i) * from_pitch + column0 + x] : T(0);
  }
  __syncthreads();
  for (int i = y; i < 32; i += kTransposeThreads / 32) {
    if (column0 + i < columns && row0 + x < to_pitch) {
      to[(column0 + i) * to_pitch + row0 + x] = tile[x][i];
    }
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
  bool resident, grid, spilled;
  int samples;  // of a block
  int64_t blocks, element, tile_bytes, plane_bytes;
  int64_t log, states, matrix, resolvent, planes, spill, end;  // offsets; the control is at 0
};

Shape shape_of(const MonSplittingArgs& a, const DeviceLimits& limits) {
  Shape s{};
  s.element = a.dtype == DType::f64 ? 8 : 4;
  s.resident = mon_is_resident(a);
  s.grid = !s.resident && mon_is_grid(a, limits);
  const int64_t tile = mon_tile_elements(a.n) * s.element, room = limits.shared_bytes - kStatic;
  // Four samples read the matrix once; where there are few, blocks are worth more.
  s.samples = !s.resident && 3 * a.batch > limits.multiprocessors && 4 * tile <= room ? 4 : 1;
  s.tile_bytes = s.samples * tile;
  s.spilled = !s.resident && s.tile_bytes > room;
  s.blocks = (a.batch + s.samples - 1) / s.samples;
  s.plane_bytes = a.n * mon_pitch(a.batch) * s.element;
  int64_t at = 0;
  const auto take = [&at](bool wanted, int64_t bytes) {
    const int64_t begin = at;
    at += wanted ? (bytes + 15) / 16 * 16 : 0;
    return begin;
  };
  take(true, sizeof(MonControl));
  s.log =
      take(!a.rule.per_sample, 16 * (s.grid ? mon_grid_blocks(a) : s.blocks * int64_t{kMostSteps}));
  s.states = take(!a.rule.per_sample, 4 * a.batch * a.n * s.element);
  const int64_t packed = a.n * mon_pitch(a.n) * s.element;
  s.matrix = take(!s.resident && a.matrix != nullptr, packed);
  s.resolvent = take(!s.resident && a.rule.resolvent, packed);
  s.planes = take(s.grid, 6 * s.plane_bytes);
  s.spill = take(s.spilled, s.blocks * s.tile_bytes);
  s.end = at;
  return s;
}

class Solve {
 public:
  Solve(const MonSplittingArgs& a, char* scratch, const DeviceLimits& limits, cudaStream_t stream)
      : a_(a), shape_(shape_of(a, limits)), scratch_(scratch), limits_(limits), stream_(stream) {
    run_.a = a;
    run_.matrix = scratch + shape_.matrix;
    run_.resolvent = scratch + shape_.resolvent;
    run_.states = scratch + shape_.states;
    run_.log = reinterpret_cast<double*>(scratch + shape_.log);
    run_.control = reinterpret_cast<MonControl*>(scratch);
    run_.spill = shape_.spilled ? scratch + shape_.spill : nullptr;
    run_.spill_bytes = shape_.tile_bytes;
    run_.checkpoint = -1;
  }

  cudaError_t operator()() {
    for (const MonSparse* m : {&a_.down, &a_.up, &a_.single}) {
      if (m->row_ptr == nullptr) continue;
      then([&] { return launch(check_kernel, dim3(1), dim3(1), 0, stream_, *m, a_.n, a_.fault); });
    }
    if (!shape_.resident && a_.matrix != nullptr) {
      transpose(a_.matrix, a_.n, a_.n, a_.n, scratch_ + shape_.matrix, mon_pitch(a_.n));
    }
    if (!shape_.resident && a_.rule.resolvent) {
      transpose(a_.resolvent, a_.n, a_.n, a_.n, scratch_ + shape_.resolvent, mon_pitch(a_.n));
    }
    if (a_.rule.per_sample) {
      constexpr int64_t kAll = 0x7fffffff;
      start(kSamples, a_.max_iter < kAll ? a_.max_iter : kAll);
      return error_;
    }
    then([&] { return cudaMemsetAsync(run_.control, 0, sizeof(MonControl), stream_); });
    if (shape_.grid) {
      all_blocks();
    } else {
      chunks();
    }
    return error_;
  }

 private:
  template <typename F>
  void then(const F& f) {
    if (error_ == cudaSuccess) error_ = f();
  }

  void transpose(const void* from, int64_t from_pitch, int64_t rows, int64_t columns, void* to,
                 int64_t to_pitch) {
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      const int64_t tiles = (to_pitch + 31) / 32 * ((columns + 31) / 32);
      return launch(transpose_kernel<T>, dim3(static_cast<unsigned>(tiles)),
                    dim3(kTransposeThreads), 0, stream_, static_cast<const T*>(from), from_pitch,
                    rows, columns, static_cast<T*>(to), to_pitch);
    };
    then([&] { return a_.dtype == DType::f64 ? run(double{}) : run(float{}); });
  }

  void start(MonMode mode, int64_t steps) {
    run_.mode = mode;
    run_.steps = static_cast<int>(steps);
    then([&] {
      if (shape_.resident) return mon_resident(run_, shape_.blocks, stream_);
      return mon_stream(run_, shape_.samples, shape_.blocks, shape_.spilled ? 0 : shape_.tile_bytes,
                        stream_);
    });
  }

  void chunks() {
    // Steps made in vain against launches: a resident step takes a tenth of a launch.
    const int64_t least = shape_.resident ? 16 : 4, share = shape_.resident ? 2 : 4;
    int64_t most = kMostSteps;
    while (shape_.resident && most > 1 &&
           mon_resident_shared(a_.dtype, a_.n, static_cast<int>(most)) >
               limits_.shared_bytes - kStatic) {
      most /= 2;
    }
    while (run_.made < a_.max_iter) {
      int64_t steps = run_.made / share < least ? least : run_.made / share;
      if (steps > most) steps = most;
      if (steps > a_.max_iter - run_.made) steps = a_.max_iter - run_.made;
      run_.last = run_.made + steps == a_.max_iter;
      start(kChunk, steps);
      run_.made += steps;
      run_.checkpoint = run_.checkpoint < 0 ? 0 : 1 - run_.checkpoint;
    }
    start(kFinish, 0);
  }

  void all_blocks() {
    char* plane = scratch_ + shape_.planes;
    const auto next = [&] {
      char* here = plane;
      plane += shape_.plane_bytes;
      return here;
    };
    MonGrid grid{};
    grid.z = next();
    grid.u = next();
    grid.x[0] = next();
    grid.x[1] = next();
    const int64_t wide = mon_pitch(a_.batch);
    const auto by_rows = [&](const void* from) {
      void* to = next();
      transpose(from, a_.n, a_.batch, a_.n, to, wide);
      return to;
    };
    grid.bias = by_rows(a_.bias);
    if (a_.rule.adjoint) grid.slope = by_rows(a_.slope);
    then([&] { return mon_grid(run_, grid, limits_, stream_); });
    if (a_.matrix != nullptr) return;
    // The last application of sparse factors, to a state that is there.
    transpose(grid.z, wide, a_.n, a_.batch, run_.states, a_.n);
    run_.checkpoint = 0;
    start(kSamples, 0);
  }

  const MonSplittingArgs& a_;
  const Shape shape_;
  char* scratch_;
  const DeviceLimits& limits_;
  cudaStream_t stream_;
  MonRun run_{};
  cudaError_t error_ = cudaSuccess;
};

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
  return Solve(a, static_cast<char*>(scratch), limits, stream)();
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
