// Exact selection of the k best scores over many tensors, scores computed on the fly.
//
// A score is computed in float32, or in float64 where a factor is float64 or it is noise, and
// becomes an integer key whose signed order is the order of the scores: -0 and +0 share a
// key, NaN gets the largest, and an element outside `within` gets the smallest. Keys are 32 bits,
// or 64 ("wide") where a score is float64; they live only in blocks that stay in the L1 cache.
//
// One pass over the factors usually suffices: a bracket around the threshold is guessed from a
// sample, the pass writes the masks as if the bracket's upper end were the threshold, counts, and
// keeps the few elements inside the bracket; those are then ranked exactly. The counts say whether
// the guess was right. Nothing here relies on it: a wrong one is replaced by an exact one, found by
// histograms over the keys. Every result is a function of the inputs alone, whatever the cuts.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/scalar_types.h"

namespace fastprune {

// noise: uniform in [0, 1), a function of the seed and the element's index; factors are not read.
enum class TopkScore : int { identity, magnitude, product, saliency, square, noise };

// Where the elements of a tensor that is not contiguous lie, in row-major order of their indices.
constexpr int kTopkDims = 8;
struct TopkStrides {
  int dims;  // at least 1
  int64_t sizes[kTopkDims];
  int64_t strides[kTopkDims];  // in elements
};

struct TopkTensor {
  const void* values;     // numel elements of `dtype`
  const void* other;      // numel elements of `other_dtype`, or null
  const uint8_t* within;  // numel bytes, nonzero = candidate, or null: all are
  uint8_t* mask;          // numel bytes, written with 0 or 1; with `packed` one bit per element
  int64_t numel;
  DType dtype;
  DType other_dtype;
  const TopkStrides* values_strides = nullptr;  // null: contiguous
  const TopkStrides* other_strides = nullptr;
  double scale = 1.0;  // multiplies the score, rounded to the score's type
  int64_t first = 0;   // index of its first element among all tensors', for noise
};

struct TopkProblem {
  const TopkTensor* tensors;
  TopkScore score;
  bool wide;            // 64-bit keys; required where a score is computed in float64
  bool scaled = false;  // some scale is not 1: scores are then signed, whatever their kind
  bool packed = false;  // masks of bits, the lowest of a byte first; spans begin at multiples of 64
  uint64_t seed = 0;    // of the noise
};

// Elements [begin, end) of one tensor.
struct TopkSpan {
  int64_t tensor, begin, end;
};

constexpr int64_t kTopkChunk = 32768;       // elements; a position inside a chunk fits 16 bits
constexpr int64_t kTopkBins = 2048;         // of a histogram
constexpr int64_t kTopkSquareBins = 32768;  // of magnitudes: the upper half of a nonnegative key

// Splits the keys into five classes: above > bounds[0] >= top > bounds[1] >= inside > bounds[2]
// >= bottom > bounds[3] >= below. `top` and `bottom` hold one key each, or none: a massed value at
// an end of the bracket is only counted.
struct TopkBracket {
  int64_t bounds[4];
};

// A span of at most kTopkChunk elements, and what the filter pass found in it.
struct TopkChunk {
  TopkSpan span;
  int64_t above, top, inside, bottom;  // elements of each class
  int64_t first;                       // where its inside elements start among the candidates
  bool has_nan;                        // among the elements within
};

// Inside elements, chunk after chunk, in order.
struct TopkCandidates {
  void* keys;           // int32 or, wide, int64; room for capacity
  uint16_t* positions;  // inside their chunk
  int64_t capacity;     // past it, elements are counted but not kept
};

// What one selection of a pass is after: all of them share the factors, scores and restrictions.
struct TopkJob {
  const TopkProblem* problem;  // whose masks are written
  TopkChunk* chunks;
  TopkBracket bracket;
  TopkCandidates candidates;
};

// Of the kept elements of some span: how many, the least score and the sum of scores.
struct TopkKept {
  int64_t count;
  double least, sum;  // +infinity and 0 where there is none
};

// The rank-th largest of some keys: `above` keys are larger, `equal` are the same.
struct TopkThreshold {
  int64_t key, above, equal;
};

// Why a direct selection failed, if it did: the first span at fault.
struct TopkStatus {
  enum Kind : int { ok, has_nan, too_few } kind;
  int64_t span;
  int64_t candidates;
};

// Unnamed: each translation unit, hence each ISA, keeps its own copy.
namespace {

// The keys that stand for "not a candidate" and NaN, below and above every score.
inline int64_t topk_lowest_key(bool wide) { return wide ? INT64_MIN : INT32_MIN; }
inline int64_t topk_highest_key(bool wide) { return wide ? INT64_MAX : INT32_MAX; }

// A histogram of the keys in [lo, hi] has bins 2^shift keys wide.
inline int topk_shift(int64_t lo, int64_t hi) {
  const uint64_t range = static_cast<uint64_t>(hi) - static_cast<uint64_t>(lo);
  const int bits = range == 0 ? 0 : 64 - __builtin_clzll(range);
  return bits > 11 ? bits - 11 : 0;
}

// Walks the bins from the top to the one that holds the rank-th largest key: [lo, hi] becomes its
// range, `above` (the keys over hi) grows by what was passed, and the number inside is returned.
inline int64_t topk_narrow(const int64_t* histogram, int64_t rank, int64_t& lo, int64_t& hi,
                           int64_t& above) {
  const int shift = topk_shift(lo, hi);
  int64_t bin = kTopkBins - 1;
  for (; bin > 0 && above + histogram[bin] < rank; --bin) above += histogram[bin];
  const uint64_t first = static_cast<uint64_t>(lo) + (static_cast<uint64_t>(bin) << shift);
  const uint64_t left = static_cast<uint64_t>(hi) - first;
  const uint64_t width = (uint64_t{1} << shift) - 1;
  lo = static_cast<int64_t>(first);
  hi = static_cast<int64_t>(first + (left < width ? left : width));
  return histogram[bin];
}

}  // namespace

FASTPRUNE_PER_ISA(
    // Number of nonzero bytes.
    int64_t topk_count(const uint8_t* within, int64_t n);
    // Writes the keys of about `wanted` elements, spread evenly over the chunks and jittered, that
    // are candidates. Returns how many; at most wanted. keys: room for wanted + 64.
    int64_t topk_sample(const TopkProblem& problem, const TopkChunk* chunks, int64_t n_chunks,
                        int64_t elements, int64_t wanted, void* keys);
    // The same for the samples [first, last) of those wanted.
    int64_t topk_sample_part(const TopkProblem& problem, const TopkChunk* chunks, int64_t n_chunks,
                             int64_t elements, int64_t wanted, int64_t first, int64_t last,
                             void* keys);
    // The rank-th largest of n keys, 1 <= rank <= n. There is room for 64 keys more, which are
    // overwritten. scratch: room for n / 2 + 64 keys.
    TopkThreshold topk_select(bool wide, void* keys, int64_t n, int64_t rank, void* scratch);
    // Fills in the chunks [begin, end), appends their inside elements to `candidates` (`first`
    // counts from its start) and writes the masks: 1 for the classes above and top, else 0.
    void topk_filter(const TopkProblem& problem, TopkChunk* chunks, int64_t begin, int64_t end,
                     const TopkBracket& bracket, const TopkCandidates& candidates);
    // The same for several selections: the factors are read once.
    void topk_filter_all(const TopkJob* jobs, int64_t n_jobs, int64_t begin, int64_t end);
    // What the finished mask keeps of a span; NaN scores that are not kept do not count.
    TopkKept topk_kept(const TopkProblem& problem, const TopkSpan& span);
    // Adds the keys in [lo, hi] of the chunks [begin, end) to histogram[kTopkBins].
    void topk_histogram(const TopkProblem& problem, const TopkChunk* chunks, int64_t begin,
                        int64_t end, int64_t lo, int64_t hi, int64_t* histogram);
    // Adds the elements of the chunks [begin, end) to bins of the upper bits of their keys, which
    // are magnitudes: how many, and the sum of squares in float64, in order. A NaN makes it NaN.
    void topk_square_bins(const TopkProblem& problem, const TopkChunk* chunks, int64_t begin,
                          int64_t end, int64_t* counts, double* sums);
    // mask = 1 for the chunks' candidates above the threshold and the first `ties` equal to it.
    void topk_accept(const TopkProblem& problem, const TopkChunk* chunks, int64_t n_chunks,
                     const TopkCandidates& candidates, int64_t key, int64_t ties);
    // Elements of the chunk whose score has this key: mask = 1 for the first `ties`, 0 for others.
    void topk_settle_ties(const TopkProblem& problem, const TopkChunk& chunk, int64_t key,
                          int64_t ties);
    // The whole selection of k among a few elements, their keys held at once.
    // scratch: topk_direct_scratch(elements) bytes.
    TopkStatus topk_direct(const TopkProblem& problem, const TopkSpan* spans, int64_t n_spans,
                           int64_t k, void* scratch);
    int64_t topk_direct_scratch(bool wide, int64_t elements);
    // topk_direct for each of the rows [begin, end) of `cols` elements of one tensor, apart.
    TopkStatus topk_rows(const TopkProblem& problem, int64_t tensor, int64_t cols, int64_t begin,
                         int64_t end, int64_t k, void* scratch);
    // norms[r] = l2 norm of the scores of row r, in float64. The sum is fixed to the last bit: 16
    // partial sums of the elements j, j + 16, ..., then halves added up: 8, 4, 2, 1.
    void topk_norms(const TopkProblem& problem, int64_t tensor, int64_t cols, int64_t begin,
                    int64_t end, double* norms);)

}  // namespace fastprune
