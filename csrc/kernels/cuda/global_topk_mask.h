// Exact selection of the k best scores over many tensors on the GPU; the same masks, to the bit, as
// kernels/cpu/global_topk_mask.h gives.
//
// A score becomes an unsigned key of 32 or, wide, 64 bits in the order of the scores; a tie goes to
// the earlier position, so key and inverted position together are unique, and the selection is a
// radix select over both, most significant digit first. Keys live in registers only. One read of
// the factors counts the first digit; the second read writes what that digit decides, keeps the few
// candidates of the boundary bin in a list, and counts their next digit; the list is then narrowed
// digit by digit. Where the candidates do not fit their list, further digits are counted in reads
// of the factors instead: the number is known before the list would be written, and nothing is ever
// cut off. Kernels that turn out not to be needed find a mark in device memory and return.
//
// Nothing is read back and nothing is allocated: everything can be captured in a CUDA graph.
// Counts are integers, added up in any order; no result depends on the order of threads or blocks.
#pragma once

#include "kernels/cpu/global_topk_mask.h"
#include "kernels/cuda/device.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// One tensor as the kernels read it: contiguous, at least one element. 64 bytes: tables of them
// travel to the device as kernel arguments, some sixty to a launch.
struct TopkSource {
  const void* values;     // numel elements of `dtype`; not read for noise
  const void* other;      // numel elements of `other_dtype`, or null
  const uint8_t* within;  // numel bytes, nonzero = candidate, or null: all are
  int64_t numel;
  int64_t first;        // index of its first element among all tensors', for noise
  double scale;         // multiplies the score, rounded to the score's type
  uint32_t first_tile;  // filled in by the launcher
  uint32_t problem;     // ascending; elements of different problems do not compete
  uint32_t index;       // of the tensor, for the status
  DType dtype : 8, other_dtype : 8;
  uint32_t aligned : 8;  // all pointers, masks too, to four elements
};
static_assert(sizeof(TopkSource) == 64, "a table is uploaded in words");

// How scores are made, and where bad data is told of.
struct TopkScoring {
  TopkScore score;
  bool wide;    // 64-bit keys; required where a score is computed in float64
  bool scaled;  // some scale is not 1
  bool packed;  // masks of bits, the lowest of a byte first; padding bits are written as 0
  uint64_t seed;
  // status[0]: least index of a tensor with a NaN among its candidates' scores; status[1]: least
  // index of a selection with fewer candidates than are to be kept, which keeps them all. kTopkFine
  // where there is none; written with that first, unless `more_status`.
  int64_t* status;
  bool more_status;
  uint32_t* mark;  // of device.h, or null: the caller looks at the status
};
constexpr int64_t kTopkFine = INT64_MAX;

// Whole tensors, in `problems` selections side by side, or (one problem only) in `selections` that
// differ in their counts and masks.
struct TopkSelections {
  TopkScoring scoring;
  const TopkSource* sources;  // on the host, ordered by problem; every problem has one
  int64_t n_sources;
  uint8_t* const* masks;  // on the host: selections x n_sources; aligned to 4 bytes if packed
  const int64_t* counts;  // on the host: selections x problems
  int64_t problems, selections;
  bool by_tensor;  // the status calls a problem by the index of its first source
};

// Bytes of scratch memory, aligned to 16: about a tenth of 32-bit scores.
int64_t topk_select_scratch(const TopkSelections& of);
cudaError_t topk_select(const TopkSelections& of, void* scratch, const DeviceLimits& limits,
                        cudaStream_t stream);

// Rows of tensors. A source's `first_tile` is the number of its first row among all; rows of
// tensors that are left out have numbers too.
struct TopkRows {
  TopkScoring scoring;
  const TopkSource* sources;  // on the host
  int64_t n_sources, n_rows;
  const int64_t* cols;  // on the host: less than 2^32
};
int64_t topk_rows_scratch(const TopkRows& of);

// Each row a selection of its own, counts[i] kept of each of source i, which has elements; masks of
// bytes. The status counts rows.
cudaError_t topk_rows(const TopkRows& of, uint8_t* const* masks, const int64_t* counts,
                      void* scratch, const DeviceLimits& limits, cudaStream_t stream);

// norms[r] = l2 norm of the scores of row r, in float64 and in the order of additions of topk_norms
// (kernels/cpu); alive[r] = whether the row has an element inside `within`.
cudaError_t topk_filter_norms(const TopkRows& of, double* norms, uint8_t* alive, void* scratch,
                              const DeviceLimits& limits, cudaStream_t stream);

// Writes a status that says that nothing is wrong.
cudaError_t topk_clear_status(int64_t* status, cudaStream_t stream);

// mask[i] = kept[i / cols] for n elements, as bytes or bits.
cudaError_t topk_expand_rows(const uint8_t* kept, int64_t cols, bool packed, uint8_t* mask,
                             int64_t n, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
