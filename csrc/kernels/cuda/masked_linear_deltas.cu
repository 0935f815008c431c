#include "kernels/cuda/masked_linear_deltas.h"

#include "kernels/cuda/elements.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 256;
constexpr int kProductThreads = 1024;
constexpr int64_t kSegmentWords = kSegmentCols / 32;
constexpr int64_t kRowsPerBlock = 64;  // on average, at most: their sums stay in shared memory

// A segment's codes from its words of bits; counts only where `codes` is null. Returns units.
__host__ __device__ inline int64_t encode_segment(const uint32_t* words, int64_t n,
                                                  uint8_t* codes) {
  int64_t entries = 0;
  int last = -1;
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t word = words[j];
    for (int b = 0; b < 32; ++b) {
      if ((word >> b & 1u) == 0) continue;
      int gap = static_cast<int>(32 * j) + b - last;
      last += gap;
      for (; gap > 255; gap -= 255, ++entries) {
        if (codes != nullptr) codes[entries] = 0;
      }
      if (codes != nullptr) codes[entries] = static_cast<uint8_t>(gap);
      ++entries;
    }
  }
  const int64_t units = (entries + kUnit - 1) / kUnit;
  for (; codes != nullptr && entries < units * kUnit; ++entries) codes[entries] = 0;
  return units;
}

struct SegmentWords {
  const uint32_t* words;
  int64_t n;
};
__device__ inline SegmentWords words_of(const BitMatrix& m, int64_t segments, int64_t i) {
  const int64_t row_words = (m.cols + 31) / 32, first = i % segments * kSegmentWords;
  const int64_t left = row_words - first;
  return {m.words + i / segments * row_words + first, left < kSegmentWords ? left : kSegmentWords};
}

__global__ void count_kernel(BitMatrix mask, int64_t segments, uint32_t* counts) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= mask.rows * segments) return;
  const SegmentWords s = words_of(mask, segments, i);
  counts[i] = static_cast<uint32_t>(encode_segment(s.words, s.n, nullptr));
}

__global__ void codes_kernel(BitMatrix mask, int64_t segments, const int64_t* segment,
                             uint8_t* codes) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= mask.rows * segments) return;
  const SegmentWords s = words_of(mask, segments, i);
  encode_segment(s.words, s.n, codes + segment[i] * kUnit);
}

// Half of a group's work are its units, half its rows: no group has more than twice its share of
// either.
__global__ void bounds_kernel(const int64_t* segment, int64_t segments, int64_t rows,
                              int64_t groups, int32_t* bound) {
  const int64_t g = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (g > groups) return;
  const double total = static_cast<double>(segment[rows * segments]);
  const double wanted = 2 * static_cast<double>(g) / static_cast<double>(groups);
  int64_t low = 0, high = rows;  // the first row with as much before it
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const double share = static_cast<double>(middle) / static_cast<double>(rows);
    const double before =
        share + (total == 0 ? share : static_cast<double>(segment[middle * segments]) / total);
    if (before < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  bound[g] = static_cast<int32_t>(g == groups ? rows : low);
}

// Where a lane's unit begins, and where the warp's 32 units end. All lanes call it; `column` is
// where the units before ended.
struct UnitStart {
  int column, end;
};
__device__ __forceinline__ UnitStart unit_start(uint2 codes, int column) {
  int advance = 0;
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    const int code = static_cast<int>((j < 4 ? codes.x : codes.y) >> (8 * (j % 4)) & 255u);
    advance += code == 0 ? 255 : code;
  }
  int sum = advance;
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const int other = __shfl_up_sync(kAll, sum, static_cast<unsigned>(o));
    if (static_cast<int>(threadIdx.x % 32) >= o) sum += other;
  }
  return {column + sum - advance, column + __shfl_sync(kAll, sum, 31)};
}

// Calls entry(j, column) for the entries of a unit.
template <typename F>
__device__ __forceinline__ void for_entries(uint2 codes, int column, const F& entry) {
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    const int code = static_cast<int>((j < 4 ? codes.x : codes.y) >> (8 * (j % 4)) & 255u);
    column += code == 0 ? 255 : code;
    if (code != 0) entry(j, column);
  }
}

template <typename T>
struct alignas(16) UnitValues {
  T at[kUnit];
};
template <typename T>
__device__ __forceinline__ UnitValues<T> load_unit(const void* values, int64_t unit) {
  UnitValues<T> v;
  const uint4* from = reinterpret_cast<const uint4*>(static_cast<const T*>(values) + unit * kUnit);
  uint4* to = reinterpret_cast<uint4*>(&v);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof v / 16); ++i) to[i] = __ldg(from + i);
  return v;
}
__device__ __forceinline__ uint2 load_codes(const uint8_t* codes, int64_t unit) {
  return __ldg(reinterpret_cast<const uint2*>(codes) + unit);
}

// A warp per segment.
template <typename T>
__global__ void values_kernel(DeltasView w, const T* weight, int64_t row_stride, int64_t col_stride,
                              T* values) {
  const int64_t segments = (w.cols + kSegmentCols - 1) / kSegmentCols;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  for (int64_t s = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
       s < w.rows * segments; s += step) {
    const T* row = weight + s / segments * row_stride;
    const int64_t first = s % segments * kSegmentCols, end = w.segment[s + 1];
    int column = -1;
    for (int64_t base = w.segment[s]; base < end; base += 32) {
      const int64_t unit = base + threadIdx.x % 32;
      const uint2 codes = unit < end ? load_codes(w.codes, unit) : make_uint2(0, 0);
      const UnitStart at = unit_start(codes, column);
      column = at.end;
      UnitValues<T> v{};
      for_entries(codes, at.column, [&](int j, int c) { v.at[j] = row[(first + c) * col_stride]; });
      if (unit < end) {
        uint4* to = reinterpret_cast<uint4*>(values + unit * kUnit);
        for (int i = 0; i < static_cast<int>(sizeof v / 16); ++i) {
          to[i] = reinterpret_cast<const uint4*>(&v)[i];
        }
      }
    }
  }
}

// The activations of one column.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Column {
  T at[N];
};

template <typename T, int N>
__device__ __forceinline__ void add_unit(float (&sum)[N], uint2 codes, const UnitValues<T>& values,
                                         const Column<T, N>* x, int column) {
  for_entries(codes, column, [&](int j, int c) {
    const float value = widen(values.at[j]);
    const Column<T, N> here = x[c];
#pragma unroll
    for (int n = 0; n < N; ++n) sum[n] += value * widen(here.at[n]);
  });
}

// The warp's sums of N values: lane i holds that of value i / (32 / N). Lanes 32 / N * 2^k apart
// exchange halves of what they hold. A template, so that every index is a constant.
template <int kHeld, int N>
__device__ __forceinline__ void halve_over_warp(float (&v)[N]) {
  constexpr int half = kHeld / 2, apart = 16 * kHeld / N;
  if constexpr (half > 0) {
    const bool upper = (static_cast<int>(threadIdx.x) & apart) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? v[i] : v[i + half];
      v[i] = (upper ? v[i + half] : v[i]) + __shfl_xor_sync(kAll, given, apart);
    }
    halve_over_warp<half>(v);
  }
}
template <int N>
__device__ __forceinline__ float sum_over_warp(float (&v)[N]) {
  halve_over_warp<N>(v);
#pragma unroll
  for (int apart = 16 / N; apart > 0; apart /= 2) v[0] += __shfl_xor_sync(kAll, v[0], apart);
  return v[0];
}

// A block owns a group of rows, and holds the activations of `piece` segments at a time; a warp
// takes segment after segment of the group.
template <typename T, int N>
__global__ void __launch_bounds__(kProductThreads)
    product_kernel(DeltasArgs a, int64_t batch_begin, int piece, int most_rows) {
  const DeltasView& w = a.weight;
  const int segments = static_cast<int>((w.cols + kSegmentCols - 1) / kSegmentCols);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int warps = static_cast<int>(blockDim.x / 32);
  auto* x = shared_memory<Column<T, N>>();                            // piece * kSegmentCols
  auto* part = reinterpret_cast<float*>(x + piece * kSegmentCols);    // most_rows * piece * N
  float* total = part + static_cast<int64_t>(most_rows) * piece * N;  // most_rows * N
  const int64_t row_begin = w.bound[blockIdx.x];
  const int rows = static_cast<int>(w.bound[blockIdx.x + 1] - row_begin);
  const int batch = static_cast<int>(a.batch - batch_begin < N ? a.batch - batch_begin : N);
  const T* from = static_cast<const T*>(a.x) + batch_begin * w.cols;
  for (int i = static_cast<int>(threadIdx.x); i < rows * N; i += static_cast<int>(blockDim.x)) {
    total[i] = 0;
  }
  for (int begin = 0; begin < segments; begin += piece) {
    const int here = segments - begin < piece ? segments - begin : piece;
    const int64_t first = begin * kSegmentCols, left = w.cols - first;
    const int cols = static_cast<int>(left < here * kSegmentCols ? left : here * kSegmentCols);
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.x); c < cols; c += static_cast<int>(blockDim.x)) {
      Column<T, N> column{};
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (n < batch) column.at[n] = from[n * w.cols + first + c];
      }
      x[c] = column;
    }
    __syncthreads();
    for (int task = warp; task < rows * here; task += warps) {
      const int row = task / here, s = task % here;
      const int64_t bounds = (row_begin + row) * segments + begin + s;
      const int64_t end = w.segment[bounds + 1];
      const Column<T, N>* columns = x + s * kSegmentCols;
      float sum[N] = {};
      int column = -1;
      // Two units of each lane are under way at a time.
      for (int64_t base = w.segment[bounds]; base < end; base += 64) {
        const int64_t one = base + lane, two = one + 32;
        const uint2 codes_one = one < end ? load_codes(w.codes, one) : make_uint2(0, 0);
        const uint2 codes_two = two < end ? load_codes(w.codes, two) : make_uint2(0, 0);
        UnitValues<T> values_one{}, values_two{};
        if (one < end) values_one = load_unit<T>(a.values, one);
        if (two < end) values_two = load_unit<T>(a.values, two);
        UnitStart at = unit_start(codes_one, column);
        add_unit(sum, codes_one, values_one, columns, at.column);
        if (base + 32 < end) {
          at = unit_start(codes_two, at.end);
          add_unit(sum, codes_two, values_two, columns, at.column);
        }
        column = at.end;
      }
      const float all = sum_over_warp(sum);
      if (lane % (32 / N) == 0) part[task * N + lane / (32 / N)] = all;
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < rows * N; i += static_cast<int>(blockDim.x)) {
      for (int s = 0; s < here; ++s) total[i] += part[(i / N * here + s) * N + i % N];
    }
  }
  __syncthreads();
  const T* bias = static_cast<const T*>(a.finish.bias);
  const T* residual = static_cast<const T*>(a.finish.residual);
  for (int i = static_cast<int>(threadIdx.x); i < rows * batch; i += static_cast<int>(blockDim.x)) {
    const int n = i / rows, r = i % rows;
    const int64_t row = row_begin + r, at = (batch_begin + n) * w.rows + row;
    float sum = total[r * N + n];
    if (bias != nullptr) sum += widen(bias[row]);
    finish(sum, static_cast<T*>(a.y) + at, residual == nullptr ? nullptr : residual + at,
           a.finish.relu);
  }
}

// What a block needs for N activation rows, `piece` segments of them at a time.
int64_t product_bytes(int64_t element, int64_t n, int64_t piece, int64_t most_rows) {
  return piece * kSegmentCols * n * element + most_rows * (piece + 1) * n * 4;
}

template <typename T, int N>
cudaError_t product_part(const DeltasArgs& a, int64_t batch_begin, int64_t piece,
                         cudaStream_t stream) {
  const int64_t bytes = product_bytes(sizeof(T), N, piece, a.weight.most_rows());
  return launch(product_kernel<T, N>, dim3(static_cast<unsigned>(a.weight.groups)),
                dim3(kProductThreads), static_cast<size_t>(bytes), stream, a, batch_begin,
                static_cast<int>(piece), static_cast<int>(a.weight.most_rows()));
}

template <typename T>
cudaError_t product(const DeltasArgs& a, const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t segments = a.weight.segments(), most_rows = a.weight.most_rows();
  constexpr int64_t most = sizeof(T) == 2 ? 16 : 8;
  for (int64_t begin = 0; begin < a.batch;) {
    int64_t n = 1;
    while (n < a.batch - begin && n < most) n *= 2;
    while (n > 1 && product_bytes(sizeof(T), n, 1, most_rows) > limits.shared_bytes) n /= 2;
    int64_t piece = segments;
    while (piece > 1 && product_bytes(sizeof(T), n, piece, most_rows) > limits.shared_bytes) {
      piece = piece > 64 ? piece / 2 : piece - 1;
    }
    const cudaError_t error = n == 1   ? product_part<T, 1>(a, begin, piece, stream)
                              : n == 2 ? product_part<T, 2>(a, begin, piece, stream)
                              : n == 4 ? product_part<T, 4>(a, begin, piece, stream)
                              : n == 8 ? product_part<T, 8>(a, begin, piece, stream)
                                       : product_part<T, most>(a, begin, piece, stream);
    if (error != cudaSuccess) return error;
    begin += n;
  }
  return cudaSuccess;
}

dim3 grid_for(int64_t items) {
  return dim3(static_cast<unsigned>((items + kThreads - 1) / kThreads));
}

}  // namespace

int64_t deltas_groups(int64_t rows, const DeviceLimits& limits) {
  const int64_t wave = limits.multiprocessors;
  const int64_t waves = (rows + kRowsPerBlock * wave - 1) / (kRowsPerBlock * wave);
  return waves * wave < rows ? waves * wave : rows;
}

cudaError_t deltas_count(const BitMatrix& mask, uint32_t* counts, cudaStream_t stream) {
  const int64_t segments = (mask.cols + kSegmentCols - 1) / kSegmentCols;
  return launch(count_kernel, grid_for(mask.rows * segments), dim3(kThreads), 0, stream, mask,
                segments, counts);
}

cudaError_t deltas_codes(const BitMatrix& mask, const DeltasView& view, uint8_t* codes,
                         int32_t* bound, cudaStream_t stream) {
  const cudaError_t error =
      launch(codes_kernel, grid_for(mask.rows * view.segments()), dim3(kThreads), 0, stream, mask,
             view.segments(), view.segment, codes);
  if (error != cudaSuccess) return error;
  return launch(bounds_kernel, grid_for(view.groups + 1), dim3(kThreads), 0, stream, view.segment,
                view.segments(), view.rows, view.groups, bound);
}

cudaError_t deltas_values(const DeltasView& view, DType dtype, const void* weight,
                          int64_t row_stride, int64_t col_stride, void* values,
                          const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t wanted = (view.rows * view.segments() + kThreads / 32 - 1) / (kThreads / 32);
  const int64_t most = int64_t{16} * limits.multiprocessors;
  const dim3 grid(static_cast<unsigned>(wanted < most ? wanted : most));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return launch(values_kernel<T>, grid, dim3(kThreads), 0, stream, view,
                  static_cast<const T*>(weight), row_stride, col_stride, static_cast<T*>(values));
  };
  return dtype == DType::f32 ? run(uint32_t{0}) : run(uint16_t{0});
}

cudaError_t deltas_product(const DeltasArgs& args, const DeviceLimits& limits,
                           cudaStream_t stream) {
  if (args.dtype == DType::f32) return product<float>(args, limits, stream);
  return args.dtype == DType::bf16 ? product<BFloat16>(args, limits, stream)
                                   : product<Float16>(args, limits, stream);
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
