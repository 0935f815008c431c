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
constexpr int64_t kCandidateShare = 48;           // elements per place in the list of candidates
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
  uint32_t n_tiles;
  uint64_t n_slots;
  int n_sources, problems, selections;
  int key_bits, position_bits;
  int round;       // 0: the first digit
  bool positions;  // the digit is one of the inverted position
  bool packed;
};

// ---- Where a block works ------------------------------------------------------------------------

__device__ __forceinline__ int source_of(const TopkPass& p, uint32_t tile) {
  int low = 0, high = p.n_sources;  // the last that starts at or before the tile
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.sources[middle].first_tile <= tile ? low : high) = middle;
  }
  return low;
}

// A block's tiles: neighbours, so that few tensors come before it. All threads walk together; what
// they need of the tensor in question lies in shared memory.
class Walk {
 public:
  __device__ __forceinline__ Walk(const TopkPass& p, TopkReading* shared)
      : t(*shared),
        tile(static_cast<uint32_t>(uint64_t{blockIdx.x} * p.n_tiles / gridDim.x)),
        end_(static_cast<uint32_t>((uint64_t{blockIdx.x} + 1) * p.n_tiles / gridDim.x)) {
    if (tile < end_) enter(p, source_of(p, tile));
  }
  // To the tile, wherever `tile` was set to; false past the end.
  __device__ __forceinline__ bool here(const TopkPass& p) {
    if (tile >= end_) return false;
    while (tile >= next_) enter(p, source_ + 1);
    return true;
  }
  // The first element of the tile in its tensor.
  __device__ __forceinline__ int64_t begin() const { return int64_t{tile - first_} * kTile; }

  TopkReading& t;
  uint32_t tile;
  int problem = -1;

 private:
  __device__ __forceinline__ void enter(const TopkPass& p, int i) {
    const TopkSource& s = p.sources[i];
    __syncthreads();
    if (threadIdx.x == 0) t = reading_of(p.sources, i);
    __syncthreads();
    source_ = i;
    problem = static_cast<int>(s.problem);
    first_ = s.first_tile;
    next_ = i + 1 < p.n_sources ? p.sources[i + 1].first_tile : p.n_tiles;
  }
  int source_ = 0;
  uint32_t end_, first_ = 0, next_ = 0;  // tiles of the tensor
};

// Where a thread's i-th element of a tile lies.
__device__ __forceinline__ uint32_t place_of(int i) {
  return 4 * threadIdx.x + static_cast<uint32_t>(i / 4 * kQuadStep + i % 4);
}

template <typename Key>
__device__ __forceinline__ TopkKeys<Key, kQuads> tile_keys(const TopkPass& p, const TopkReading& t,
                                                           int64_t begin) {
  const bool whole = t.aligned() && begin + kTile <= t.numel;
  return load_keys<Key, kQuads>(p.keying, t, begin + place_of(0), kQuadStep, t.numel, whole);
}

// The i-th key, without indexing registers by a variable.
template <typename Key>
__device__ __forceinline__ Key picked(const TopkKeys<Key, kQuads>& keys, int i) {
  static_assert(kQuads == 2);
  const auto of_quad = [&](const Key(&k)[4]) {
    const Key even = (i & 2) != 0 ? k[2] : k[0], odd = (i & 2) != 0 ? k[3] : k[1];
    return (i & 1) != 0 ? odd : even;
  };
  const Key first = of_quad(keys.key[0]), second = of_quad(keys.key[1]);
  return i < 4 ? first : second;
}

// ---- What a prefix says of an element -----------------------------------------------------------

__device__ __forceinline__ uint64_t inverted(const TopkPass& p, uint32_t tile, uint32_t place) {
  const uint64_t position = uint64_t{tile} * kTile + place;
  return ((uint64_t{1} << p.position_bits) - 1) - position;
}

// 1: better than the prefixes, 0: shares them, -1: worse.
template <typename Key>
__device__ __forceinline__ int compare(const TopkPass& p, const TopkState& s, Key key,
                                       uint32_t tile, uint32_t place) {
  const uint64_t top = key >> s.key_shift;
  if (top != s.key_prefix) return top > s.key_prefix ? 1 : -1;
  if (s.position_shift == static_cast<uint32_t>(p.position_bits)) return 0;
  const uint64_t at = inverted(p, tile, place) >> s.position_shift;
  return at == s.position_prefix ? 0 : at > s.position_prefix ? 1 : -1;
}

// The digit that comes after a prefix that ends at `shift`.
template <typename Key>
__device__ __forceinline__ uint32_t key_digit(const TopkPass& p, uint32_t shift, Key key) {
  const int fixed = static_cast<int>(8 * sizeof(Key)) - p.key_bits;
  const int bits = topk_digit_bits(static_cast<int>(shift) - fixed);
  return static_cast<uint32_t>(key >> (shift - bits)) & ((1u << bits) - 1);
}
__device__ __forceinline__ uint32_t position_digit(const TopkPass& p, uint32_t shift, uint32_t tile,
                                                   uint32_t place) {
  const int bits = topk_digit_bits(static_cast<int>(shift));
  return static_cast<uint32_t>(inverted(p, tile, place) >> (shift - bits)) & ((1u << bits) - 1);
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

// Bit i of `kept`: this thread's i-th element of a tile.
__device__ __forceinline__ void store_tile(const TopkPass& p, const TopkReading& t, int64_t begin,
                                           uint32_t kept) {
  uint8_t* mask = p.masks[t.index];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int64_t at = begin + place_of(4 * q);
    const bool whole = t.aligned() && at + 4 <= t.numel;
    store_quad(p.packed, mask, at, t.numel, whole, kept >> (4 * q) & 15u);
  }
}

constexpr int kStaged = 32 * 4 * kQuads;  // all that a warp can find in a tile

// A warp's candidates on their way to the list: one atomic in global memory for dozens of them.
// Their order in the list does not matter.
template <typename Key>
struct Stage {
  Key keys[kStaged];
  uint32_t tiles[kStaged];
  uint16_t places[kStaged];
  uint32_t next;
};

template <typename Key>
class Collector {
 public:
  __device__ __forceinline__ Collector(const TopkPass& p, Stage<Key>* stages)
      : p_(p), stage_(stages[threadIdx.x / 32]) {
    if (threadIdx.x % 32 == 0) stage_.next = 0;
    __syncwarp();
  }

  // All lanes of a warp: room for `n` candidates of this lane.
  __device__ __forceinline__ void begin(int problem, uint32_t n) {
    const uint32_t total = __reduce_add_sync(kAllLanes, n);
    if (total == 0) return;
    if (staged_ + total > kStaged) flush(problem);
    slot_ = n == 0 ? 0 : atomicAdd(&stage_.next, n);
    staged_ += total;
  }
  __device__ __forceinline__ void add(Key key, uint32_t tile, uint32_t place) {
    stage_.keys[slot_] = key;
    stage_.tiles[slot_] = tile;
    stage_.places[slot_] = static_cast<uint16_t>(place);
    ++slot_;
  }
  __device__ __forceinline__ void flush(int problem) {
    if (staged_ == 0) return;  // the same for all lanes
    __syncwarp();
    uint64_t first = 0;
    if (threadIdx.x % 32 == 0) {
      first =
          p_.ranges[problem].first_slot + atomicAdd(p_.found + problem, static_cast<Word>(staged_));
      stage_.next = 0;
    }
    first = __shfl_sync(kAllLanes, first, 0);
#pragma unroll 1
    for (uint32_t i = threadIdx.x % 32; i < staged_; i += 32) {
      static_cast<Key*>(p_.keys)[first + i] = stage_.keys[i];
      p_.tiles[first + i] = stage_.tiles[i];
      p_.places[first + i] = stage_.places[i];
    }
    __syncwarp();
    staged_ = 0;
  }

 private:
  const TopkPass& p_;
  Stage<Key>& stage_;
  uint32_t staged_ = 0;  // of the warp
  uint32_t slot_ = 0;    // of the lane
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
  // Digits of the position are never counted while the list is made: after the first of them little
  // is left to read in any case.
  const bool key_next = s.key_shift > static_cast<uint32_t>(width - p.key_bits);
  if (s.mode == kCollecting) {
    s.mode = kListed;
  } else if (s.mode == kReading && s.done == 0 && s.inside <= slots && key_next) {
    s.mode = kCollecting;
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
