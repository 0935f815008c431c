// Many small complex matrices inverted at once, one in each lane of a vector.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/scalar_types.h"

namespace fastprune {

// (shift I + scale M)^-1 for `count` matrices M of order n; from and to: [matrix][row][column]
// [real, imaginary], apart or the same.
struct MonInvert {
  DType dtype;  // f32 or f64
  int64_t count, n;
  double scale, shift;
  const void* from;
  void* to;
};

FASTPRUNE_PER_ISA(
    // Groups of as many matrices as a vector has lanes.
    int64_t mon_invert_groups(const MonInvert& args);
    // Bytes of scratch, aligned to 64, for one thread.
    int64_t mon_invert_scratch(const MonInvert& args);
    // The groups [begin, end). No pivoting: for matrices whose Hermitian part is positive definite.
    // A pivot that is zero or not finite leaves a matrix that is not finite.
    void mon_invert(const MonInvert& args, int64_t begin, int64_t end, void* scratch);)

}  // namespace fastprune
