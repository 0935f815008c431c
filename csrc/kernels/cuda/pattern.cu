#include "kernels/cuda/pattern.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void apply_mask_kernel(const T* values, const uint8_t* mask, T* out, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    out[i] = mask[i] != 0 ? values[i] : T(0);
  }
}

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarps = kThreads / 32;
constexpr int kPerThread = 8;
constexpr int64_t kChunk = int64_t{kThreads} * kPerThread;  // bounds that one block sums up

__device__ int lane() { return static_cast<int>(threadIdx.x % 32); }

// Calls f(position in the block, whether the mask is set) for a forward segment: whole warps.
template <typename F>
__device__ void for_each_column(const PackArgs& a, int64_t segment, const F& f) {
  const PatternView& p = a.forward;
  const int64_t b = segment / p.rows, row = segment - b * p.rows;
  const int64_t cols = p.depth_of(b) * p.taps;
  const uint8_t* mask = a.mask + row * p.cols() + b * p.block_cols();
  for (int64_t first = 0; first < cols; first += 32) {
    const int64_t i = first + lane();
    f(i, i < cols && mask[i] != 0);
  }
}

// Calls f(position in the block) for the entries of a transposed segment, in order: one thread.
// Neighbouring threads read neighbouring channels.
template <typename F>
__device__ void for_each_transposed(const PackArgs& a, int64_t segment, const F& f) {
  const PatternView& t = a.transposed;
  const int64_t b = segment / t.rows, row = segment - b * t.rows;
  const int64_t per_group = t.rows / t.groups, group = row / per_group;
  const int64_t first_out = group * t.depth + b * t.block_depth;
  const uint8_t* mask = a.mask + first_out * a.forward.cols() + (row - group * per_group) * t.taps;
  for (int64_t k = 0; k < t.depth_of(b); ++k, mask += a.forward.cols()) {
    for (int64_t tap = 0; tap < t.taps; ++tap) {
      if (mask[tap] != 0) f(k * t.taps + tap);
    }
  }
}

// Items: the forward segments, a warp each, then the transposed ones, a thread each.
template <typename F, typename G>
__device__ void for_each_segment(const PackArgs& a, const F& forward, const G& transposed) {
  const int64_t n = a.forward.blocks() * a.forward.rows;
  const int64_t n_t = a.transposed.blocks() * a.transposed.rows;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
       i < n + (n_t + 31) / 32; i += step) {
    if (i < n) {
      forward(i);
    } else {
      const int64_t segment = (i - n) * 32 + lane();
      if (segment < n_t) transposed(segment);
    }
  }
}

__global__ void count_kernel(PackArgs a) {
  for_each_segment(
      a,
      [&](int64_t segment) {
        int64_t found = 0;
        for_each_column(a, segment,
                        [&](int64_t, bool set) { found += __popc(__ballot_sync(kAll, set)); });
        if (lane() == 0) a.row_ptr[segment + 1] = found;
      },
      [&](int64_t segment) {
        int64_t found = 0;
        for_each_transposed(a, segment, [&](int64_t) { ++found; });
        a.transposed_row_ptr[segment + 1] = found;
      });
}

__global__ void write_kernel(PackArgs a) {
  for_each_segment(
      a,
      [&](int64_t segment) {
        int64_t at = a.row_ptr[segment];
        for_each_column(a, segment, [&](int64_t i, bool set) {
          const unsigned mask = __ballot_sync(kAll, set);
          if (set) {
            a.offset[at + __popc(mask & ((1u << lane()) - 1))] = static_cast<int16_t>(i);
          }
          at += __popc(mask);
        });
      },
      [&](int64_t segment) {
        int64_t at = a.transposed_row_ptr[segment];
        for_each_transposed(
            a, segment, [&](int64_t i) { a.transposed_offset[at++] = static_cast<int16_t>(i); });
      });
}

// The sum of the values of the threads before this one, and of all.
__device__ int64_t sum_before(int64_t value, int64_t* total) {
  int64_t* warp_sums = shared_memory<int64_t>();
  int64_t sum = value;
  for (int i = 1; i < 32; i *= 2) {
    const int64_t other = __shfl_up_sync(kAll, sum, i);
    if (lane() >= i) sum += other;
  }
  __syncthreads();
  if (lane() == 31) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  int64_t before = sum - value;
  *total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < static_cast<int>(threadIdx.x / 32)) before += warp_sums[w];
    *total += warp_sums[w];
  }
  return before;
}

struct Bounds {
  int64_t* values;  // values[1 .. n]: counts, to be summed up
  int64_t n;
  int64_t* chunks;  // the sum of each chunk, then of all before it
};
struct BothBounds {
  Bounds of[2];
};

__global__ void sum_chunks_kernel(BothBounds both) {
  const Bounds& b = both.of[blockIdx.y];
  const int64_t first = blockIdx.x * kChunk;
  if (first >= b.n) return;
  int64_t sum = 0, total = 0;
  for (int64_t i = first + threadIdx.x; i < b.n && i < first + kChunk; i += kThreads) {
    sum += b.values[i + 1];
  }
  sum_before(sum, &total);
  if (threadIdx.x == 0) b.chunks[blockIdx.x] = total;
}

__global__ void sum_before_chunks_kernel(BothBounds both) {
  const Bounds& b = both.of[blockIdx.y];
  const int64_t chunks = (b.n + kChunk - 1) / kChunk;
  int64_t carry = 0;
  for (int64_t first = 0; first < chunks; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    int64_t total = 0;
    const int64_t before = sum_before(i < chunks ? b.chunks[i] : 0, &total);
    if (i < chunks) b.chunks[i] = carry + before;
    carry += total;
  }
  if (threadIdx.x == 0) b.values[0] = 0;
}

__global__ void write_bounds_kernel(BothBounds both) {
  const Bounds& b = both.of[blockIdx.y];
  const int64_t first = blockIdx.x * kChunk;
  if (first >= b.n) return;
  const int64_t begin = first + threadIdx.x * kPerThread;
  int64_t count[kPerThread], sum = 0, total = 0;
  for (int i = 0; i < kPerThread; ++i) {
    count[i] = begin + i < b.n ? b.values[begin + i + 1] : 0;
    sum += count[i];
  }
  int64_t at = b.chunks[blockIdx.x] + sum_before(sum, &total);
  for (int i = 0; i < kPerThread; ++i) {
    at += count[i];
    if (begin + i < b.n) b.values[begin + i + 1] = at;
  }
}

unsigned capped(int64_t blocks, const DeviceLimits& limits) {
  const int64_t most = int64_t{16} * limits.multiprocessors;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

unsigned segment_blocks(const PackArgs& a, const DeviceLimits& limits) {
  const int64_t n = a.forward.blocks() * a.forward.rows;
  const int64_t n_t = a.transposed.blocks() * a.transposed.rows;
  return capped((n + (n_t + 31) / 32 + kWarps - 1) / kWarps, limits);
}

int64_t chunks_of(const PatternView& p) { return (p.blocks() * p.rows + kChunk - 1) / kChunk; }

template <typename T>
__global__ void keep_kernel(PatternView p, T* grad, uint32_t* fault) {
  const int64_t words_at_most = (p.block_cols() + 31) / 32;
  uint32_t* bits = shared_memory<uint32_t>() + (threadIdx.x / 32) * words_at_most;
  const int64_t segments = p.blocks() * p.rows;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t s = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; s < segments;
       s += step) {
    const int64_t b = s / p.rows, row = s - b * p.rows, cols = p.depth_of(b) * p.taps;
    int64_t begin = p.row_ptr[s], end = p.row_ptr[s + 1];
    if (begin < 0 || end < begin || end > p.nnz || (s == 0 && begin != 0) ||
        (s == segments - 1 && end != p.nnz)) {
      if (lane() == 0) report(fault, kBadRowPtr);
      begin = end = 0;
    }
    for (int64_t w = lane(); w < (cols + 31) / 32; w += 32) bits[w] = 0;
    __syncwarp();
    for (int64_t e = begin + lane(); e < end; e += 32) {
      const int offset = p.offset[e];
      if (offset < 0 || offset >= cols) {
        report(fault, kBadOffset);
      } else {
        atomicOr(bits + offset / 32, 1u << (offset % 32));
      }
    }
    __syncwarp();
    T* to = grad + row * p.cols() + b * p.block_cols();
    for (int64_t i = lane(); i < cols; i += 32) {
      if ((bits[i / 32] >> (i % 32) & 1u) == 0) to[i] = T(0);
    }
    __syncwarp();
  }
}

}  // namespace

int64_t pack_scratch(const PatternView& forward, const PatternView& transposed) {
  return chunks_of(forward) + chunks_of(transposed);
}

cudaError_t count_entries(const PackArgs& a, const DeviceLimits& limits, cudaStream_t stream) {
  cudaError_t error =
      launch(count_kernel, dim3(segment_blocks(a, limits)), dim3(kThreads), 0, stream, a);
  if (error != cudaSuccess) return error;
  const int64_t n = a.forward.blocks() * a.forward.rows;
  const int64_t n_t = a.transposed.blocks() * a.transposed.rows;
  const int64_t chunks = chunks_of(a.forward), chunks_t = chunks_of(a.transposed);
  const BothBounds both{
      {{a.row_ptr, n, a.scratch}, {a.transposed_row_ptr, n_t, a.scratch + chunks}}};
  const int64_t most = chunks > chunks_t ? chunks : chunks_t;
  if (most > 2147483647) return cudaErrorInvalidValue;
  const size_t shared = kWarps * sizeof(int64_t);
  const dim3 grid(static_cast<unsigned>(most < 1 ? 1 : most), 2);
  error = launch(sum_chunks_kernel, grid, dim3(kThreads), shared, stream, both);
  if (error != cudaSuccess) return error;
  error = launch(sum_before_chunks_kernel, dim3(1, 2), dim3(kThreads), shared, stream, both);
  if (error != cudaSuccess) return error;
  return launch(write_bounds_kernel, grid, dim3(kThreads), shared, stream, both);
}

cudaError_t write_entries(const PackArgs& a, const DeviceLimits& limits, cudaStream_t stream) {
  return launch(write_kernel, dim3(segment_blocks(a, limits)), dim3(kThreads), 0, stream, a);
}

cudaError_t read_value(const int64_t* from, int64_t* to, cudaStream_t stream) {
#if defined(FASTPRUNE_EMULATED)
  static_cast<void>(stream);
  *to = *from;
  return cudaSuccess;
#else
  const cudaError_t error =
      cudaMemcpyAsync(to, from, sizeof(int64_t), cudaMemcpyDeviceToHost, stream);
  return error == cudaSuccess ? cudaStreamSynchronize(stream) : error;
#endif
}

cudaError_t keep_pattern(const PatternView& p, DType dtype, void* grad, uint32_t* fault,
                         const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t segments = p.blocks() * p.rows;
  if (segments == 0) return cudaSuccess;
  const dim3 grid(capped((segments + kWarps - 1) / kWarps, limits));
  const size_t shared = static_cast<size_t>((p.block_cols() + 31) / 32) * 4 * kWarps;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return launch(keep_kernel<T>, grid, dim3(kThreads), shared, stream, p, static_cast<T*>(grad),
                  fault);
  };
  if (dtype == DType::f64) return run(uint64_t{0});
  return dtype == DType::f32 ? run(uint32_t{0}) : run(uint16_t{0});
}

cudaError_t apply_mask(DType dtype, const void* values, const uint8_t* mask, void* out, int64_t n,
                       const DeviceLimits& limits, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t wanted = (n + kThreads - 1) / kThreads, most = int64_t{16} * limits.multiprocessors;
  const dim3 grid(static_cast<unsigned>(wanted < most ? wanted : most));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return launch(apply_mask_kernel<T>, grid, dim3(kThreads), 0, stream,
                  static_cast<const T*>(values), mask, static_cast<T*>(out), n);
  };
  if (dtype == DType::f64) return run(uint64_t{0});
  return dtype == DType::f32 ? run(uint32_t{0}) : run(uint16_t{0});
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
