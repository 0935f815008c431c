// Histograms of digits in shared memory, and the search for the bin that holds the k-th best.
#pragma once

#include "kernels/cuda/topk_keys.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

constexpr int kTopkDigit = 13;  // most bits of a digit
constexpr int kTopkDigitBins = 1 << kTopkDigit;
constexpr int kTopkThreads = 512;

// Bits of the digit that is counted next, `left` bits being undecided.
__host__ __device__ inline int topk_digit_bits(int left) {
  return left < kTopkDigit ? left : kTopkDigit;
}

#if defined(__CUDACC__) || defined(FASTPRUNE_EMULATED)

// Shared memory past a histogram.
template <typename T>
__device__ __forceinline__ T* after_bins() {
  return reinterpret_cast<T*>(shared_memory<uint32_t>() + kTopkDigitBins);
}

// One thread's additions to a histogram in shared memory. A massed digit (the zeros of an earlier
// mask, scores that are all equal) would have all threads wait for one address: a digit that was
// seen twice in a row is counted in a register from then on, whatever comes between.
// 32-bit counts: a block counts less than 2^32 elements unless there are over 2^40 in all.
class HeldDigit {
 public:
  // Two neighbours, before they are added.
  __device__ __forceinline__ void look_at(uint32_t* bins, uint32_t one, uint32_t next) {
    if (one != next || one == held_) return;
    flush(bins);
    held_ = one;
  }
  __device__ __forceinline__ void add(uint32_t* bins, uint32_t digit) {
    if (digit == held_) {
      ++count_;
    } else {
      atomicAdd(bins + digit, 1u);
    }
  }
  __device__ __forceinline__ void flush(uint32_t* bins) {
    if (count_ != 0) atomicAdd(bins + held_, count_);
    count_ = 0;
  }

 private:
  uint32_t held_ = ~0u, count_ = 0;
};

// All threads of a block: its counts join those of all blocks, and start from 0 again.
__device__ __forceinline__ void flush_bins(uint32_t* bins, Word* total) {
  __syncthreads();
  for (int bin = static_cast<int>(threadIdx.x); bin < kTopkDigitBins; bin += kTopkThreads) {
    const uint32_t count = bins[bin];
    if (count == 0) continue;
    atomicAdd(total + bin, static_cast<Word>(count));
    bins[bin] = 0;
  }
  __syncthreads();
}

__device__ __forceinline__ void clear_bins(uint32_t* bins) {
  for (int bin = static_cast<int>(threadIdx.x); bin < kTopkDigitBins; bin += kTopkThreads) {
    bins[bin] = 0;
  }
  __syncthreads();
}

// Whether this block is the last of the grid to come here; it then sees what the others wrote.
// shared: one word. The ticket starts at 0 and is left so.
__device__ __forceinline__ bool last_block(uint32_t* ticket, uint32_t* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (last) *ticket = 0;
    *shared = last ? 1 : 0;
  }
  __syncthreads();
  const bool last = *shared != 0;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// Leaves word of bad data in one of the two words of the status, and in the mark if there is one.
__device__ __forceinline__ void tell(Word* status, uint32_t* mark, uint64_t index, Fault fault) {
  atomicMin(status, static_cast<Word>(index));
  if (mark != nullptr) report(mark, fault);
}

// The bin of the wanted-th best of all counted, 1 <= wanted <= total: `above` are in better bins,
// `inside` in it.
struct TopkBoundary {
  uint64_t bin, above, inside, total;
};

// The sum of what threads before this one bring, and of all. shared: 17 words.
__device__ __forceinline__ uint64_t sum_before(uint64_t mine, uint64_t* shared, uint64_t* total) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int warps = static_cast<int>(blockDim.x / 32);
  uint64_t sum = mine;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const uint64_t other = __shfl_up_sync(kAllLanes, sum, static_cast<unsigned>(delta));
    if (lane >= delta) sum += other;
  }
  if (lane == 31) shared[warp] = sum;
  __syncthreads();
  uint64_t before = sum - mine, all = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp) before += shared[w];
    all += shared[w];
  }
  *total = all;
  __syncthreads();
  return before;
}

// All threads of a block of kThreads get it. Counts that other blocks added to are read past the L1
// cache. wanted = 0, or more than there are: only `total` is right. shared: 20 words.
template <int kBins, int kThreads, typename Count>
__device__ __forceinline__ TopkBoundary find_boundary(const volatile Count* bins, uint64_t wanted,
                                                      uint64_t* shared) {
  constexpr int kPerThread = kBins / kThreads;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kPerThread;
  uint64_t mine = 0;
  for (int i = 0; i < kPerThread; ++i) mine += bins[top - i];
  TopkBoundary out{};
  uint64_t above = sum_before(mine, shared, &out.total);
  if (wanted > above && wanted <= above + mine) {
    int bin = top;
    uint64_t inside = bins[bin];
    while (above + inside < wanted) {
      above += inside;
      inside = bins[--bin];
    }
    shared[17] = static_cast<uint64_t>(bin);
    shared[18] = above;
    shared[19] = inside;
  }
  __syncthreads();
  out.bin = shared[17];
  out.above = shared[18];
  out.inside = shared[19];
  __syncthreads();
  return out;
}

#endif

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
