// Reachability through a network, on bits: which positions of which maps an input reaches, which
// reach an output, and which weights lie between the two.
//
// A map is `planes` planes of `bits` bits each (a channel and its depth x height x width, or a
// token and its features), every plane padded with zeros to words of 64 bits. A convolution joins a
// large side (its input; of a transposed one, its output) and a small side: row o of the mask,
// position p and tap t join small position p of plane o and large position p * stride + t *
// dilation - padding of a plane of the row's group. What lies outside the large side is padding and
// reaches nothing.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/scalar_types.h"  // FASTPRUNE_HOST_DEVICE

namespace fastprune {

struct ReachGeometry {
  int64_t rows, groups, depth;  // small planes; groups of them; large planes that a row joins
  int64_t large[3], small[3];   // depth, height, width
  int64_t kernel[3], stride[3], padding[3], dilation[3];

  FASTPRUNE_HOST_DEVICE int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t cols() const { return depth * taps(); }
  int64_t planes() const { return depth * groups; }  // of the large side
  FASTPRUNE_HOST_DEVICE int64_t large_bits() const { return large[0] * large[1] * large[2]; }
  FASTPRUNE_HOST_DEVICE int64_t small_bits() const { return small[0] * small[1] * small[2]; }
};

FASTPRUNE_HOST_DEVICE inline int64_t words_of(int64_t bits) { return (bits + 63) / 64; }

// What every tap joins when the other side is full: taps planes each; and the union of all taps.
struct ReachTaps {
  uint64_t *small, *large;
  uint64_t *all_small, *all_large;
  uint8_t* joins;  // per tap: it joins anything
  int64_t* shift;  // per tap: tap_shift() of reach_positions.h
};

// Of a plane.
enum ReachState : uint8_t { kReachEmpty = 0, kReachPartial = 1, kReachFull = 2 };

// Masks are rows of words_of(cols) words; null stands for a mask of ones.
FASTPRUNE_PER_ISA(
    // Bits of rows x cols bytes, each 0 or 1.
    void reach_pack(const uint8_t* mask, int64_t rows, int64_t cols, uint64_t* bits);
    // And back.
    void reach_unpack(const uint64_t* bits, int64_t rows, int64_t cols, uint8_t* mask);
    int64_t reach_count(const uint64_t* bits, int64_t words);
    // to |= from; whether that changed anything.
    bool reach_merge(uint64_t* to, const uint64_t* from, int64_t words);
    // The same elements cut into other planes: to |= from.
    void reach_copy(const uint64_t* from, int64_t planes, int64_t bits, uint64_t* to,
                    int64_t to_bits);
    void reach_states(const uint64_t* map, int64_t planes, int64_t bits, uint8_t* states);
    // Fills the buffers: taps() * words and words for either side. rows: zeros, words_of(small[2])
    // + words_of(large[2]) words, left as they were.
    void reach_taps(const ReachGeometry& geometry, const ReachTaps& taps, uint64_t* rows);
    // small = what the large side brings through the mask; rows [begin, end).
    // scratch: words_of(cols) + words_of(taps) words.
    void reach_gather(const ReachGeometry& geometry, const ReachTaps& taps, const uint64_t* mask,
                      const uint64_t* large, const uint8_t* large_states, uint64_t* small,
                      uint64_t* scratch, int64_t begin, int64_t end);
    // large = what the small side brings, planes of all groups; zeros on entry.
    // scratch: 3 * words_of(cols) words.
    void reach_spread(const ReachGeometry& geometry, const ReachTaps& taps, const uint64_t* mask,
                      const uint64_t* small, const uint8_t* small_states, uint64_t* large,
                      uint64_t* scratch);
    // The weights of the mask that join something that is set on both sides: how many, and where
    // `active` is not null, their bits are set there (other bits stay).
    // scratch: (groups + 1) * words_of(cols) words.
    int64_t reach_active(const ReachGeometry& geometry, const ReachTaps& taps, const uint64_t* mask,
                         const uint64_t* large, const uint8_t* large_states, const uint64_t* small,
                         const uint8_t* small_states, uint64_t* active, uint64_t* scratch);
    // The same for a linear layer of rows x cols weights that takes each of `tokens` planes of cols
    // bits to one of rows bits; mask null: ones.
    void reach_linear(const uint64_t* mask, int64_t rows, int64_t cols, int64_t tokens,
                      const uint64_t* in, uint64_t* out);
    void reach_linear_back(const uint64_t* mask, int64_t rows, int64_t cols, int64_t tokens,
                           const uint64_t* out, uint64_t* in);
    // scratch: 2 * words_of(cols) words.
    int64_t reach_linear_active(const uint64_t* mask, int64_t rows, int64_t cols, int64_t tokens,
                                const uint64_t* in, const uint64_t* out, uint64_t* active,
                                uint64_t* scratch);)

}  // namespace fastprune
