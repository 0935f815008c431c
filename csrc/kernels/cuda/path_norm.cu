#include "kernels/cuda/path_norm.h"

#include "kernels/cuda/path_norm_steps.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kSettleThreads = 512;
constexpr int kWordsPerPack = 4;  // of a warp: loads in flight
constexpr int kStepsPerKeep = 8;  // parameters of a kernel: 4 KB at most

__device__ __forceinline__ int64_t my_warp() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
}
__device__ __forceinline__ int64_t all_warps() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x / 32;
}

__global__ void pack_kernel(const uint8_t* bytes, ReachMap to) {
  const int64_t words = words_of(to.bits), all = words_in(to);
  const int me = static_cast<int>(threadIdx.x & 31u);
  for (int64_t first = my_warp() * kWordsPerPack; first < all;
       first += all_warps() * kWordsPerPack) {
    bool low[kWordsPerPack], high[kWordsPerPack];
#pragma unroll
    for (int k = 0; k < kWordsPerPack; ++k) {
      const Divided place = divide(first + k, words);
      const int64_t i = 64 * place.rest + me;
      const uint8_t* row = bytes + place.quotient * to.bits;
      low[k] = first + k < all && i < to.bits && row[i] != 0;
      high[k] = first + k < all && i + 32 < to.bits && row[i + 32] != 0;
    }
#pragma unroll
    for (int k = 0; k < kWordsPerPack; ++k) {
      const uint64_t below = __ballot_sync(kAllLanes, low[k]);
      const uint64_t above = __ballot_sync(kAllLanes, high[k]);
      if (me == 0 && first + k < all) to.words[first + k] = above << 32 | below;
    }
  }
}

__global__ void unpack_kernel(ReachMap from, uint8_t* bytes) {
  const int64_t words = words_of(from.bits), all = words_in(from);
  const int me = static_cast<int>(threadIdx.x & 31u);
  for (int64_t at = my_warp(); at < all; at += all_warps()) {
    const Divided place = divide(at, words);
    const uint64_t word = from.words[at];
    const int64_t i = 64 * place.rest + me;
    uint8_t* row = bytes + place.quotient * from.bits;
    if (i < from.bits) row[i] = static_cast<uint8_t>(word >> me & 1u);
    if (i + 32 < from.bits) row[i + 32] = static_cast<uint8_t>(word >> (me + 32) & 1u);
  }
}

__global__ void count_kernel(ReachMap from, unsigned long long* count) {
  const int64_t all = words_in(from);
  unsigned long long mine = 0;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < all;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    mine += static_cast<unsigned>(__popcll(from.words[at]));
  }
  for (int apart = 16; apart > 0; apart /= 2) mine += __shfl_xor_sync(kAllLanes, mine, apart);
  if ((threadIdx.x & 31u) == 0 && mine != 0) atomicAdd(count, mine);
}

// A thread per word of either side of a tap. Positions are counted on, not divided anew.
__global__ void covers_kernel(const __grid_constant__ ReachGeometry g, ReachCovers covers) {
  const int64_t small_words = words_of(g.small_bits()), large_words = words_of(g.large_bits());
  const int64_t per_tap = small_words + large_words, all = g.taps() * per_tap;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; n < all;
       n += static_cast<int64_t>(gridDim.x) * kThreads) {
    const Divided place = divide(n, per_tap);
    const int64_t t = place.quotient;
    const bool large = place.rest >= small_words;
    const int64_t w = large ? place.rest - small_words : place.rest;
    const int64_t size[3] = {large ? g.large[0] : g.small[0], large ? g.large[1] : g.small[1],
                             large ? g.large[2] : g.small[2]};
    int64_t start[3], at[3];
    tap_start(g, t, start);
    unravel(64 * w, size, at);
    uint64_t bits = 0;
    for (int b = 0; b < 64 && at[0] < size[0]; ++b) {
      bool joined = true;
      for (int i = 0; i < 3; ++i) {
        const int64_t from = at[i] - start[i], to = at[i] * g.stride[i] + start[i];
        joined = joined &&
                 (large ? from >= 0 && from % g.stride[i] == 0 && from / g.stride[i] < g.small[i]
                        : to >= 0 && to < g.large[i]);
      }
      if (joined) bits |= uint64_t{1} << b;
      if (++at[2] < size[2]) continue;
      at[2] = 0;
      if (++at[1] < size[1]) continue;
      at[1] = 0;
      ++at[0];
    }
    (large ? covers.large + t * large_words : covers.small + t * small_words)[w] = bits;
    gain((large ? covers.all_large : covers.all_small) + w, bits);
    if (bits != 0) gain(covers.some + t / 64, uint64_t{1} << t % 64);
  }
}

// Five blocks to a multiprocessor: left to itself, the compiler wants six on some GPUs, and spills.
__global__ void __launch_bounds__(kThreads, 5)
    step_kernel(const __grid_constant__ ReachStep step, int64_t slices) {
  const int64_t all = units_of(step) * slices;
  for (int64_t n = my_warp(); n < all; n += all_warps()) {
    const Divided at = divide(n, slices);
    run_unit(step, at.quotient, Slice{at.rest, slices});
  }
}

struct StepBatch {
  ReachStep steps[kStepsPerKeep];
};

__global__ void keep_kernel(const __grid_constant__ StepBatch batch, ReachStep* to, int n) {
  if (static_cast<int>(threadIdx.x) < n) to[threadIdx.x] = batch.steps[threadIdx.x];
}

__global__ void __launch_bounds__(kSettleThreads) settle_kernel(const ReachStep* steps, int64_t n) {
  __shared__ unsigned changed;
  do {
    __syncthreads();  // all have read it
    if (threadIdx.x == 0) changed = 0;
    __syncthreads();
    for (int64_t k = 0; k < n; ++k) {
      bool gained = false;
      const int64_t units = units_of(steps[k]);
      for (int64_t unit = my_warp(); unit < units; unit += all_warps()) {
        gained = run_unit(steps[k], unit, Slice{0, 1}) || gained;
      }
      if (gained) atomicOr(&changed, 1u);
      __syncthreads();
    }
  } while (changed != 0);
}

// Blocks for so many items, `per_block` to a block; kernels take the rest in turns.
dim3 blocks(int64_t items, int64_t per_block, const DeviceLimits& limits) {
  const int64_t wanted = (items + per_block - 1) / per_block;
  const int64_t most = int64_t{16} * limits.multiprocessors;
  return dim3(static_cast<unsigned>(wanted < most ? wanted : most));
}

}  // namespace

int64_t ReachCovers::words(const ReachGeometry& g) {
  return (g.taps() + 1) * (words_of(g.small_bits()) + words_of(g.large_bits())) +
         words_of(g.taps());
}

ReachCovers ReachCovers::at(uint64_t* words, const ReachGeometry& g) {
  const int64_t small = words_of(g.small_bits()), large = words_of(g.large_bits());
  ReachCovers c{};
  c.small = words;
  c.large = c.small + g.taps() * small;
  c.all_small = c.large + g.taps() * large;
  c.all_large = c.all_small + small;
  c.some = c.all_large + large;
  return c;
}

cudaError_t reach_pack(const uint8_t* bytes, const ReachMap& to, const DeviceLimits& limits,
                       cudaStream_t stream) {
  const int64_t all = words_in(to);
  if (all == 0) return cudaSuccess;
  return launch(pack_kernel, blocks(all, kWarps * kWordsPerPack, limits), dim3(kThreads), 0, stream,
                bytes, to);
}

cudaError_t reach_unpack(const ReachMap& from, uint8_t* bytes, const DeviceLimits& limits,
                         cudaStream_t stream) {
  const int64_t all = words_in(from);
  if (all == 0) return cudaSuccess;
  return launch(unpack_kernel, blocks(all, kWarps, limits), dim3(kThreads), 0, stream, from, bytes);
}

cudaError_t reach_count(const ReachMap& from, int64_t* count, const DeviceLimits& limits,
                        cudaStream_t stream) {
  const int64_t all = words_in(from);
  if (all == 0) return cudaSuccess;
  return launch(count_kernel, blocks(all, kThreads, limits), dim3(kThreads), 0, stream, from,
                reinterpret_cast<unsigned long long*>(count));
}

cudaError_t reach_covers(const ReachGeometry& g, const ReachCovers& covers,
                         const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t all = g.taps() * (words_of(g.small_bits()) + words_of(g.large_bits()));
  return launch(covers_kernel, blocks(all, kThreads, limits), dim3(kThreads), 0, stream, g, covers);
}

cudaError_t reach_step(const ReachStep& step, const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t units = units_of(step);
  if (units == 0) return cudaSuccess;
  // Few units: their items are cut, until there are warps enough to hide the memory's latency, but
  // not below four items, as every slice finds anew what the first items bring.
  const int64_t items = (items_of(step) + 3) / 4;
  const int64_t wanted = (int64_t{32} * limits.multiprocessors + units - 1) / units;
  const int64_t slices = wanted < items ? wanted : (items > 1 ? items : 1);
  return launch(step_kernel, blocks(units * slices, kWarps, limits), dim3(kThreads), 0, stream,
                step, slices);
}

cudaError_t reach_settle(const ReachStep* steps, int64_t n, ReachStep* on_device,
                         cudaStream_t stream) {
  // As parameters of kernels, not a copy from the host's memory: a graph would read that again.
  for (int64_t first = 0; first < n; first += kStepsPerKeep) {
    const int count = static_cast<int>(n - first < kStepsPerKeep ? n - first : kStepsPerKeep);
    StepBatch batch{};
    for (int k = 0; k < count; ++k) batch.steps[k] = steps[first + k];
    const cudaError_t error = launch(keep_kernel, dim3(1), dim3(kStepsPerKeep), 0, stream, batch,
                                     on_device + first, count);
    if (error != cudaSuccess) return error;
  }
  return n == 0 ? cudaSuccess
                : launch(settle_kernel, dim3(1), dim3(kSettleThreads), 0, stream, on_device, n);
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
