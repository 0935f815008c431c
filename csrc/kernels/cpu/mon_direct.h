// What forward-backward does point by point between the products of a convolutional monotone
// network in space, over the interior of its maps: the update with its norms, and the end.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/mon_activations.h"
#include "kernels/cpu/scalar_types.h"

namespace fastprune {

// Items are planes of `rows` rows of `width` elements: with the batch innermost one per channel, of
// points x samples; otherwise one per sample and channel, one row of points.
struct MonDirectMaps {
  DType dtype;  // f32 or f64
  MonActivation activation;
  double alpha, diagonal;  // W z = diagonal z + what the products make
  int64_t rows, width;
  bool batch_last;
  const void* slope;  // of the adjoint equation: J at the end, J / (J + alpha (1 - J)) before; null
  // Per sample: all bits where it still moves, else 0; elements as wide as the dtype's.
  const void* active;
  int64_t per_sample;  // items of a sample, where those are not in the rows
  void* z;
  double* sums;  // per item: squared norms of the change, then of z; `width` of each with the batch
                 // innermost, else one

  int64_t sums_per_item() const { return batch_last ? 2 * width : 2; }
};

FASTPRUNE_PER_ISA(
    // Elements of a vector.
    int64_t mon_direct_lanes(DType dtype);
    // scale = J / (J + alpha (1 - J)), 0 where J = 0; elements [begin, end).
    void mon_direct_scale(DType dtype, double alpha, const void* slope, void* scale, int64_t begin,
                          int64_t end);
    // z <- prox(alpha (value + diagonal z) + (1 - alpha) z) for the items [begin, end). value: the
    // products and b.
    void mon_direct_step(const MonDirectMaps& maps, const void* value, int64_t begin, int64_t end);
    // value <- the nonlinearity of value + diagonal z, or slope times that.
    void mon_direct_finish(const MonDirectMaps& maps, void* value, int64_t begin, int64_t end);)

}  // namespace fastprune
