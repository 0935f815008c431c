// Selections inside rows, norms of rows, and masks of whole rows.
#include <vector>

#include "kernels/cuda/topk_bins.h"
#include "kernels/cuda/topk_upload.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kDigit = 11;
constexpr int kBins = 1 << kDigit;
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int64_t kStep = 4 * kThreads;  // elements of a row per step of a block
constexpr int kPartials = 16;            // sums of a norm, each a lane's

struct RowPass {
  TopkKeying keying;
  const TopkSource* sources;
  uint8_t* const* masks;
  const uint64_t* cols;
  const uint64_t* counts;
  Word* status;
  uint32_t* mark;
  int64_t n_rows;
  int n_sources, key_bits;
};

__device__ __forceinline__ int source_of_row(const RowPass& p, int64_t row) {
  int low = 0, high = p.n_sources;  // the last that starts at or before the row
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.sources[middle].first_tile <= row ? low : high) = middle;
  }
  return low;
}

// A row as one block sees it.
struct Row {
  int64_t begin, end;
  bool aligned;
};

// Calls f(keys, at) for four elements of every thread at a time, all threads alike.
template <typename Key, typename F>
__device__ __forceinline__ void for_row(const RowPass& p, const TopkReading& t, const Row& row,
                                        F f) {
  for (int64_t from = row.begin; from < row.end; from += kStep) {
    const int64_t at = from + 4 * static_cast<int64_t>(threadIdx.x);
    f(load_keys<Key, 1>(p.keying, t, at, 0, row.end, row.aligned && at + 4 <= row.end), at);
  }
}

__device__ __forceinline__ void store_bytes(uint8_t* mask, const Row& row, int64_t at,
                                            uint32_t kept) {
  const uint32_t bytes = kept * 0x00204081u & 0x01010101u;  // bit j to byte j
  if (row.aligned && at + 4 <= row.end) {
    *reinterpret_cast<uint32_t*>(mask + at) = bytes;
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (at + j < row.end) mask[at + j] = static_cast<uint8_t>(bytes >> (8 * j));
  }
}

// A block to a row, read anew for each digit: rows come from the caches after the first time.
template <typename Key>
__global__ void __launch_bounds__(kThreads, 4) rows_kernel(const RowPass p) {
  constexpr int kWidth = 8 * sizeof(Key);
  uint32_t* bins = shared_memory<uint32_t>();
  uint64_t* shared = reinterpret_cast<uint64_t*>(bins + kBins);
  for (int64_t number = blockIdx.x; number < p.n_rows; number += gridDim.x) {
    const int source = source_of_row(p, number);
    const TopkReading t = reading_of(p.sources, source);
    const int64_t cols = static_cast<int64_t>(p.cols[source]);
    const int64_t r = number - t.source().first_tile;
    if (r < 0 || r * cols >= t.numel) continue;  // of a tensor that is left out
    const Row row{r * cols, (r + 1) * cols, t.aligned() && cols % 4 == 0};
    uint64_t prefix = 0, wanted = p.counts[source];
    int shift = kWidth;
    bool done = false;
    while (!done && shift > kWidth - p.key_bits) {
      const int left = shift - (kWidth - p.key_bits), bits = left < kDigit ? left : kDigit;
      const bool first = shift == kWidth;
      for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) bins[i] = 0;
      __syncthreads();
      HeldDigit held;
      uint32_t last = ~0u;
      for_row<Key>(p, t, row, [&](const TopkKeys<Key, 1>& keys, int64_t) {
        if (first && keys.nan) tell(p.status, p.mark, t.source().index, kNanScore);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Key key = keys.key[0][j];
          if ((keys.live >> j & 1u) == 0 || (!first && key >> shift != prefix)) continue;
          const uint32_t digit = static_cast<uint32_t>(key >> (shift - bits)) & ((1u << bits) - 1);
          held.look_at(bins, digit, last);
          held.add(bins, digit);
          last = digit;
        }
      });
      held.flush(bins);
      __syncthreads();
      TopkBoundary b = find_boundary<kBins, kThreads>(bins, wanted, shared);
      if (wanted > b.total) {
        if (threadIdx.x == 0) {
          tell(p.status + 1, p.mark, static_cast<uint64_t>(number), kTooFew);
        }
        wanted = b.total;
        b = find_boundary<kBins, kThreads>(bins, wanted, shared);
      }
      if (wanted == 0) {
        prefix = uint64_t{1} << 63;  // above every digit
        shift = kWidth - 1;
        break;
      }
      shift -= bits;
      prefix = prefix << bits | b.bin;
      wanted -= b.above;
      done = wanted == b.inside;
    }
    // What is left are ties: the first `wanted` of them, in order.
    uint64_t before = 0;
    const bool ties = !done && wanted > 0;
    for_row<Key>(p, t, row, [&](const TopkKeys<Key, 1>& keys, int64_t at) {
      uint32_t kept = 0, equal = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint64_t top = static_cast<uint64_t>(keys.key[0][j] >> shift);
        kept |= static_cast<uint32_t>(top > prefix) << j;
        equal |= static_cast<uint32_t>(top == prefix) << j;
      }
      kept &= keys.live;
      equal &= keys.live;
      if (ties) {
        uint64_t all = 0;
        uint64_t rank = before + sum_before(static_cast<uint64_t>(__popc(equal)), shared, &all);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if ((equal >> j & 1u) == 0) continue;
          kept |= static_cast<uint32_t>(rank < wanted) << j;
          ++rank;
        }
        before += all;
      } else {
        kept |= equal;
      }
      store_bytes(p.masks[source], row, at, kept);
    });
    __syncthreads();
  }
}

// Sixteen lanes to a row: lane j adds up the squares of the elements j, j + 16, ..., in order.
__global__ void __launch_bounds__(kThreads)
    norms_kernel(const RowPass p, double* norms, uint8_t* alive) {
  constexpr int kRows = kThreads / kPartials;
  const int lane = static_cast<int>(threadIdx.x % kPartials);
  const unsigned lanes = 0xffffu << (threadIdx.x % 32 / kPartials * kPartials);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kPartials;
       row < p.n_rows; row += static_cast<int64_t>(gridDim.x) * kRows) {
    const int source = source_of_row(p, row);
    const TopkReading t = reading_of(p.sources, source);
    const int64_t cols = static_cast<int64_t>(p.cols[source]);
    const int64_t begin = (row - t.source().first_tile) * cols, end = begin + cols;
    double sum = 0;
    bool any = t.within == nullptr;
    for (int64_t at = begin + lane; at < end; at += kPartials) {
      uint32_t a[8], b[8];
      if (p.keying.score != TopkScore::noise) read_some<uint64_t>(t.dtype(), t.values, at, 1, a);
      if (t.other != nullptr) read_some<uint64_t>(t.other_dtype(), t.other, at, 1, b);
      double s[4];
      score_quad(p.keying, t, at, a, b, s);
      sum = __dadd_rn(sum, __dmul_rn(s[0], s[0]));
      any = any || __ldg(t.within + at) != 0;
    }
#pragma unroll
    for (int half = kPartials / 2; half > 0; half /= 2) {
      sum = __dadd_rn(sum, __shfl_down_sync(lanes, sum, static_cast<unsigned>(half), kPartials));
    }
    any = (__ballot_sync(lanes, any) & lanes) != 0;
    if (lane == 0) {
      norms[row] = __dsqrt_rn(sum);
      alive[row] = any ? 1 : 0;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    expand_kernel(const uint8_t* kept, int64_t cols, bool packed, uint8_t* mask, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; 8 * i < n;
       i += step) {
    int64_t row = 8 * i / cols, column = 8 * i % cols;
    uint64_t bytes = 0;
    for (int j = 0; j < 8 && 8 * i + j < n; ++j) {
      bytes |= uint64_t{kept[row] != 0} << (packed ? j : 8 * j);
      if (++column == cols) {
        column = 0;
        ++row;
      }
    }
    if (packed) {
      mask[i] = static_cast<uint8_t>(bytes);
    } else if (8 * i + 8 <= n) {
      *reinterpret_cast<uint64_t*>(mask + 8 * i) = bytes;
    } else {
      for (int j = 0; 8 * i + j < n; ++j) mask[8 * i + j] = static_cast<uint8_t>(bytes >> (8 * j));
    }
  }
}

cudaError_t prepare(const TopkRows& of, uint8_t* const* masks, const int64_t* counts,
                    uint64_t* base, RowPass* p, cudaStream_t stream) {
  std::vector<uint64_t> table;
  p->keying = topk_keying(of.scoring);
  p->sources = reinterpret_cast<TopkSource*>(base + append(table, of.sources, of.n_sources));
  p->cols = base + append(table, of.cols, of.n_sources);
  if (masks != nullptr) {
    p->masks = reinterpret_cast<uint8_t**>(base + append(table, masks, of.n_sources));
    p->counts = base + append(table, counts, of.n_sources);
  }
  p->status = reinterpret_cast<Word*>(of.scoring.status);
  p->mark = of.scoring.mark;
  p->n_rows = of.n_rows;
  p->n_sources = static_cast<int>(of.n_sources);
  p->key_bits = topk_key_bits(of.scoring, of.sources, of.n_sources);
  return upload(table, base, 0, of.scoring.more_status ? nullptr : of.scoring.status, stream);
}

dim3 grid_of(int64_t work, const DeviceLimits& limits) {
  const int64_t most = int64_t{kBlocksPerMultiprocessor} * limits.multiprocessors;
  return dim3(static_cast<unsigned>(work < 1 ? 1 : work < most ? work : most));
}

}  // namespace

int64_t topk_rows_scratch(const TopkRows& of) {
  return of.n_sources * static_cast<int64_t>(sizeof(TopkSource) + 3 * sizeof(uint64_t));
}

cudaError_t topk_rows(const TopkRows& of, uint8_t* const* masks, const int64_t* counts,
                      void* scratch, const DeviceLimits& limits, cudaStream_t stream) {
  RowPass p{};
  const cudaError_t error = prepare(of, masks, counts, static_cast<uint64_t*>(scratch), &p, stream);
  if (error != cudaSuccess) return error;
  const dim3 grid = grid_of(of.n_rows, limits);
  constexpr size_t kShared = kBins * sizeof(uint32_t) + 20 * sizeof(uint64_t);
  return of.scoring.wide ? launch(rows_kernel<uint64_t>, grid, dim3(kThreads), kShared, stream, p)
                         : launch(rows_kernel<uint32_t>, grid, dim3(kThreads), kShared, stream, p);
}

cudaError_t topk_filter_norms(const TopkRows& of, double* norms, uint8_t* alive, void* scratch,
                              const DeviceLimits& limits, cudaStream_t stream) {
  RowPass p{};
  const cudaError_t error =
      prepare(of, nullptr, nullptr, static_cast<uint64_t*>(scratch), &p, stream);
  if (error != cudaSuccess) return error;
  constexpr int64_t kRows = kThreads / kPartials;
  return launch(norms_kernel, grid_of((of.n_rows + kRows - 1) / kRows, limits), dim3(kThreads), 0,
                stream, p, norms, alive);
}

cudaError_t topk_expand_rows(const uint8_t* kept, int64_t cols, bool packed, uint8_t* mask,
                             int64_t n, const DeviceLimits& limits, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  return launch(expand_kernel, grid_of((n + 8 * kThreads - 1) / (8 * kThreads), limits),
                dim3(kThreads), 0, stream, kept, cols, packed, mask, n);
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
