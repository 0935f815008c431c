#include "kernels/cuda/mon_fourier.h"

#include "kernels/cuda/mon_transforms.cuh"
#include "kernels/cuda/warp.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr int kMapWarps = kMapThreads / 32;
constexpr int kProductRows = 128;  // of a block, two to a thread
constexpr int kProductQuads = 4;   // of samples
constexpr int kProductThreads = kProductRows / 2 * kProductQuads;
constexpr int kProductDepth = 32;  // channels of the right-hand side in shared memory at a time
constexpr int kSpilledBlocks = 2;  // per multiprocessor

enum class MapStep : int {
  start,    // the first right-hand side
  iterate,  // one step, and the next right-hand side
  prepare,  // the right-hand side of the last application
  finish,   // the last application
};

struct Control {
  unsigned ticket;
  int done;
};

struct Solve {
  MonFourierArgs a;
  Spectrum s;
  int64_t quads, tasks;
  void *input, *product;  // [frequency][channel][quad], Complex4
  void* u;                // like z
  void *row_roots, *column_roots;
  double* sums;    // [sample][channel][2]: squares of the change, and of the new state
  double* totals;  // [sample][2]
  int* running;    // [sample]
  Control* control;
  void* spill;
  int64_t spill_bytes;
};

template <typename T>
__device__ __forceinline__ void fill_roots(void* to, int length, int64_t me, int64_t all) {
  for (int64_t i = me; i < length; i += all) static_cast<Root<T>*>(to)[i] = root_of<T>(i, length);
}

template <typename T>
__global__ void __launch_bounds__(kMapThreads) begin_kernel(const __grid_constant__ Solve v) {
  const int64_t me = static_cast<int64_t>(blockIdx.x) * kMapThreads + threadIdx.x;
  const int64_t all = static_cast<int64_t>(gridDim.x) * kMapThreads;
  fill_roots<T>(v.row_roots, v.s.width, me, all);
  fill_roots<T>(v.column_roots, v.s.height, me, all);
  const int64_t elements = v.a.batch * v.a.channels * v.s.height * v.s.width;
  for (int64_t i = me; i < elements; i += all) {
    static_cast<T*>(v.a.z)[i] = 0;
    static_cast<T*>(v.u)[i] = 0;
  }
  for (int64_t i = me; i < v.a.batch; i += all) v.running[i] = 1;
  if (me == 0) *v.control = Control{0, 0};
}

// The last block of a step to come here applies the rule: `made` steps.
__device__ __forceinline__ void decide(const Solve& v, int64_t made, unsigned* place, int* left) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *place = atomicAdd(&v.control->ticket, 1u);
    *left = 0;
  }
  __syncthreads();
  if (*place + 1 != gridDim.x) return;
  __threadfence();
  const int lane = static_cast<int>(threadIdx.x & 31u);
  const MonFourierArgs& a = v.a;
  for (int64_t n = threadIdx.x / 32; n < a.batch; n += kMapWarps) {
    if (a.rule.per_sample && v.running[n] == 0) continue;
    const volatile double* sums = v.sums + n * a.channels * 2;
    double change = 0, norm = 0;
    for (int64_t c = lane; c < a.channels; c += 32) {
      change += sums[2 * c];
      norm += sums[2 * c + 1];
    }
    change = sum_over_warp<1>(change);
    norm = sum_over_warp<1>(norm);
    if (lane != 0) continue;
    if (a.rule.per_sample) {
      const double now = relative_residual(change, norm);
      a.iterations[n] = made;
      a.residual[n] = now;
      if (goes_on(now, a.rule.tol)) {
        atomicOr(left, 1);
      } else {
        v.running[n] = 0;
      }
    } else {
      v.totals[2 * n] = change;
      v.totals[2 * n + 1] = norm;
    }
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  if (!a.rule.per_sample) {
    double change = 0, norm = 0;
    for (int64_t n = lane; n < a.batch; n += 32) {
      change += v.totals[2 * n];
      norm += v.totals[2 * n + 1];
    }
    change = sum_over_warp<1>(change);
    norm = sum_over_warp<1>(norm);
    if (lane == 0) {
      const double now = relative_residual(change, norm);
      *a.iterations = made;
      *a.residual = now;
      *left = goes_on(now, a.rule.tol) ? 1 : 0;
    }
  }
  if (lane != 0) return;
  v.control->ticket = 0;
  if (*left == 0) v.control->done = 1;
}

// The spectrum of a block's maps, the mirrored half included, weighted for rows_inverse().
template <typename T>
__device__ __forceinline__ void read_spectrum(const Solve& v, int64_t map, Complex4<T>* to) {
  const Spectrum& s = v.s;
  const int columns = s.columns();
  const int64_t stride = v.a.channels * v.quads;
  const T unit = T(1) / (static_cast<T>(s.height) * static_cast<T>(s.width));
  for (int i = static_cast<int>(threadIdx.x); i < s.height * columns; i += kMapThreads) {
    // Frequency by frequency in the order of memory.
    const int kx = i / s.height, ky = i % s.height;
    const bool conjugate = ky >= s.column_height(kx);
    const int stored = conjugate ? s.height - ky : ky;
    const auto* from = static_cast<const Complex4<T>*>(v.product);
    Complex4<T> value = from[(s.column_begin(kx) + stored) * stride + map];
    const T weight = s.own_mirror(kx) ? unit : 2 * unit;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      value.re.at[t] *= weight;
      value.im.at[t] *= conjugate ? -weight : weight;
    }
    to[ky * columns + kx] = value;
  }
}

template <typename T>
__device__ __forceinline__ void write_spectrum(const Solve& v, int64_t map,
                                               const Complex4<T>* from) {
  const Spectrum& s = v.s;
  const int columns = s.columns();
  const int64_t stride = v.a.channels * v.quads;
  for (int i = static_cast<int>(threadIdx.x); i < s.height * columns; i += kMapThreads) {
    const int kx = i / s.height, ky = i % s.height;
    if (ky >= s.column_height(kx)) continue;
    static_cast<Complex4<T>*>(v.input)[(s.column_begin(kx) + ky) * stride + map] =
        from[ky * columns + kx];
  }
}

// One channel of four samples at a time.
template <typename T, bool kSpilled>
__global__ void __launch_bounds__(kMapThreads, sizeof(T) == 4 ? 3 : 1)
    maps_kernel(const __grid_constant__ Solve v, MapStep step, bool inverse, int64_t made) {
  __shared__ double norms[kMapWarps][8];
  __shared__ unsigned place;
  __shared__ int left;
  const bool ends = step == MapStep::prepare || step == MapStep::finish;
  if (!ends && *const_cast<volatile int*>(&v.control->done) != 0) return;
  const MonFourierArgs& a = v.a;
  const Spectrum& s = v.s;
  const int me = static_cast<int>(threadIdx.x);
  const int points = s.height * s.width, area = s.height * s.columns();
  char* memory = shared_memory<char>();
  if (kSpilled) memory = static_cast<char*>(v.spill) + blockIdx.x * v.spill_bytes;
  auto* first = reinterpret_cast<Complex4<T>*>(memory);
  Complex4<T>* second = first + area;
  // Real maps, in the place of the first.
  auto* maps = reinterpret_cast<Lanes<T, 4>*>(first);
  const auto* row_roots = static_cast<const Root<T>*>(v.row_roots);
  const auto* column_roots = static_cast<const Root<T>*>(v.column_roots);
  if (!kSpilled) {
    auto* roots = reinterpret_cast<Root<T>*>(second + area);
    for (int i = me; i < s.width; i += kMapThreads) roots[i] = row_roots[i];
    for (int i = me; i < s.height; i += kMapThreads) roots[s.width + i] = column_roots[i];
    row_roots = roots;
    column_roots = roots + s.width;
  }
  const T alpha = static_cast<T>(a.rule.alpha);

  for (int64_t task = blockIdx.x; task < v.tasks; task += gridDim.x) {
    const int64_t channel = task / v.quads, quad = task % v.quads;
    if (inverse) read_spectrum(v, task, first);
    __syncthreads();
    if (inverse) {
      transform_columns(first, second, column_roots, s, true);
      __syncthreads();
      rows_inverse(second, maps, row_roots, s);
      __syncthreads();
    }
    double sums[8] = {};
    for (int p = me; p < points; p += kMapThreads) {
      const int y = p / s.width, x = p - y * s.width;
      const bool ring = y < a.ring || y >= s.height - a.ring || x < a.ring || x >= s.width - a.ring;
      Lanes<T, 4> here = {}, next = {};
      if (inverse) here = maps[p];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int64_t n = 4 * quad + t, at = (n * a.channels + channel) * points + p;
        if (n >= a.batch) continue;
        const T b = static_cast<const T*>(a.bias)[at];
        T z = static_cast<const T*>(a.z)[at], u = 0;
        if (a.rule.resolvent && !ends) u = static_cast<const T*>(v.u)[at];
        const T slope = a.rule.adjoint && !ring ? static_cast<const T*>(a.slope)[at] : T(0);
        if (step == MapStep::finish) {
          static_cast<T*>(a.out)[at] = ring ? T(0) : last_application(a.rule, here.at[t], b, slope);
          continue;
        }
        if (step == MapStep::iterate && v.running[n] != 0) {
          const T before = z;
          advance(a.rule, here.at[t], b, step_scale(slope, alpha), z, u);
          if (ring) z = 0;
          static_cast<T*>(a.z)[at] = z;
          if (a.rule.resolvent) static_cast<T*>(v.u)[at] = u;
          const double d = z - before, w = z;
          sums[2 * t] += d * d;
          sums[2 * t + 1] += w * w;
        }
        next.at[t] = step == MapStep::prepare ? z : product_input(a.rule, z, u, b);
      }
      if (step != MapStep::finish) maps[p] = next;
    }
    if (step == MapStep::iterate) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const double sum = sum_over_warp<1>(sums[j]);
        if ((me & 31) == 0) norms[me / 32][j] = sum;
      }
    }
    __syncthreads();
    if (step == MapStep::iterate && me < 8) {
      const int64_t n = 4 * quad + me / 2;
      double sum = 0;
      for (int w = 0; w < kMapWarps; ++w) sum += norms[w][me];
      if (n < a.batch) v.sums[(n * a.channels + channel) * 2 + me % 2] = sum;
    }
    if (step == MapStep::finish) continue;
    fold_rows(maps, s);
    __syncthreads();
    rows_forward(maps, second, row_roots, s);
    __syncthreads();
    transform_columns(second, first, column_roots, s, false);
    __syncthreads();
    write_spectrum(v, task, first);
    __syncthreads();
  }
  if (step == MapStep::iterate) decide(v, made, &place, &left);
}

// product = matrix x input at one frequency: two rows and four samples to a thread.
template <typename T>
__global__ void __launch_bounds__(kProductThreads)
    products_kernel(const __grid_constant__ Solve v, const Root<T>* matrix, bool always) {
  __shared__ Complex4<T> x[kProductDepth][kProductQuads];
  if (!always && *const_cast<volatile int*>(&v.control->done) != 0) return;
  const int channels = static_cast<int>(v.a.channels), quads = static_cast<int>(v.quads);
  const int first_row = static_cast<int>(blockIdx.z) * kProductRows;
  const int rows = channels - first_row < kProductRows ? channels - first_row : kProductRows;
  const int half = (rows + 1) / 2;
  const int first_quad = static_cast<int>(blockIdx.y) * kProductQuads;
  const int width = quads - first_quad < kProductQuads ? quads - first_quad : kProductQuads;
  const int me = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int quad = me / half, row = me - quad * half;
  const bool live = quad < width, two = row + half < rows;
  const int64_t frequency = blockIdx.x;
  const auto* input = static_cast<const Complex4<T>*>(v.input) + frequency * channels * quads;
  const Root<T>* column = matrix + frequency * channels * channels + first_row + row;
  Complex4<T> sum[2] = {};
  for (int first = 0; first < channels; first += kProductDepth) {
    const int depth = channels - first < kProductDepth ? channels - first : kProductDepth;
    __syncthreads();
    for (int i = me; i < depth * width; i += threads) {
      const int k = i / width, q = i - k * width;
      x[k][q] = input[(first + k) * quads + first_quad + q];
    }
    __syncthreads();
    if (!live) continue;
#pragma unroll 4
    for (int k = 0; k < depth; ++k, column += channels) {
      const Root<T> zero{0, 0}, w[2] = {column[0], two ? column[half] : zero};
      const Complex4<T> b = x[k][quad];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        add_product(sum[r].re, b.re, w[r].cosine);
        add_product(sum[r].re, b.im, -w[r].sine);
        add_product(sum[r].im, b.re, w[r].sine);
        add_product(sum[r].im, b.im, w[r].cosine);
      }
    }
  }
  if (!live) return;
  auto* to = static_cast<Complex4<T>*>(v.product) +
             (frequency * channels + first_row + row) * quads + first_quad + quad;
  to[0] = sum[0];
  if (two) to[static_cast<int64_t>(half) * quads] = sum[1];
}

template <typename T>
__global__ void __launch_bounds__(kMapThreads)
    pack_kernel(const Root<T>* matrix, Spectrum s, int64_t channels, bool adjoint,
                Root<T>* packed) {
  const int64_t square = channels * channels, all = s.frequencies() * square;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kMapThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kMapThreads + threadIdx.x; i < all;
       i += step) {
    const int64_t frequency = i / square, column = i % square / channels, row = i % channels;
    // The first column of frequencies is one half, as the last one may be.
    const int64_t top = s.height / 2 + 1;
    const int64_t kx = frequency < top ? 0 : (frequency - top) / s.height + 1;
    const int64_t ky = frequency - s.column_begin(static_cast<int>(kx));
    const int64_t from = adjoint ? column : row, to = adjoint ? row : column;
    Root<T> value = matrix[((ky * s.columns() + kx) * channels + from) * channels + to];
    if (adjoint) value.sine = -value.sine;
    packed[i] = value;
  }
}

int64_t aligned(int64_t bytes) { return (bytes + 31) / 32 * 32; }

// Where a solve's scratch lies, and how the maps are cut into blocks.
struct Shape {
  bool spilled;
  int64_t blocks, map_bytes, root_bytes;
  int64_t control, running, totals, sums, row_roots, column_roots, u, input, product, spill, end;
};

Shape shape_of(const MonFourierArgs& a, const DeviceLimits& limits) {
  const Spectrum s{static_cast<int>(a.height), static_cast<int>(a.width)};
  const int64_t element = a.dtype == DType::f64 ? 8 : 4, quads = (a.batch + 3) / 4;
  Shape shape{};
  shape.map_bytes = 2 * a.height * s.columns() * 8 * element;
  shape.root_bytes = 2 * (a.height + a.width) * element;
  shape.spilled = shape.map_bytes + shape.root_bytes > limits.shared_bytes - 2048;
  shape.blocks = a.channels * quads;
  const int64_t most = int64_t{kSpilledBlocks} * limits.multiprocessors;
  if (shape.spilled && shape.blocks > most) shape.blocks = most;
  const int64_t spectrum = s.frequencies() * a.channels * quads * 8 * element;
  int64_t at = aligned(sizeof(Control));
  const auto take = [&at](int64_t bytes) {
    const int64_t begin = at;
    at += aligned(bytes);
    return begin;
  };
  shape.running = take(4 * a.batch);
  shape.totals = take(16 * a.batch);
  shape.sums = take(16 * a.batch * a.channels);
  shape.row_roots = take(2 * a.width * element);
  shape.column_roots = take(2 * a.height * element);
  shape.u = take(a.batch * a.channels * a.height * a.width * element);
  shape.input = take(spectrum);
  shape.product = take(spectrum);
  shape.spill = take(shape.spilled ? shape.blocks * shape.map_bytes : 0);
  shape.end = at;
  return shape;
}

template <typename T>
cudaError_t solve(const MonFourierArgs& a, char* scratch, const DeviceLimits& limits,
                  cudaStream_t stream) {
  const Shape shape = shape_of(a, limits);
  Solve v{};
  v.a = a;
  v.s = Spectrum{static_cast<int>(a.height), static_cast<int>(a.width)};
  v.quads = (a.batch + 3) / 4;
  v.tasks = a.channels * v.quads;
  v.control = reinterpret_cast<Control*>(scratch);
  v.running = reinterpret_cast<int*>(scratch + shape.running);
  v.totals = reinterpret_cast<double*>(scratch + shape.totals);
  v.sums = reinterpret_cast<double*>(scratch + shape.sums);
  v.row_roots = scratch + shape.row_roots;
  v.column_roots = scratch + shape.column_roots;
  v.u = scratch + shape.u;
  v.input = scratch + shape.input;
  v.product = scratch + shape.product;
  v.spill = scratch + shape.spill;
  v.spill_bytes = shape.map_bytes;

  cudaError_t error = cudaSuccess;
  const auto maps = [&](MapStep step, bool inverse, int64_t made) {
    if (error != cudaSuccess) return;
    const size_t shared =
        shape.spilled ? 0 : static_cast<size_t>(shape.map_bytes + shape.root_bytes);
    error = launch(shape.spilled ? maps_kernel<T, true> : maps_kernel<T, false>,
                   dim3(static_cast<unsigned>(shape.blocks)), dim3(kMapThreads), shared, stream, v,
                   step, inverse, made);
  };
  const int64_t rows = a.channels < kProductRows ? a.channels : kProductRows;
  const int64_t wide = v.quads < kProductQuads ? v.quads : kProductQuads;
  const dim3 grid(static_cast<unsigned>(v.s.frequencies()),
                  static_cast<unsigned>((v.quads + kProductQuads - 1) / kProductQuads),
                  static_cast<unsigned>((a.channels + kProductRows - 1) / kProductRows));
  const dim3 block(static_cast<unsigned>(((rows + 1) / 2 * wide + 31) / 32 * 32));
  const auto products = [&](const void* matrix, bool always) {
    if (error != cudaSuccess) return;
    error = launch(products_kernel<T>, grid, block, 0, stream, v,
                   static_cast<const Root<T>*>(matrix), always);
  };

  const int64_t elements = a.batch * a.channels * a.height * a.width;
  const int64_t wanted = (elements + kMapThreads - 1) / kMapThreads;
  const int64_t most = int64_t{8} * limits.multiprocessors;
  error = launch(begin_kernel<T>, dim3(static_cast<unsigned>(wanted < most ? wanted : most)),
                 dim3(kMapThreads), 0, stream, v);
  // The first right-hand side is zero, but where it holds the bias.
  const bool begins = a.rule.resolvent && !a.rule.adjoint;
  if (begins) maps(MapStep::start, false, 0);
  for (int64_t i = 1; i <= a.max_iter; ++i) {
    const bool inverse = begins || i > 1;
    if (inverse) products(a.rule.resolvent ? a.resolvent : a.matrix, false);
    maps(MapStep::iterate, inverse, i);
  }
  maps(MapStep::prepare, false, 0);
  products(a.matrix, true);
  maps(MapStep::finish, true, 0);
  return error;
}

template <typename T>
cudaError_t pack(const Spectrum& s, int64_t channels, bool adjoint, const void* matrix,
                 void* packed, cudaStream_t stream) {
  const int64_t elements = s.frequencies() * channels * channels;
  const int64_t wanted = (elements + kMapThreads - 1) / kMapThreads;
  return launch(pack_kernel<T>, dim3(static_cast<unsigned>(wanted < 65536 ? wanted : 65536)),
                dim3(kMapThreads), 0, stream, static_cast<const Root<T>*>(matrix), s, channels,
                adjoint, static_cast<Root<T>*>(packed));
}

}  // namespace

int64_t mon_fourier_scratch(const MonFourierArgs& a, const DeviceLimits& limits) {
  return a.batch == 0 ? 0 : shape_of(a, limits).end;
}

cudaError_t mon_fourier(const MonFourierArgs& a, void* scratch, const DeviceLimits& limits,
                        cudaStream_t stream) {
  if (a.batch == 0) {
    return mon_nothing(a.iterations, a.residual, a.rule.per_sample ? 0 : 1, stream);
  }
  char* memory = static_cast<char*>(scratch);
  return a.dtype == DType::f64 ? solve<double>(a, memory, limits, stream)
                               : solve<float>(a, memory, limits, stream);
}

cudaError_t mon_fourier_pack(DType dtype, int64_t channels, int64_t height, int64_t width,
                             bool adjoint, const void* matrix, void* packed, cudaStream_t stream) {
  if (channels == 0) return cudaSuccess;
  const Spectrum s{static_cast<int>(height), static_cast<int>(width)};
  return dtype == DType::f64 ? pack<double>(s, channels, adjoint, matrix, packed, stream)
                             : pack<float>(s, channels, adjoint, matrix, packed, stream);
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
