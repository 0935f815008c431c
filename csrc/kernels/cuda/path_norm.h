// Reachability through a network on the GPU: the instructions of path_norm (ops/path_norm.h) as
// steps over maps of bits in device memory, launched one after another.
//
// Bits are only ever added to a map, by atomic OR, so that results depend neither on the order of
// warps nor on their number. What a step reads it does not write.
#pragma once

#include "kernels/cpu/path_norm.h"
#include "kernels/cuda/cuda.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// `planes` rows of words_of(bits) words of 64 bits; unused bits of a row's last word are 0. Masks
// are maps too: rows and columns.
struct ReachMap {
  uint64_t* words;
  int64_t planes, bits;
};

// What the taps of a geometry join when the other side is full (kernels/cpu/path_norm.h).
struct ReachCovers {
  uint64_t *small, *large;          // taps() planes of the side's words
  uint64_t *all_small, *all_large;  // the union of all taps: one plane
  uint64_t* some;                   // words_of(taps()) words, bit t: tap t joins anything

  static int64_t words(const ReachGeometry& g);
  static ReachCovers at(uint64_t* words, const ReachGeometry& g);
};

enum class ReachStepKind : int64_t {
  fill,           // to = ones
  clear,          // to = zeros
  store,          // to = from, of the same planes and bits
  merge,          // to |= from, of the same planes and bits
  states,         // states[p] = ReachState of plane p of from
  gather,         // to (small) |= from (large) through mask; `states` of from
  spread,         // to (large) |= from (small) through mask; `states` of from
  linear,         // to |= from through mask: planes are tokens
  linear_back,    // the same from the layer's output to its input
  copy,           // to |= from, element by element; planes may differ
  mark,           // to (one plane: bit l) |= a set element of from has label l
  take,           // to |= elements whose label is set in from (one plane)
  conv_active,    // to |= bits of mask that join a set bit of from (large) and one of other (small)
  linear_active,  // to |= bits of mask that join a set bit of from (input) and one of other
                  // (output)
};

// Passed by value to a kernel, hence without pointers to host memory.
struct ReachStep {
  ReachStepKind kind;
  ReachMap from, other, to;
  ReachMap mask;                  // words null: ones
  uint8_t *states, *more_states;  // of the planes of from, and of other
  const int32_t* labels;          // of from's elements (mark) or to's (take)
  ReachGeometry geometry;
  ReachCovers covers;
};

// to = bits of planes x bits bytes, set where a byte is not 0; and bytes 0 or 1 of bits.
cudaError_t reach_pack(const uint8_t* bytes, const ReachMap& to, const DeviceLimits& limits,
                       cudaStream_t stream);
cudaError_t reach_unpack(const ReachMap& from, uint8_t* bytes, const DeviceLimits& limits,
                         cudaStream_t stream);
// *count += the set bits.
cudaError_t reach_count(const ReachMap& from, int64_t* count, const DeviceLimits& limits,
                        cudaStream_t stream);
// Fills a geometry's covers, all zeros on entry.
cudaError_t reach_covers(const ReachGeometry& geometry, const ReachCovers& covers,
                         const DeviceLimits& limits, cudaStream_t stream);
cudaError_t reach_step(const ReachStep& step, const DeviceLimits& limits, cudaStream_t stream);
// Repeats n steps until none of them adds a bit, in one launch of one block: how often is known to
// the device alone. on_device: room for the steps.
cudaError_t reach_settle(const ReachStep* steps, int64_t n, ReachStep* on_device,
                         cudaStream_t stream);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
