// Instructions that CUDA C++ has no name for: asynchronous copies into shared memory, matrix
// fragments, matrix products of a warp. In emulation, the same by definition of the PTX manual.
//
// Fragments (g = lane / 4, t = lane % 4), two 16-bit elements to a register, lower column first:
//   A 16 x 16: a[0] = (g, 2t..), a[1] = (g + 8, 2t..), a[2] = (g, 2t + 8..), a[3] = (g + 8, 2t
//   + 8..) B 16 x 8:  b[0] = rows 2t.. of column g, b[1] = rows 2t + 8.. of column g C 16 x 8:
//   c[0], c[1] = (g, 2t..), c[2], c[3] = (g + 8, 2t..)
// tf32: A 16 x 8: a[0] = (g, t), a[1] = (g + 8, t), a[2] = (g, t + 4), a[3] = (g + 8, t + 4);
//       B 8 x 8: b[0] = row t of column g, b[1] = row t + 4.
#pragma once

#include "kernels/cuda/cuda.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

constexpr unsigned kAllLanes = 0xffffffffu;

#if defined(FASTPRUNE_EMULATED)

template <int kBytes>
void copy_async(void* shared, const void* global, int read = kBytes) {
  emulation::copy_async(shared, global, kBytes, read);
}
template <int kBytes>
void copy_async_or_zero(void* shared, const void* global, bool read) {
  emulation::copy_async(shared, global, kBytes, read ? kBytes : 0);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kGroupsLeft>
void wait_for_copies() {
  emulation::wait_for_copies(kGroupsLeft);
}

template <typename T, bool kTransposed, int kMatrices>
void load_matrices(uint32_t* to, const T* row) {
  static_assert(sizeof(T) == 2);
  const uint64_t* rows = emulation::exchange(kAllLanes, emulation::to_word(row));
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (int m = 0; m < kMatrices; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int r = kTransposed ? 2 * t + i : g, c = kTransposed ? g : 2 * t + i;
      std::memcpy(&pair[i], emulation::from_word<const T*>(rows[8 * m + r]) + c, 2);
    }
    to[m] = uint32_t{pair[1]} << 16 | pair[0];
  }
}

namespace emulation_detail {
template <typename T>
double element(uint32_t pair, int which) {
  return static_cast<double>(widen(T{static_cast<uint16_t>(pair >> (16 * which))}));
}
inline double tf32_element(uint32_t bits) {
  return static_cast<double>(bits_to_float(bits & 0xffffe000u));
}
}  // namespace emulation_detail

template <typename T>
void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using emulation::exchange;
  uint64_t a01[32], a23[32], b01[32];
  std::memcpy(a01, exchange(kAllLanes, uint64_t{a[1]} << 32 | a[0]), sizeof a01);
  std::memcpy(a23, exchange(kAllLanes, uint64_t{a[3]} << 32 | a[2]), sizeof a23);
  std::memcpy(b01, exchange(kAllLanes, uint64_t{b[1]} << 32 | b[0]), sizeof b01);
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const uint64_t word = (k < 8 ? a01 : a23)[4 * g + k % 8 / 2];
      const uint32_t left = static_cast<uint32_t>(word >> (i < 2 ? 0 : 32));
      const uint32_t right =
          static_cast<uint32_t>(b01[4 * (2 * t + i % 2) + k % 8 / 2] >> (k < 8 ? 0 : 32));
      sum += emulation_detail::element<T>(left, k % 2) * emulation_detail::element<T>(right, k % 2);
    }
    c[i] = static_cast<float>(sum);
  }
}

inline void multiply_fragments_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using emulation::exchange;
  uint64_t a01[32], a23[32], b01[32];
  std::memcpy(a01, exchange(kAllLanes, uint64_t{a[1]} << 32 | a[0]), sizeof a01);
  std::memcpy(a23, exchange(kAllLanes, uint64_t{a[3]} << 32 | a[2]), sizeof a23);
  std::memcpy(b01, exchange(kAllLanes, uint64_t{b[1]} << 32 | b[0]), sizeof b01);
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 8; ++k) {
      const uint64_t word = (k < 4 ? a01 : a23)[4 * g + k % 4];
      const uint32_t left = static_cast<uint32_t>(word >> (i < 2 ? 0 : 32));
      const uint32_t right =
          static_cast<uint32_t>(b01[4 * (2 * t + i % 2) + k % 4] >> (k < 4 ? 0 : 32));
      sum += emulation_detail::tf32_element(left) * emulation_detail::tf32_element(right);
    }
    c[i] = static_cast<float>(sum);
  }
}

inline uint32_t to_tf32(float x) {  // to nearest, ties away from zero
  const uint32_t u = float_to_bits(x);
  return (u & 0x7f800000u) == 0x7f800000u ? u : (u + 0x1000u) & 0xffffe000u;
}

// The sum of the values of the lanes before this one.
inline uint32_t sum_before_lane(uint32_t value) {
  uint32_t sum = value;
  for (int o = 1; o < 32; o *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, sum, static_cast<unsigned>(o));
    if (emulation::lane() >= o) sum += other;
  }
  return sum - value;
}

#elif defined(__CUDACC__)

// The sum of the values of the lanes before this one. By hand: a shuffle says whether its source
// is in the warp, which __shfl_up_sync does not pass on; without it, a step is three instructions.
__device__ __forceinline__ uint32_t sum_before_lane(uint32_t value) {
  uint32_t sum = value;
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    asm volatile(
        "{ .reg .pred p; .reg .u32 other; shfl.sync.up.b32 other|p, %0, %1, 0, 0xffffffff; "
        "@p add.u32 %0, %0, other; }"
        : "+r"(sum)
        : "r"(o));
  }
  return sum - value;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Starts a copy of kBytes (4, 8 or 16, so aligned); what is past the first `read` becomes zero.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int read = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(kBytes), "r"(read)
                 : "memory");
  }
}
// The same for 16 bytes, all or none, which takes fewer instructions than a number of bytes.
template <int kBytes>
__device__ __forceinline__ void copy_async_or_zero(void* shared, const void* global, bool read) {
  static_assert(kBytes == 16);
  asm volatile(
      "{ .reg .pred p; setp.eq.u32 p, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, p; }" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(static_cast<uint32_t>(read))
      : "memory");
}
// Closes a group of this thread's copies.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kGroupsLeft of this thread's groups are under way. A barrier must follow
// before other threads read what was copied.
template <int kGroupsLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// kMatrices 8 x 8 matrices of 16-bit elements; lane i brings the address of row i % 8 of matrix
// i / 8 in shared memory, aligned to 16 bytes (lanes past 8 * kMatrices: any valid address).
template <typename T, bool kTransposed, int kMatrices>
__device__ __forceinline__ void load_matrices(uint32_t* to, const T* row) {
  static_assert(sizeof(T) == 2 && (kMatrices == 2 || kMatrices == 4));
  const uint32_t address = shared_address(row);
  if constexpr (kMatrices == 4 && kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
  }
}

// c += A B over bfloat16 or float16 fragments, accumulated in float32.
template <typename T>
__device__ __forceinline__ void multiply_fragments(float (&c)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply_fragments<BFloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                             const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply_fragments<Float16>(float (&c)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same over tf32 fragments, 16 x 8 by 8 x 8.
__device__ __forceinline__ void multiply_fragments_tf32(float (&c)[4], const uint32_t (&a)[4],
                                                        const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

#endif

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
