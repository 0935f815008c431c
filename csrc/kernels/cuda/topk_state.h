// What the passes of a selection share: its state between them, where a block works, what a prefix
// says of an element, masks and the list of candidates.
#pragma once

#include "kernels/cuda/topk_bins.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

#if defined(__CUDACC__) || defined(FASTPRUNE_EMULATED)

constexpr int kQuads = 2;                      // vector loads in flight per thread and factor
constexpr int kQuadStep = 4 * kTopkThreads;    // elements between a thread's quads
constexpr int64_t kTile = kQuads * kQuadStep;  // elements of one tensor; a place fits 16 bits
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kStaged = 64;              // candidates that a warp collects before it writes
constexpr int64_t kCandidateShare = 48;  // elements per place in the list of candidates
constexpr uint64_t kNothing = uint64_t{1} << 63;  // a prefix above every digit

// What a selection knows: k-th best's leading key bits, then those of its inverted position.
enum TopkMode : uint32_t {
  kReading,     // the candidates would not fit their list: the factors are read
  kCollecting,  // they fit: the next read writes what is decided, and the list
  kListed,      // the list is read
};
struct TopkState {
  uint64_t key_prefix, position_prefix;
  uint64_t wanted, inside;  // of the candidates that share both prefixes
  uint32_t key_shift, position_shift;
  uint32_t mode;
  uint32_t done;  // all of them are wanted
};
static_assert(sizeof(TopkState) == 48);

struct TopkRange {
  uint64_t first_slot, slots;  // in the list of candidates
  uint32_t first_tile, end_tile;
  uint64_t index;  // what the status calls the first selection
};
static_assert(sizeof(TopkRange) == 32);

// The argument of every pass.
struct TopkPass {
  TopkKeying keying;
  const TopkSource* sources;
  const TopkRange* ranges;
  uint8_t* const* masks;   // of the selection in question
  const uint64_t* counts;  // of all selections
  TopkState* states;       // of the selection in question
  Word* found;             // candidates listed, per problem
  Word* histograms;        // per problem; all 0 when a pass starts
  uint32_t* ticket;
  void* keys;  // of the candidates; their tile and place in it
  uint32_t* tiles;
  uint16_t* places;
  Word* status;
  uint32_t* mark;
  int64_t n_tiles;
  uint64_t n_slots;
  int n_sources, problems, selections;
  int key_bits, position_bits;
  int round;       // 0: the first digit
  bool positions;  // the digit is one of the inverted position
  bool packed;
};

// ---- Where a block works ------------------------------------------------------------------------

struct Walk {
  int64_t tile, end;
  int source;
};

__device__ __forceinline__ int source_of(const TopkPass& p, int64_t tile) {
  int low = 0, high = p.n_sources;  // the last that starts at or before the tile
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.sources[middle].first_tile <= tile ? low : high) = middle;
  }
  return low;
}

// Neighbouring tiles: few tensors to a block, and hardly a difference in work.
__device__ __forceinline__ Walk walk_of(const TopkPass& p) {
  const int64_t block = blockIdx.x, blocks = gridDim.x;
  Walk w{block * p.n_tiles / blocks, (block + 1) * p.n_tiles / blocks, 0};
  if (w.tile < w.end) w.source = source_of(p, w.tile);
  return w;
}

__device__ __forceinline__ const TopkSource& source_at(const TopkPass& p, Walk& w) {
  while (w.source + 1 < p.n_sources && p.sources[w.source + 1].first_tile <= w.tile) ++w.source;
  return p.sources[w.source];
}

template <typename Key>
__device__ __forceinline__ TopkKeys<Key, kQuads> tile_keys(const TopkPass& p, const TopkSource& t,
                                                           int64_t begin) {
  const bool whole = t.aligned != 0 && begin + kTile <= t.numel;
  return load_keys<Key, kQuads>(p.keying, t, begin + 4 * static_cast<int64_t>(threadIdx.x),
                                kQuadStep, t.numel, whole);
}

// ---- What a prefix says of an element -----------------------------------------------------------

__device__ __forceinline__ uint64_t inverted(const TopkPass& p, int64_t tile, uint32_t place) {
  const uint64_t position = static_cast<uint64_t>(tile) * kTile + place;
  return ((uint64_t{1} << p.position_bits) - 1) - position;
}

// 1: better than the prefixes, 0: shares them, -1: worse.
template <typename Key>
__device__ __forceinline__ int compare(const TopkPass& p, const TopkState& s, Key key, int64_t tile,
                                       uint32_t place) {
  const uint64_t top = key >> s.key_shift;
  if (top != s.key_prefix) return top > s.key_prefix ? 1 : -1;
  if (s.position_shift == static_cast<uint32_t>(p.position_bits)) return 0;
  const uint64_t at = inverted(p, tile, place) >> s.position_shift;
  return at == s.position_prefix ? 0 : at > s.position_prefix ? 1 : -1;
}

template <typename Key>
__device__ __forceinline__ uint32_t next_digit(const TopkPass& p, const TopkState& s, Key key,
                                               int64_t tile, uint32_t place) {
  if (p.positions) {
    const int bits = topk_digit_bits(static_cast<int>(s.position_shift));
    const uint64_t rest = inverted(p, tile, place) >> (s.position_shift - bits);
    return static_cast<uint32_t>(rest & ((1u << bits) - 1));
  }
  const int fixed = static_cast<int>(8 * sizeof(Key)) - p.key_bits;
  const int bits = topk_digit_bits(static_cast<int>(s.key_shift) - fixed);
  return static_cast<uint32_t>(key >> (s.key_shift - bits)) & ((1u << bits) - 1);
}

// ---- Masks and candidates -----------------------------------------------------------------------

// Bits 0..3 of `kept` are elements at..at + 3; all lanes of a warp hold neighbouring quads.
__device__ __forceinline__ void store_quad(bool packed, uint8_t* mask, int64_t at, int64_t numel,
                                           bool whole, uint32_t kept) {
  if (!packed) {
    const uint32_t bytes = kept * 0x00204081u & 0x01010101u;  // bit j to byte j
    if (whole) {
      *reinterpret_cast<uint32_t*>(mask + at) = bytes;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (at + j < numel) mask[at + j] = static_cast<uint8_t>(bytes >> (8 * j));
      }
    }
    return;
  }
  uint32_t word = kept << (4 * (threadIdx.x % 8));
#pragma unroll
  for (int delta = 1; delta < 8; delta *= 2) word |= __shfl_xor_sync(kAllLanes, word, delta);
  if (threadIdx.x % 8 != 0) return;
  if (at + 32 <= numel) {
    *reinterpret_cast<uint32_t*>(mask + at / 8) = word;
  } else {
    for (int64_t e = at; e < numel; e += 8) mask[e / 8] = static_cast<uint8_t>(word >> (e - at));
  }
}

// A warp's candidates on their way to the list: one atomic for dozens of them. Their order in the
// list does not matter.
template <typename Key>
struct Stage {
  Key keys[kStaged];
  uint32_t tiles[kStaged];
  uint16_t places[kStaged];
};

template <typename Key>
class Collector {
 public:
  __device__ __forceinline__ Collector(const TopkPass& p, Stage<Key>* stages)
      : p_(p), stage_(stages[threadIdx.x / 32]) {}

  // `chosen`: bits 0..3, of this lane's quad at `place` of the tile.
  __device__ __forceinline__ void add(int problem, uint32_t chosen, const Key (&key)[4],
                                      int64_t tile, uint32_t place) {
    if (__any_sync(kAllLanes, chosen != 0) == 0) return;
    const unsigned lower = (1u << (threadIdx.x % 32)) - 1;
    uint32_t rank[4], total = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const unsigned lanes = __ballot_sync(kAllLanes, (chosen >> j & 1u) != 0);
      rank[j] = total + static_cast<uint32_t>(__popc(lanes & lower));
      total += static_cast<uint32_t>(__popc(lanes));
    }
    if (staged_ + total > kStaged) flush(problem);
    const bool direct = total > kStaged;
    const uint64_t first = direct ? reserve(problem, total) : 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if ((chosen >> j & 1u) == 0) continue;
      const uint16_t at = static_cast<uint16_t>(place + j);
      if (direct) {
        write(first + rank[j], key[j], static_cast<uint32_t>(tile), at);
      } else {
        stage_.keys[staged_ + rank[j]] = key[j];
        stage_.tiles[staged_ + rank[j]] = static_cast<uint32_t>(tile);
        stage_.places[staged_ + rank[j]] = at;
      }
    }
    if (!direct) staged_ += total;
  }

  __device__ __forceinline__ void flush(int problem) {
    if (staged_ == 0) return;  // the same for all lanes
    __syncwarp();
    const uint64_t first = reserve(problem, staged_);
    for (uint32_t i = threadIdx.x % 32; i < staged_; i += 32) {
      write(first + i, stage_.keys[i], stage_.tiles[i], stage_.places[i]);
    }
    __syncwarp();
    staged_ = 0;
  }

 private:
  __device__ __forceinline__ uint64_t reserve(int problem, uint32_t n) {
    uint64_t first = 0;
    if (threadIdx.x % 32 == 0) {
      first = p_.ranges[problem].first_slot + atomicAdd(p_.found + problem, static_cast<Word>(n));
    }
    return __shfl_sync(kAllLanes, first, 0);
  }
  __device__ __forceinline__ void write(uint64_t slot, Key key, uint32_t tile, uint16_t place) {
    static_cast<Key*>(p_.keys)[slot] = key;
    p_.tiles[slot] = tile;
    p_.places[slot] = place;
  }

  const TopkPass& p_;
  Stage<Key>& stage_;
  uint32_t staged_ = 0;
};

// ---- Between the passes -------------------------------------------------------------------------

// One more digit is counted: the boundary bin's joins the prefix.
__device__ __forceinline__ TopkState narrowed(const TopkPass& p, TopkState s, const TopkBoundary& b,
                                              uint64_t slots, int width) {
  if (p.positions) {
    const int bits = topk_digit_bits(static_cast<int>(s.position_shift));
    s.position_shift -= static_cast<uint32_t>(bits);
    s.position_prefix = s.position_prefix << bits | b.bin;
  } else {
    const int bits = topk_digit_bits(static_cast<int>(s.key_shift) - (width - p.key_bits));
    s.key_shift -= static_cast<uint32_t>(bits);
    s.key_prefix = s.key_prefix << bits | b.bin;
  }
  s.wanted -= b.above;
  s.inside = b.inside;
  s.done = s.wanted == s.inside ? 1 : 0;
  if (s.mode == kCollecting) {
    s.mode = kListed;
  } else if (s.mode == kReading && s.done == 0 && s.inside <= slots && !p.positions) {
    s.mode = kCollecting;  // after a digit of the position little is left to read in any case
  }
  return s;
}

__device__ __forceinline__ TopkState initial_state(const TopkPass& p, int width, uint64_t wanted) {
  TopkState s{};
  s.key_shift = static_cast<uint32_t>(width);
  s.position_shift = static_cast<uint32_t>(p.position_bits);
  s.mode = kReading;
  s.wanted = wanted;
  if (wanted == 0) {
    s.key_prefix = kNothing;
    --s.key_shift;  // a legal shift of a key
    s.done = 1;
  }
  return s;
}

// After a pass, for one problem: all threads of a block of kTopkThreads. The histogram is cleared.
__device__ __forceinline__ void advance(const TopkPass& p, int problem, int width,
                                        uint64_t* shared) {
  Word* bins = p.histograms + static_cast<int64_t>(problem) * kTopkDigitBins;
  if (p.round > 0 && p.states[problem].done != 0) return;  // nothing was counted
  const TopkRange range = p.ranges[problem];
  const int selections = p.round == 0 ? p.selections : 1;
  for (int i = 0; i < selections; ++i) {
    const int64_t which = static_cast<int64_t>(i) * p.problems + problem;
    const uint64_t k = p.round == 0 ? p.counts[which] : p.states[which].wanted;
    TopkBoundary b = find_boundary<kTopkDigitBins, kTopkThreads>(bins, k, shared);
    const bool too_few = k > b.total;
    const uint64_t wanted = too_few ? b.total : k;
    if (too_few) b = find_boundary<kTopkDigitBins, kTopkThreads>(bins, wanted, shared);
    if (threadIdx.x == 0) {
      if (too_few) {
        tell(p.status + 1, p.mark, range.index + static_cast<uint64_t>(i), kTooFew);
      }
      TopkState s = p.round == 0 ? initial_state(p, width, wanted) : p.states[which];
      if (s.done == 0) s = narrowed(p, s, b, range.slots, width);
      p.states[which] = s;
    }
  }
  __syncthreads();
  for (int bin = static_cast<int>(threadIdx.x); bin < kTopkDigitBins; bin += kTopkThreads) {
    bins[bin] = 0;
  }
}

// With a single problem the last block of a pass goes on; several have a launch of their own.
__device__ __forceinline__ void end_pass(const TopkPass& p, int width, uint32_t* bins) {
  if (p.problems > 1 || !last_block(p.ticket, bins)) return;
  advance(p, 0, width, reinterpret_cast<uint64_t*>(bins));
}

#endif

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
