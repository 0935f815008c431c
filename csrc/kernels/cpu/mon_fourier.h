// The convolutional monotone network solved in the Fourier domain. A vector holds one point of as
// many maps as it has lanes ("a group"); all that is done to maps is done to a pair of groups, one
// as real, one as imaginary part of a complex map.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/mon_activations.h"
#include "kernels/cpu/scalar_types.h"

namespace fastprune {

// One factor of a line's length: a power of 2, an odd prime power, or twice that. Factors are
// coprime, so that nothing has to be multiplied between them.
struct FourierFactor {
  int64_t length, odd;  // odd: of length, its odd part; 1 for a power of 2
  // Of primes 4 i + 1: place t + 1, t < odd / 2, is of g^t, with a g whose powers are all of
  // 1 ... odd - 1, and place odd - t - 1 of -g^t.
  bool split;
  // length / factor runs of `factor` places, in vectors: what is transformed together. Twice an odd
  // number: the first of the two all along, then the second.
  const int32_t* places;
  // Odd parts: cosines and sines of 2 pi k t / odd for k, t <= odd / 2: in blocks of at most
  // kFourierBlock k, for each t the cosines of the block, then the sines. Powers of 2:
  // e^(-2 pi i t / length), complex, t < length. Split: see split_outputs.
  const void* table;
};
constexpr int64_t kFourierBlock = 4, kFourierSplitBlock = 2;

// The transform of a line of complex vectors, in place. Its input n is expected at places[n], its
// output is in order; and the other way round.
struct FourierLine {
  int64_t length;
  int factors;
  FourierFactor factor[10];
  const int32_t* places;  // in vectors
};

// The frequencies (ky, kx) with kx <= width / 2; of those that are each other's conjugates, at
// kx = 0 and kx = width / 2, one only. kx by kx.
inline int64_t fourier_column_height(int64_t height, int64_t width, int64_t kx) {
  return kx == 0 || 2 * kx == width ? height / 2 + 1 : height;
}
inline int64_t fourier_frequencies(int64_t height, int64_t width) {
  int64_t count = 0;
  for (int64_t kx = 0; kx <= width / 2; ++kx) count += fourier_column_height(height, width, kx);
  return count;
}

// The rows of a matrix in blocks of at most 8, of nearly one size. A block is stored column by
// column, so that a product reads it from front to back.
constexpr int64_t kMatrixRows = 8;
inline int64_t matrix_blocks(int64_t channels) {
  return (channels + kMatrixRows - 1) / kMatrixRows;
}
inline int64_t matrix_block_begin(int64_t channels, int64_t block) {
  return channels * block / matrix_blocks(channels);
}

enum class MonFourierStep : int {
  start,    // the first right-hand side of Peaceman-Rachford
  iterate,  // one step, and the next right-hand side
  prepare,  // the right-hand side of the last application
  finish,   // the last application
};

struct MonFourierMaps {
  DType dtype;
  MonActivation activation;
  bool adjoint, resolvent;  // resolvent: Peaceman-Rachford, else forward-backward
  double alpha;
  int64_t groups, height, width, ring;
  int64_t per_block;  // groups of the same samples: pairs mix no others
  int64_t pitch;      // from row to row of a map that is transformed, in complex vectors
  int64_t work;       // vectors that the transforms need besides
  FourierLine row, column;
  // [frequency][group][real, imaginary][lane]
  void* spectrum;
  // [group][y][x][lane]. bias is the last application's result in the end. slope: adjoint only,
  // the factor of each step, and the slope itself in the end. u: Peaceman-Rachford only. z: not
  // where it follows from u (keeps_z); then it is in u in the end.
  void *bias, *slope, *u, *z;
  const void* active;  // [group][lane], 0 or -1 as wide as an element: lanes that hold a map and
  // still move
  double* sums;  // [group][2][lane]: squares of the change of z, and of z
};
inline int64_t mon_fourier_pairs(const MonFourierMaps& m) {
  return m.groups / m.per_block * ((m.per_block + 1) / 2);
}
inline bool mon_fourier_keeps_z(const MonFourierMaps& m) {
  const bool cheap = m.activation == MonActivation::relu || m.activation == MonActivation::identity;
  return !m.resolvent || (!m.adjoint && !cheap);
}

// Which maps a group holds: a channel of as many images as there are lanes, or as many channels of
// an image. A block of `per_block` groups holds all channels of its images.
struct MonFourierLayout {
  DType dtype;
  bool channel_lanes;
  int64_t batch, channels, points, lanes;
  int64_t per_block() const { return channel_lanes ? (channels + lanes - 1) / lanes : channels; }
  int64_t blocks() const { return channel_lanes ? batch : (batch + lanes - 1) / lanes; }
  int64_t groups() const { return blocks() * per_block(); }

  struct Group {
    int64_t first, step, filled;  // the map of lane 0, from lane to lane, and how many
  };
  Group group(int64_t g) const {
    const int64_t block = g / per_block(), within = g % per_block();
    const auto lanes_of = [this](int64_t left) { return left < lanes ? left : lanes; };
    if (channel_lanes) {
      const int64_t channel = within * lanes;
      return {block * channels + channel, 1, lanes_of(channels - channel)};
    }
    return {block * lanes * channels + within, channels, lanes_of(batch - block * lanes)};
  }
};

struct MonFourierProducts {
  MonFourierLayout layout;
  void* spectrum;
  const void* matrix;          // [frequency], packed
  const uint8_t* block_moves;  // [block]
};

FASTPRUNE_PER_ISA(int64_t mon_fourier_lanes(DType dtype);
                  // Bytes of scratch, aligned to 64, for one thread.
                  int64_t mon_fourier_maps_scratch(const MonFourierMaps& maps);
                  int64_t mon_fourier_products_scratch(const MonFourierProducts& products);
                  // Pairs of groups [begin, end) of mon_fourier_pairs. inverse: from a spectrum,
                  // else from zeros; forward: to the spectrum of the next product.
                  void mon_fourier_maps(const MonFourierMaps& maps, MonFourierStep step,
                                        bool inverse, bool forward, int64_t begin, int64_t end,
                                        void* scratch);
                  // The spectrum at the frequencies [begin, end), times their matrices, in place.
                  void mon_fourier_products(const MonFourierProducts& products, int64_t begin,
                                            int64_t end, void* scratch);
                  // Groups [begin, end). slope_alpha: null, or x becomes x / (x + alpha (1 - x)).
                  void mon_fourier_from_maps(const MonFourierLayout& layout,
                                             const double* slope_alpha, const void* maps,
                                             void* groups, int64_t begin, int64_t end);
                  void mon_fourier_to_maps(const MonFourierLayout& layout, const void* groups,
                                           void* maps, int64_t begin, int64_t end);)

}  // namespace fastprune
