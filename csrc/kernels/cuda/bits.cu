#include "kernels/cuda/bits.h"

#include "kernels/cuda/exact.cuh"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

unsigned blocks_for(int64_t items, int64_t per_block, const DeviceLimits& limits) {
  const int64_t wanted = (items + per_block - 1) / per_block;
  const int64_t most = int64_t{16} * limits.multiprocessors;
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

__global__ void pattern_bits_kernel(RawPattern p, int64_t blocks, int64_t row_words,
                                    uint32_t* words, unsigned long long* verdict) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t places = blocks * p.rows, step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t place = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; place < places;
       place += step) {
    const int64_t begin = p.row_ptr[place], end = p.row_ptr[place + 1];
    const bool good = begin >= 0 && begin <= end && end <= p.nnz && (place > 0 || begin == 0) &&
                      (place + 1 < places || end == p.nnz);
    if (!good) {
      if (lane == 0) atomicOr(&verdict[0], static_cast<unsigned long long>(kBoundsFault));
      continue;
    }
    const int64_t first = place / p.rows * p.block_depth, row = place % p.rows;
    const int64_t left = p.cols - first;
    const int64_t width = left < p.block_depth ? left : p.block_depth;
    for (int64_t i = begin + lane; i < end; i += 32) {
      const int64_t offset = p.offset[i];
      if (offset < 0 || offset >= width) {
        atomicOr(&verdict[0], static_cast<unsigned long long>(kOffsetFault));
        continue;
      }
      const int64_t col = first + offset;
      const uint32_t bit = 1u << (col % 32);
      if ((atomicOr(&words[row * row_words + col / 32], bit) & bit) != 0) {  // twice
        atomicOr(&verdict[0], static_cast<unsigned long long>(kOffsetFault));
      }
    }
  }
}

__global__ void count_bits_kernel(const uint32_t* words, int64_t n, unsigned long long* count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  unsigned long long mine = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    mine += static_cast<unsigned>(__popc(words[i]));
  }
  for (int o = 16; o > 0; o /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, o);
  if (threadIdx.x % 32 == 0 && mine != 0) atomicAdd(count, mine);
}

__global__ void report_pattern_kernel(const unsigned long long* verdict, uint32_t* fault) {
  if ((verdict[0] & kBoundsFault) != 0) {
    report(fault, kBadRowPtr);
  } else if (verdict[0] != kGoodPattern) {
    report(fault, kBadOffset);
  }
}

// A warp per square of 32 bits.
__global__ void transpose_bits_kernel(const uint32_t* from, int64_t rows, int64_t cols,
                                      uint32_t* to) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t row_words = (cols + 31) / 32, to_words = (rows + 31) / 32;
  const int64_t square = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (square >= to_words * row_words) return;
  const int64_t r = square / row_words * 32, c = square % row_words * 32;
  const uint32_t mine = r + lane < rows ? from[(r + lane) * row_words + c / 32] : 0;
  uint32_t out = 0;
  for (int i = 0; i < 32; ++i) {
    const uint32_t column = __ballot_sync(0xffffffffu, static_cast<int>(mine >> i & 1u));
    if (i == lane) out = column;
  }
  if (c + lane < cols) to[(c + lane) * to_words + r / 32] = out;
}

// What a thread moves at once, where rows are aligned to it; else an element.
template <typename T, bool kWide>
struct alignas(kWide ? 16 : sizeof(T)) Piece {
  static constexpr int kCount = kWide ? 16 / static_cast<int>(sizeof(T)) : 1;
  T at[kCount];
};

template <typename T>
bool rows_aligned(const void* base, int64_t cols) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 &&
         cols % (16 / static_cast<int64_t>(sizeof(T))) == 0;
}

template <typename T, bool kWide>
__global__ void keep_masked_kernel(const uint32_t* words, int64_t row_words, int64_t rows,
                                   int64_t cols, const T* in, T* out) {
  using P = Piece<T, kWide>;
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    for (int64_t c = P::kCount * threadIdx.x; c < cols; c += P::kCount * kThreads) {
      const uint32_t bits = words[r * row_words + c / 32] >> (c % 32);
      P piece = *reinterpret_cast<const P*>(in + r * cols + c);
      for (int i = 0; i < P::kCount; ++i) piece.at[i] = (bits >> i & 1u) != 0 ? piece.at[i] : T(0);
      *reinterpret_cast<P*>(out + r * cols + c) = piece;
    }
  }
}

// One block. Each warp sums 32 values at a time; the carry goes round through shared memory.
__global__ void exclusive_sums_kernel(const uint32_t* from, int64_t n, int64_t* to) {
  auto* sums = shared_memory<long long>();  // kWarps
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  long long before = 0;
  for (int64_t base = 0; base < n; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    const long long mine = i < n ? from[i] : 0;
    long long sum = mine;
    for (int o = 1; o < 32; o *= 2) {
      const long long other = __shfl_up_sync(0xffffffffu, sum, o);
      if (lane >= o) sum += other;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    long long carry = before;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) carry += sums[w];
      before += sums[w];
    }
    if (i < n) to[i] = carry + sum - mine;
    __syncthreads();
  }
  if (threadIdx.x == 0) to[n] = before;
}

// A block per row.
template <typename T, bool kWide>
__global__ void find_not_finite_kernel(const T* x, int64_t rows, int64_t cols, uint32_t* flags) {
  using P = Piece<T, kWide>;
  auto* any = shared_memory<uint32_t>();  // one
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    if (threadIdx.x == 0) *any = 0;
    __syncthreads();
    uint32_t found = 0;
    for (int64_t c = P::kCount * threadIdx.x; c < cols; c += P::kCount * kThreads) {
      const P piece = *reinterpret_cast<const P*>(x + r * cols + c);
      for (int i = 0; i < P::kCount; ++i) found |= not_finite(piece.at[i]) ? 1u : 0u;
    }
    if (found != 0) atomicOr(any, 1u);
    __syncthreads();
    if (threadIdx.x == 0) flags[r] = *any;
  }
}

template <typename T>
__global__ void mend_kernel(ExactRows e, const uint32_t* flags, Finish f, T* y) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t outputs = e.transposed ? e.mask.cols : e.mask.rows;
  const T* bias = static_cast<const T*>(f.bias);
  const T* residual = static_cast<const T*>(f.residual);
  for (int64_t n = blockIdx.x; n < e.batch; n += gridDim.x) {
    const bool flagged = flags[n] != 0;
    if (!flagged && residual == nullptr && !f.relu) continue;
    for (int64_t base = int64_t{32} * warp; base < outputs; base += kThreads) {
      const int64_t o = base + lane;
      Accumulator<T> value = o < outputs ? widen(y[n * outputs + o]) : 0;
      if (flagged) {
        for (int i = 0; i < 32 && base + i < outputs; ++i) {
          const auto sum = exact_element<T>(e, n, base + i);
          if (i == lane) value = bias == nullptr ? sum : sum + widen(bias[o]);
        }
      }
      if (o < outputs) {
        finish(value, y + n * outputs + o,
               residual == nullptr ? nullptr : residual + n * outputs + o, f.relu);
      }
    }
  }
}

// f(a value of the dtype's type).
template <typename F>
cudaError_t with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(0.0f);
    case DType::f64:
      return f(0.0);
    case DType::bf16:
      return f(BFloat16{});
    default:
      return f(Float16{});
  }
}

}  // namespace

cudaError_t pattern_bits(const RawPattern& p, uint32_t* words, unsigned long long* verdict,
                         const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t blocks = p.cols == 0 ? 0 : (p.cols + p.block_depth - 1) / p.block_depth;
  const int64_t row_words = (p.cols + 31) / 32, n = p.rows * row_words;
  cudaError_t error = cudaMemsetAsync(verdict, 0, 16, stream);
  if (error != cudaSuccess || n == 0) return error;
  error = cudaMemsetAsync(words, 0, static_cast<size_t>(n) * 4, stream);
  if (error != cudaSuccess) return error;
  error = launch(pattern_bits_kernel, dim3(blocks_for(blocks * p.rows, kWarps, limits)),
                 dim3(kThreads), 0, stream, p, blocks, row_words, words, verdict);
  if (error != cudaSuccess) return error;
  return launch(count_bits_kernel, dim3(blocks_for(n, kThreads, limits)), dim3(kThreads), 0, stream,
                words, n, verdict + 1);
}

cudaError_t report_pattern(const unsigned long long* verdict, uint32_t* fault,
                           cudaStream_t stream) {
  return launch(report_pattern_kernel, dim3(1), dim3(1), 0, stream, verdict, fault);
}

cudaError_t transpose_bits(const BitMatrix& from, uint32_t* to, cudaStream_t stream) {
  const int64_t squares = from.row_words() * ((from.rows + 31) / 32);
  if (squares == 0) return cudaSuccess;
  return launch(transpose_bits_kernel, dim3(static_cast<unsigned>((squares + kWarps - 1) / kWarps)),
                dim3(kThreads), 0, stream, from.words, from.rows, from.cols, to);
}

cudaError_t keep_masked(const BitMatrix& mask, DType dtype, const void* in, void* out,
                        const DeviceLimits& limits, cudaStream_t stream) {
  if (mask.rows == 0 || mask.cols == 0) return cudaSuccess;
  const dim3 grid(blocks_for(mask.rows, 1, limits));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const bool wide = rows_aligned<T>(in, mask.cols) && rows_aligned<T>(out, mask.cols);
    return launch(wide ? keep_masked_kernel<T, true> : keep_masked_kernel<T, false>, grid,
                  dim3(kThreads), 0, stream, mask.words, mask.row_words(), mask.rows, mask.cols,
                  static_cast<const T*>(in), static_cast<T*>(out));
  };
  if (dtype == DType::f64) return run(uint64_t{0});
  return dtype == DType::f32 ? run(uint32_t{0}) : run(uint16_t{0});
}

cudaError_t exclusive_sums(const uint32_t* from, int64_t n, int64_t* to, cudaStream_t stream) {
  return launch(exclusive_sums_kernel, dim3(1), dim3(kThreads), kWarps * sizeof(long long), stream,
                from, n, to);
}

cudaError_t find_not_finite(DType dtype, const void* x, int64_t rows, int64_t cols, uint32_t* flags,
                            const DeviceLimits& limits, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(rows_aligned<T>(x, cols) ? find_not_finite_kernel<T, true>
                                           : find_not_finite_kernel<T, false>,
                  dim3(blocks_for(rows, 1, limits)), dim3(kThreads), sizeof(uint32_t), stream,
                  static_cast<const T*>(x), rows, cols, flags);
  });
}

cudaError_t mend_product(const ExactRows& exact, const uint32_t* flags, const Finish& finish,
                         void* y, const DeviceLimits& limits, cudaStream_t stream) {
  if (exact.batch == 0 || exact.outputs() == 0) return cudaSuccess;
  return with_type(exact.dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(mend_kernel<T>, dim3(blocks_for(exact.batch, 1, limits)), dim3(kThreads), 0,
                  stream, exact, flags, finish, static_cast<T*>(y));
  });
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
