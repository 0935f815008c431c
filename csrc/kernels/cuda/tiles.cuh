// How a block multiplies groups of masked_linear_bitmap.h: its shared memory, and a warp's steps.
#pragma once

#include <type_traits>

#include "kernels/cuda/masked_linear_bitmap.h"
#include "kernels/cuda/warp.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

constexpr int kThreads = 256, kWarps = kThreads / 32;         // one band per warp
constexpr int kRowBytes = static_cast<int>(kGroupWords) * 4;  // of x in a group
constexpr int kHeadBytes = static_cast<int>(kHeadWords) * 4;
// What one of two blocks on a Hopper multiprocessor can have.
constexpr int kHalfOfShared = 113 << 10;
constexpr int kRoomBytes = 512;
// A dense group, in whole rooms.
constexpr int kLeastRing = (kHeadBytes + static_cast<int>(kBandRows) * kRowBytes + kRoomBytes - 1) /
                           kRoomBytes * kRoomBytes;
constexpr uint32_t kWarpBytes = 32 * 16;  // what a warp copies with one instruction
constexpr int kPlaces = 4;

// What a block keeps in shared memory: x in a ring of stages, each one group of columns; and for
// every warp a ring of bytes, where heads and values of its groups lie one behind the other, for
// groups differ in size: it holds one dense group, or several of the usual ones.
template <int NT>
struct Stages {
  static constexpr int kCount = NT <= 2 ? 4 : NT == 4 ? 3 : 2;
  static constexpr int kAhead = kCount - 1;
  static constexpr int kUnrolled = NT < 8 ? 8 : 2;  // steps: all of them need too many registers
  static constexpr int kBatch = 8 * NT;
  // Rows of x lie 16 bytes apart in the banks, so that fragments are read without conflicts.
  static constexpr int kPitch = kRowBytes + 16;
  static constexpr int kStageBytes = kBatch * kPitch;
  static constexpr int kXBytes = kCount * kStageBytes;
  static constexpr int kPlaceBytes = kWarps * kPlaces * 8;
  static constexpr int kOtherBytes = kPlaceBytes + kBatch * 4;
  static constexpr int kFixedBytes = kXBytes + kOtherBytes;
  // Of a warp's ring, where a block can have so much.
  static int ring_bytes(int shared_bytes) {
    const int most = shared_bytes < kHalfOfShared ? shared_bytes : kHalfOfShared;
    return (most - kFixedBytes) / kWarps / kRoomBytes * kRoomBytes;
  }
  static_assert(kHalfOfShared - kFixedBytes >= kWarps * (kLeastRing + kRoomBytes));
};

// Where a group begins in its warp's ring, and how many bytes of the ring groups took before it,
// those left free at the ring's end too.
struct RingPlace {
  uint32_t offset, passed;
};

// A 16-byte piece of x where rows are not aligned to it: of its columns, `left` exist.
template <typename T>
__device__ __forceinline__ void copy_piece(const T* from, int left, T* to) {
  for (int i = 0; i < 16 / static_cast<int>(sizeof(T)); ++i) to[i] = i < left ? from[i] : T{};
}

// Whether a word of x holds an infinity or a NaN: where an exponent is all ones, one more carries
// into the sign's place, and no further.
template <typename T>
__device__ __forceinline__ uint32_t not_finite_bits(uint32_t word) {
  constexpr uint32_t kOnes = sizeof(T) == 4                ? 0x7f800000u
                             : std::is_same_v<T, BFloat16> ? 0x7f807f80u
                                                           : 0x7c007c00u;
  constexpr uint32_t kSigns = sizeof(T) == 4 ? 0x80000000u : 0x80008000u;
  return ((word & kOnes) + (kSigns - kOnes)) & kSigns;
}

// Four words of a step: those that bits `first` to first + 3 of the head keep are read one behind
// the other from `at` on, which moves past them; the others are 0. By hand: the compiler copies a
// pointer that moves under a condition once more for each word. (Not volatile: what is read follows
// from the head that was read behind the same barrier.)
#if defined(__CUDACC__)
__device__ __forceinline__ void kept_words(uint32_t (&a)[4], uint32_t& at, uint32_t head,
                                           int first) {
  for (int i = 0; i < 4; ++i) a[i] = 0;
  asm("{ .reg .pred p<4>; .reg .u32 t<4>;"
      "and.b32 t0, %5, %6; and.b32 t1, %5, %7; and.b32 t2, %5, %8; and.b32 t3, %5, %9;"
      "setp.ne.u32 p0, t0, 0; setp.ne.u32 p1, t1, 0; setp.ne.u32 p2, t2, 0; setp.ne.u32 p3, t3, 0;"
      "@p0 ld.shared.u32 %0, [%4]; @p0 add.u32 %4, %4, 4;"
      "@p1 ld.shared.u32 %1, [%4]; @p1 add.u32 %4, %4, 4;"
      "@p2 ld.shared.u32 %2, [%4]; @p2 add.u32 %4, %4, 4;"
      "@p3 ld.shared.u32 %3, [%4]; @p3 add.u32 %4, %4, 4; }"
      : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]), "+r"(at)
      : "r"(head), "r"(1u << first), "r"(2u << first), "r"(4u << first), "r"(8u << first));
}
#else
inline void kept_words(uint32_t (&a)[4], const char*& at, uint32_t head, int first) {
  for (int i = 0; i < 4; ++i) {
    a[i] = 0;
    if ((head >> (first + i) & 1u) == 0) continue;
    std::memcpy(&a[i], at, 4);
    at += 4;
  }
}
inline const char* shared_address(const char* at) { return at; }
#endif

// Four 8 x 8 matrices of two bytes, or 8 x 4 of four, of a stage of x: fragments of two activation
// blocks for one step (32 bytes of columns), or of a single one for two steps.
template <typename T, int NT>
__device__ __forceinline__ void load_x(uint32_t (&b)[4], const char* x, int step, int block) {
  using Half = BFloat16;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const char* from = x + 32 * step;
  if constexpr (NT == 1) {
    from += lane % 8 * Stages<NT>::kPitch + 16 * (lane / 8);
  } else {
    from += (8 * (block + lane / 16) + lane % 8) * Stages<NT>::kPitch + 16 * (lane / 8 % 2);
  }
  load_matrices<Half, false, 4>(b, reinterpret_cast<const Half*>(from));
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = to_tf32(__uint_as_float(b[i]));
  }
}

template <typename T>
__device__ __forceinline__ void multiply_step(float (&sum)[4], const uint32_t (&a)[4], uint32_t x0,
                                              uint32_t x1) {
  const uint32_t b[2] = {x0, x1};
  if constexpr (sizeof(T) == 4) {
    multiply_fragments_tf32(sum, a, b);
  } else {
    multiply_fragments<T>(sum, a, b);
  }
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
