// Small tables for kernels, sent as kernel arguments: what a CUDA graph keeps of a call.
#pragma once

#include <cstring>
#include <vector>

#include "kernels/cuda/cuda.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

constexpr int kUploadWords = 496;  // with the rest under the 4 KB that every driver takes
constexpr int kUploadThreads = 256;

struct TopkUpload {
  uint64_t* table;
  int64_t n, words;  // how many to copy now, and how many to clear from table + clear_from on
  int64_t clear_from;
  int64_t* status;  // null: not now
  uint64_t word[kUploadWords];
};
static_assert(sizeof(TopkUpload) <= 4096 - 64);

#if defined(__CUDACC__) || defined(FASTPRUNE_EMULATED)

namespace {

__global__ void __launch_bounds__(kUploadThreads)
    upload_kernel(const __grid_constant__ TopkUpload u) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kUploadThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kUploadThreads + threadIdx.x;
  for (int64_t i = first; i < u.n; i += step) u.table[i] = u.word[i];
  for (int64_t i = first; i < u.words; i += step) u.table[u.clear_from + i] = 0;
  if (u.status != nullptr && first < 2) u.status[first] = INT64_MAX;
}

// `table` of 64-bit words to the device, and `cleared` words behind it set to 0; both entries of
// the status are set to "nothing wrong".
inline cudaError_t upload(const std::vector<uint64_t>& table, uint64_t* to, int64_t cleared,
                          int64_t* status, cudaStream_t stream) {
  const int64_t all = static_cast<int64_t>(table.size());
  for (int64_t at = 0; at == 0 || at < all; at += kUploadWords) {
    TopkUpload u{};
    u.table = to + at;
    u.n = all - at < kUploadWords ? all - at : kUploadWords;
    u.words = at == 0 ? cleared : 0;
    u.clear_from = all;
    u.status = at == 0 ? status : nullptr;
    if (u.n > 0) std::memcpy(u.word, table.data() + at, static_cast<size_t>(u.n) * 8);
    const int64_t work = u.words > u.n ? u.words : u.n + 1;
    const int64_t blocks = (work + 4 * kUploadThreads - 1) / (4 * kUploadThreads);
    const cudaError_t error =
        launch(upload_kernel, dim3(static_cast<unsigned>(blocks < 256 ? blocks : 256)),
               dim3(kUploadThreads), 0, stream, u);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

#endif

// Appends the words of a host struct or array, and says at which word they begin.
template <typename T>
int64_t append(std::vector<uint64_t>& table, const T* from, int64_t n) {
  static_assert(sizeof(T) % sizeof(uint64_t) == 0);
  const int64_t begin = static_cast<int64_t>(table.size());
  table.resize(table.size() + static_cast<size_t>(n) * sizeof(T) / sizeof(uint64_t));
  if (n > 0) std::memcpy(table.data() + begin, from, static_cast<size_t>(n) * sizeof(T));
  return begin;
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
