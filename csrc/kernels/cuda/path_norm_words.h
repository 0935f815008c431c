// Words of maps on the GPU: how a warp divides them among its lanes and unites what they bring, and
// how taps move them. For path_norm_steps.h.
#pragma once

#include "kernels/cpu/reach_positions.h"
#include "kernels/cuda/path_norm.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

struct Divided {
  int64_t quotient, rest;
};
// Of numbers that are not negative; 64-bit division is a subroutine, most numbers fit 32 bits.
__device__ __forceinline__ Divided divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) {
    const uint32_t quotient = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return {quotient, static_cast<uint32_t>(a) - quotient * static_cast<uint32_t>(b)};
  }
  const int64_t quotient = a / b;
  return {quotient, a - quotient * b};
}

__host__ __device__ inline int64_t chunks_of(int64_t words) { return (words + 31) / 32; }
__host__ __device__ inline int64_t words_in(const ReachMap& map) {
  return map.planes * words_of(map.bits);
}
// A team per word of a plane, up to a warp.
__host__ __device__ inline int team_lanes(int64_t words) {
  int lanes = 1;
  while (lanes < 32 && lanes < words) lanes *= 2;
  return lanes;
}

__device__ __forceinline__ uint64_t low_bits(int64_t n) {
  return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
}
__device__ __forceinline__ uint64_t* plane_of(const ReachMap& map, int64_t plane) {
  return map.words + plane * words_of(map.bits);
}
// Word w of a row of a mask; no words: ones.
__device__ __forceinline__ uint64_t mask_word(const ReachMap& mask, int64_t row, int64_t w) {
  return mask.words == nullptr ? low_bits(mask.bits - 64 * w) : plane_of(mask, row)[w];
}

// *word |= bits; whether that added any. What is read first may be old, but bits never go away.
__device__ __forceinline__ bool gain(uint64_t* word, uint64_t bits) {
  if ((bits & ~*word) == 0) return false;
  const uint64_t before = atomicOr(reinterpret_cast<unsigned long long*>(word), bits);
  return (bits & ~before) != 0;
}

// The union over lanes that are `first`, 2 * first, ... apart.
__device__ __forceinline__ uint64_t warp_or(uint64_t bits, int first = 1) {
  for (int apart = first; apart < 32; apart *= 2) bits |= __shfl_xor_sync(kAllLanes, bits, apart);
  return bits;
}

struct Team {
  int lanes, number, count, lane;  // of a team; which, of how many; lane in the team
  __device__ explicit Team(int64_t words) {
    const int me = static_cast<int>(threadIdx.x & 31u);
    lanes = team_lanes(words);
    number = me / lanes;
    count = 32 / lanes;
    lane = me % lanes;
  }
};

// Of a word that is to become `all`, what the items [begin, end) bring to `got`: item j brings
// value(j, b) for each bit b of bits(j). All lanes of a team see the same items; the results of
// teams are united, and everybody stops when no lane lacks anything.
template <typename Bits, typename Value>
__device__ __forceinline__ uint64_t unite(const Team& team, int64_t begin, int64_t end,
                                          uint64_t got, uint64_t all, const Bits& bits,
                                          const Value& value) {
  int64_t next = begin + team.number, item = 0;
  uint64_t left = 0;
  for (;;) {
    const uint64_t both = warp_or(got, team.lanes);
    if (__all_sync(kAllLanes, (all & ~both) == 0)) return both;
    while (left == 0 && next < end) {
      item = next;
      left = bits(item);
      next += team.count;
    }
    if (!__any_sync(kAllLanes, left != 0)) return both;
    // A few between two looks at the others.
    for (int n = 0; n < 4 && left != 0; ++n, left &= left - 1) {
      got |= value(item, __ffsll(static_cast<long long>(left)) - 1);
    }
  }
}

// A position of a plane.
__device__ __forceinline__ void unravel(int64_t position, const int64_t* size, int64_t* at) {
  const Divided row = divide(position, size[2]), plane = divide(row.quotient, size[1]);
  at[0] = plane.quotient;
  at[1] = plane.rest;
  at[2] = row.rest;
}
__device__ __forceinline__ int64_t ravel(const int64_t* at, const int64_t* size) {
  return (at[0] * size[1] + at[1]) * size[2] + at[2];
}

// Word w of the small side as tap t brings it from a large plane, of the bits in `wanted`, which
// the tap's cover holds.
__device__ __forceinline__ uint64_t from_large(const ReachGeometry& g, int64_t t, uint64_t wanted,
                                               const uint64_t* large, int64_t large_words,
                                               int64_t w) {
  if (wanted == 0) return 0;
  if (taps_shift(g)) return wanted & word_at(large, large_words, 64 * w + tap_shift(g, t));
  int64_t start[3], at[3];
  tap_start(g, t, start);
  uint64_t found = 0;
  for (uint64_t left = wanted; left != 0; left &= left - 1) {
    const int b = __ffsll(static_cast<long long>(left)) - 1;
    unravel(64 * w + b, g.small, at);
    for (int i = 0; i < 3; ++i) at[i] = at[i] * g.stride[i] + start[i];
    if (bit_of(large, ravel(at, g.large))) found |= uint64_t{1} << b;
  }
  return found;
}

// The other way: word w of the large side.
__device__ __forceinline__ uint64_t from_small(const ReachGeometry& g, const ReachCovers& covers,
                                               int64_t t, const uint64_t* small,
                                               int64_t small_words, int64_t large_words,
                                               int64_t w) {
  if (taps_shift(g)) {
    const int64_t at = 64 * w - tap_shift(g, t);
    return word_at(covers.small + t * small_words, small_words, at) &
           word_at(small, small_words, at);
  }
  int64_t start[3], at[3];
  tap_start(g, t, start);
  uint64_t found = 0;
  for (uint64_t left = covers.large[t * large_words + w]; left != 0; left &= left - 1) {
    const int b = __ffsll(static_cast<long long>(left)) - 1;
    unravel(64 * w + b, g.large, at);
    for (int i = 0; i < 3; ++i) at[i] = divide(at[i] - start[i], g.stride[i]).quotient;
    if (bit_of(small, ravel(at, g.small))) found |= uint64_t{1} << b;
  }
  return found;
}

// Where a warp works: a chunk of a plane of `words` words, and this lane's word in it.
struct Chunk {
  Team team;
  int64_t plane, word;
  bool inside;
  __device__ Chunk(int64_t unit, int64_t words) : team(words) {
    const Divided place = divide(unit, chunks_of(words));
    plane = place.quotient;
    word = 32 * place.rest + team.lane;
    inside = word < words;
  }
  // What the plane gained; teams hold the same.
  __device__ bool put(const ReachMap& to, uint64_t bits) const {
    return inside && team.number == 0 && gain(plane_of(to, plane) + word, bits);
  }
};

// Items are cut into `slices` parts, each a warp's; host and device cut alike.
struct Slice {
  int64_t number, count;
  __device__ int64_t begin(int64_t items) const { return divide(items * number, count).quotient; }
  __device__ int64_t end(int64_t items) const {
    return divide(items * (number + 1), count).quotient;
  }
};

}  // namespace
}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
