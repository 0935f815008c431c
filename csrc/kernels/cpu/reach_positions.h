// Where the taps of a convolution put positions (path_norm.h), and bits at any place of a plane:
// arithmetic that the CPU's kernels and the GPU's share. Unnamed: each translation unit, hence each
// ISA, keeps its own copy.
#pragma once

#include <cstdint>

#include "kernels/cpu/path_norm.h"

namespace fastprune {
namespace {

FASTPRUNE_HOST_DEVICE inline bool bit_of(const uint64_t* plane, int64_t i) {
  return (plane[i / 64] >> i % 64 & 1u) != 0;
}

// 64 bits from a bit position, zeros outside the plane.
FASTPRUNE_HOST_DEVICE inline uint64_t word_at(const uint64_t* plane, int64_t words, int64_t at) {
  const int64_t word = at >> 6, by = at & 63;
  const uint64_t low = word >= 0 && word < words ? plane[word] >> by : 0;
  if (by == 0 || word + 1 < 0 || word + 1 >= words) return low;
  return low | plane[word + 1] << (64 - by);
}

// Where small position 0 of tap t stands on the large side, padding included.
FASTPRUNE_HOST_DEVICE inline void tap_start(const ReachGeometry& g, int64_t t, int64_t* start) {
  const int64_t k[3] = {t / (g.kernel[1] * g.kernel[2]), t / g.kernel[2] % g.kernel[1],
                        t % g.kernel[2]};
  for (int i = 0; i < 3; ++i) start[i] = k[i] * g.dilation[i] - g.padding[i];
}

// Whether a tap is one shift of the whole plane: the same rows and columns on both sides and no
// stride. Which bits the shift brings to a wrong place, the tap's cover says.
FASTPRUNE_HOST_DEVICE inline bool taps_shift(const ReachGeometry& g) {
  return g.stride[0] == 1 && g.stride[1] == 1 && g.stride[2] == 1 && g.large[1] == g.small[1] &&
         g.large[2] == g.small[2];
}
FASTPRUNE_HOST_DEVICE inline int64_t tap_shift(const ReachGeometry& g, int64_t t) {
  int64_t start[3];
  tap_start(g, t, start);
  return (start[0] * g.large[1] + start[1]) * g.large[2] + start[2];
}

}  // namespace
}  // namespace fastprune
