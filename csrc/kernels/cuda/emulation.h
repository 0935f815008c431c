// A block of CUDA threads on the host: enough of CUDA's language and runtime to run the kernels of
// this folder under the CPU's tests.
//
// The threads of a block are fibers of one thread of the host. A fiber runs until it meets a
// barrier or a warp collective; which one runs next is drawn from a seed, so that a missing barrier
// shows as a result that changes. Blocks run one after another, in an order drawn likewise. Shared
// memory is filled with 0xff before each block. A collective that some lane of its mask never
// reaches, a divergent barrier and a launch beyond a GPU's limits are errors. Speed, caches and
// the ordering of memory between blocks are not emulated.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct int2 {
  int x, y;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = struct EmulatedStream*;
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };

namespace fastprune::emulation {

// Where the running fiber stands.
struct Position {
  dim3 thread, block, block_size, grid_size;
};
extern Position position;

cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
void* shared_memory();
void block_barrier();

// All lanes of `mask` meet: each brings its value, and gets all 32 (stale where no lane is).
const uint64_t* exchange(unsigned mask, uint64_t value);
int lane();

// cp.async: copies are held back until they are waited for, so that a missing wait shows.
void copy_async(void* to, const void* from, int bytes, int read);
void commit_copies();
void wait_for_copies(int groups_left);

// Seeds the order of threads and blocks; multiprocessors as seen by device_limits().
void configure(uint64_t seed, int multiprocessors);
int multiprocessors();
const char* last_failure();

}  // namespace fastprune::emulation

#define threadIdx (::fastprune::emulation::position.thread)
#define blockIdx (::fastprune::emulation::position.block)
#define blockDim (::fastprune::emulation::position.block_size)
#define gridDim (::fastprune::emulation::position.grid_size)

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : fastprune::emulation::last_failure();
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

inline void __syncthreads() { fastprune::emulation::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { fastprune::emulation::exchange(mask, 0); }
inline void __threadfence() {}

namespace fastprune::emulation {
template <typename T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <typename T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}
}  // namespace fastprune::emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  namespace e = fastprune::emulation;
  const int first = e::lane() & ~(width - 1);
  return e::from_word<T>(e::exchange(mask, e::to_word(value))[first + (source & (width - 1))]);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  namespace e = fastprune::emulation;
  const int me = e::lane(), from = me - static_cast<int>(delta);
  const uint64_t* all = e::exchange(mask, e::to_word(value));
  return from < (me & ~(width - 1)) ? value : e::from_word<T>(all[from]);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  namespace e = fastprune::emulation;
  const int me = e::lane(), from = me + static_cast<int>(delta);
  const uint64_t* all = e::exchange(mask, e::to_word(value));
  return from > (me | (width - 1)) ? value : e::from_word<T>(all[from]);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  namespace e = fastprune::emulation;
  const int me = e::lane(), from = me ^ lane_mask;
  const uint64_t* all = e::exchange(mask, e::to_word(value));
  return from > (me | (width - 1)) ? value : e::from_word<T>(all[from]);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* all = fastprune::emulation::exchange(mask, predicate != 0);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) != 0 && all[i] != 0) bits |= 1u << i;
  }
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t mine = fastprune::emulation::to_word(value);
  const uint64_t* all = fastprune::emulation::exchange(mask, mine);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) != 0 && all[i] == mine) bits |= 1u << i;
  }
  return bits;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  const uint64_t* all = fastprune::emulation::exchange(mask, value);
  unsigned sum = 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) != 0) sum += static_cast<unsigned>(all[i]);
  }
  return sum;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  const uint64_t* all = fastprune::emulation::exchange(mask, value);
  unsigned most = 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) != 0) most = std::max(most, static_cast<unsigned>(all[i]));
  }
  return most;
}

// Fibers are never interrupted inside these.
template <typename T, typename U>
T atomicAdd(T* at, U value) {
  const T before = *at;
  *at = static_cast<T>(before + static_cast<T>(value));
  return before;
}
template <typename T, typename U>
T atomicMax(T* at, U value) {
  const T before = *at;
  *at = std::max(before, static_cast<T>(value));
  return before;
}
template <typename T, typename U>
T atomicMin(T* at, U value) {
  const T before = *at;
  *at = std::min(before, static_cast<T>(value));
  return before;
}
template <typename T, typename U>
T atomicOr(T* at, U value) {
  const T before = *at;
  *at = before | static_cast<T>(value);
  return before;
}
template <typename T, typename U>
T atomicAnd(T* at, U value) {
  const T before = *at;
  *at = before & static_cast<T>(value);
  return before;
}
template <typename T, typename U>
T atomicExch(T* at, U value) {
  const T before = *at;
  *at = static_cast<T>(value);
  return before;
}
template <typename T, typename U, typename V>
T atomicCAS(T* at, U expected, V value) {
  const T before = *at;
  if (before == static_cast<T>(expected)) *at = static_cast<T>(value);
  return before;
}

template <typename T>
T __ldg(const T* at) {
  return *at;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i) & 0xfu;
    unsigned byte = static_cast<unsigned>(both >> (8 * (pick & 7u))) & 0xffu;
    if ((pick & 8u) != 0) byte = (byte & 0x80u) != 0 ? 0xffu : 0;
    out |= byte << (8 * i);
  }
  return out;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31u));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (shift & 31u) >> 32);
}
inline float __uint_as_float(unsigned u) { return fastprune::emulation::from_word<float>(u); }
inline unsigned __float_as_uint(float f) {
  return static_cast<unsigned>(fastprune::emulation::to_word(f));
}
inline long long __double_as_longlong(double d) {
  return static_cast<long long>(fastprune::emulation::to_word(d));
}
inline double __longlong_as_double(long long x) {
  return fastprune::emulation::from_word<double>(static_cast<uint64_t>(x));
}
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;  // never contracted into an FMA
  return product;
}
inline float __fadd_rn(float a, float b) {
  volatile float sum = a + b;
  return sum;
}
inline double __dmul_rn(double a, double b) {
  volatile double product = a * b;
  return product;
}
inline double __dadd_rn(double a, double b) {
  volatile double sum = a + b;
  return sum;
}
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
using std::fma;
using std::fmaf;
using std::max;
using std::min;
