#include "kernels/cpu/global_topk_mask.h"

#include <cstring>

#include "kernels/cpu/topk_keys.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// The elements at the given places of one tensor.
template <typename T, typename S>
void gather(const void* from, const TopkStrides* strides, const int64_t* places, int64_t count,
            T* out) {
  const S* p = static_cast<const S*>(from);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = strides == nullptr ? places[i] : strided_offset(*strides, places[i]);
    out[i] = static_cast<T>(widen(p[at]));
  }
}

template <typename T>
void gather(DType dtype, const void* from, const TopkStrides* strides, const int64_t* places,
            int64_t count, T* out) {
  switch (dtype) {
    case DType::f32:
      return gather<T, float>(from, strides, places, count, out);
    case DType::f64:
      return gather<T, double>(from, strides, places, count, out);
    case DType::bf16:
      return gather<T, BFloat16>(from, strides, places, count, out);
    default:
      return gather<T, Float16>(from, strides, places, count, out);
  }
}

template <typename T, typename K>
int64_t sample_keys(const TopkProblem& problem, const TopkTensor& t, const int64_t* offsets,
                    int64_t count, K* keys) {
  alignas(64) T a[kBlock], b[kBlock];
  if (problem.score == TopkScore::noise) {
    for (int64_t i = 0; i < count; ++i) {
      a[i] = static_cast<T>(uniform(problem.seed, t.first + offsets[i]));
    }
  } else {
    gather(t.dtype, t.values, t.values_strides, offsets, count, a);
  }
  if (t.other != nullptr) gather(t.other_dtype, t.other, t.other_strides, offsets, count, b);
  const T* second = t.other == nullptr ? a : b;
  problem.scaled ? scaled_keys(problem.score, a, second, static_cast<T>(t.scale), count, keys)
                 : fuse_keys(problem.score, a, second, count, keys);
  if (t.within == nullptr) return count;
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    keys[kept] = keys[i];
    kept += t.within[offsets[i]] != 0 ? 1 : 0;
  }
  return kept;
}

template <typename K>
int64_t sample(const TopkProblem& problem, const TopkChunk* chunks, int64_t n_chunks,
               int64_t elements, int64_t wanted, int64_t next, int64_t last, K* keys) {
  // Element i * step + (something below step): stratified, and no period of the data can hide.
  const int64_t step = elements / wanted > 0 ? elements / wanted : 1;
  int64_t offsets[kBlock], count = 0, found = 0, first = 0, i = next;
  for (int64_t c = 0; c < n_chunks && i < last; ++c) {
    const TopkSpan& span = chunks[c].span;
    const TopkTensor& t = problem.tensors[span.tensor];
    const int64_t end = first + span.end - span.begin;
    while (i < last) {
      uint64_t hash = static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15u;
      hash = (hash ^ (hash >> 29)) * 0xbf58476d1ce4e5b9u;
      const int64_t at =
          i * step + static_cast<int64_t>((hash >> 33) % static_cast<uint64_t>(step));
      if (at < end) offsets[count++] = span.begin + at - first, ++i;
      const bool leave = at >= end || i == last;
      if (count == kBlock || (leave && count > 0)) {
        if constexpr (sizeof(K) == 8) {
          found += is_double(problem, t)
                       ? sample_keys<double>(problem, t, offsets, count, keys + found)
                       : sample_keys<float>(problem, t, offsets, count, keys + found);
        } else {
          found += sample_keys<float>(problem, t, offsets, count, keys + found);
        }
        count = 0;
      }
      if (leave) break;
    }
    first = end;
  }
  return found;
}

constexpr int64_t round_up(int64_t n) { return (n + 63) / 64 * 64; }  // after padding

template <typename K>
TopkStatus direct(const TopkProblem& problem, const TopkSpan* spans, int64_t n_spans, int64_t k,
                  K* keys) {
  using Traits = KeyTraits<K>;
  int64_t total = 0;
  bool restricted = false;
  for (int64_t s = 0; s < n_spans; ++s) {
    const TopkTensor& t = problem.tensors[spans[s].tensor];
    restricted |= t.within != nullptr;
    for (int64_t at = spans[s].begin; at < spans[s].end; at += kBlock) {
      const int64_t n = spans[s].end - at < kBlock ? spans[s].end - at : kBlock;
      if (make_keys(problem, t, at, n, keys + total)) {
        return {TopkStatus::has_nan, s, 0};
      }
      total += n;  // the padding is overwritten by the next block
    }
  }
  pad(keys, total);
  const int64_t present = restricted ? count_greater(keys, total, Traits::lowest) : total;
  if (k > present) return {TopkStatus::too_few, 0, present};
  K bound = k == 0 ? Traits::highest : Traits::lowest;  // mask = key > bound, and some ties
  int64_t ties = 0;
  if (k > 0 && k < present) {
    const TopkThreshold t = select_key(keys, total, k, keys + round_up(total));
    const bool all = t.above + t.equal == k;
    bound = static_cast<K>(all ? t.key - 1 : t.key);
    ties = all ? 0 : k - t.above;
  }
  const K* key = keys;
  for (int64_t s = 0; s < n_spans; ++s) {
    const int64_t n = spans[s].end - spans[s].begin;
    uint8_t* mask = problem.tensors[spans[s].tensor].mask;
    if (problem.packed) {  // whole words: bits past the end are 0
      for (int64_t i = 0; i < n; i += 64) {
        const int64_t count = n - i < 64 ? n - i : 64;
        uint64_t bits = 0;
        for (int64_t j = 0; j < count; ++j) bits |= static_cast<uint64_t>(key[i + j] > bound) << j;
        put_mask(true, bits, spans[s].begin + i, count, mask);
      }
    } else {
      mask += spans[s].begin;
      for (int64_t i = 0; i < n; ++i) mask[i] = key[i] > bound ? 1 : 0;
      mask -= spans[s].begin;
    }
    for (int64_t i = 0; i < n && ties > 0; ++i) {
      if (key[i] == bound) put_mask(problem.packed, true, spans[s].begin + i, mask), --ties;
    }
    key += n;
  }
  return {TopkStatus::ok, 0, present};
}

template <typename T>
void square_scores(const TopkProblem& problem, const TopkTensor& t, int64_t begin, int64_t n,
                   double* out) {
  alignas(64) T buffer_a[kBlock], buffer_b[kBlock], scores[kBlock];
  const T* a = first_factor(problem, t, begin, n, buffer_a);
  fuse_scores(problem.score, a, second_factor(t, begin, n, a, buffer_b), n, scores);
  const T scale = static_cast<T>(t.scale);
  for (int64_t i = 0; problem.scaled && i < n; ++i) scores[i] *= scale;
  for (int64_t i = 0; i < n; ++i) {
    const double score = scores[i];
    out[i] = score * score;
  }
}

// Apart from the squaring, and not inlined: a fused multiply-add would round differently where the
// squares of float64 scores are inexact.
__attribute__((noinline)) void add_lanes(const double* squares, int64_t n, double* lanes) {
  double sums[16];
  for (int j = 0; j < 16; ++j) sums[j] = lanes[j];
  for (int64_t i = 0; i < n; i += 16) {
    for (int j = 0; j < 16; ++j) sums[j] += squares[i + j];
  }
  for (int j = 0; j < 16; ++j) lanes[j] = sums[j];
}

// The upper half of the 16 sums added to the lower, and so on.
inline double add_up(double* lanes) {
  for (int half = 8; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

}  // namespace

int64_t topk_count(const uint8_t* within, int64_t n) {
  int64_t total = 0;
  constexpr int64_t kRun = 1 << 16;  // counts of a run fit 32 bits: four times the lanes
  for (int64_t at = 0; at < n; at += kRun) {
    const int64_t end = n - at < kRun ? n : at + kRun;
    uint32_t count = 0;
    for (int64_t i = at; i < end; ++i) count += within[i] != 0 ? 1 : 0;
    total += count;
  }
  return total;
}

namespace {

template <typename K>
TopkKept kept(const TopkProblem& problem, const TopkSpan& span) {
  TopkTensor t = problem.tensors[span.tensor];
  t.within = nullptr;  // the mask says more
  uint8_t bytes[kBlock];
  alignas(64) K keys[kBlock];
  alignas(64) double scores[kBlock];
  TopkKept result{0, 0.0, 0.0};
  Vec<K> least = broadcast(KeyTraits<K>::highest);
  double sums[16] = {};
  for (int64_t at = span.begin; at < span.end; at += kBlock) {
    const int64_t n = span.end - at < kBlock ? span.end - at : kBlock;
    const uint8_t* mask = t.mask + at;
    if (problem.packed) {
      for (int64_t i = 0; i < n; i += 64) {
        uint64_t bits = 0;
        const int64_t count = n - i < 64 ? n - i : 64;
        std::memcpy(&bits, t.mask + (at + i) / 8, static_cast<size_t>((count + 7) / 8));
        write_bits(bits, 64, bytes + i);
      }
      mask = bytes;
    }
    make_keys(problem, t, at, n, keys);
    restrict_keys(mask, n, keys);
    result.count += topk_count(mask, n);
    // Up to the next multiple of 64, keys are the lowest: no elements.
    for (int64_t i = 0; i < n; i += kLanes<K>) {
      const Vec<K> v = load(keys + i);
      const Vec<K> some = v != KeyTraits<K>::lowest ? v : broadcast(KeyTraits<K>::highest);
      least = some < least ? some : least;
      store(keys + i, score_bits<K>(v != KeyTraits<K>::lowest ? v : broadcast(K{0})));
    }
    typename KeyTraits<K>::Score narrow[kBlock];
    std::memcpy(narrow, keys, sizeof(keys));
    for (int64_t i = 0; i < (n + 15) / 16 * 16; ++i) scores[i] = narrow[i];
    add_lanes(scores, (n + 15) / 16 * 16, sums);
  }
  result.sum = add_up(sums);
  K smallest = KeyTraits<K>::highest;
  for (int j = 0; j < kLanes<K>; ++j) smallest = least[j] < smallest ? least[j] : smallest;
  result.least = result.count > 0 ? score_of(smallest) : __builtin_inf();
  return result;
}

}  // namespace

int64_t topk_sample(const TopkProblem& problem, const TopkChunk* chunks, int64_t n_chunks,
                    int64_t elements, int64_t wanted, void* keys) {
  return topk_sample_part(problem, chunks, n_chunks, elements, wanted, 0, wanted, keys);
}

int64_t topk_sample_part(const TopkProblem& problem, const TopkChunk* chunks, int64_t n_chunks,
                         int64_t elements, int64_t wanted, int64_t first, int64_t last,
                         void* keys) {
  return problem.wide ? sample(problem, chunks, n_chunks, elements, wanted, first, last,
                               static_cast<int64_t*>(keys))
                      : sample(problem, chunks, n_chunks, elements, wanted, first, last,
                               static_cast<int32_t*>(keys));
}

TopkThreshold topk_select(bool wide, void* keys, int64_t n, int64_t rank, void* scratch) {
  return wide ? select_key(static_cast<int64_t*>(keys), n, rank, static_cast<int64_t*>(scratch))
              : select_key(static_cast<int32_t*>(keys), n, rank, static_cast<int32_t*>(scratch));
}

TopkKept topk_kept(const TopkProblem& problem, const TopkSpan& span) {
  return problem.wide ? kept<int64_t>(problem, span) : kept<int32_t>(problem, span);
}

int64_t topk_direct_scratch(bool wide, int64_t elements) {
  return (round_up(elements) + elements / 2 + 128) * (wide ? 8 : 4);
}

TopkStatus topk_direct(const TopkProblem& problem, const TopkSpan* spans, int64_t n_spans,
                       int64_t k, void* scratch) {
  return problem.wide ? direct(problem, spans, n_spans, k, static_cast<int64_t*>(scratch))
                      : direct(problem, spans, n_spans, k, static_cast<int32_t*>(scratch));
}

TopkStatus topk_rows(const TopkProblem& problem, int64_t tensor, int64_t cols, int64_t begin,
                     int64_t end, int64_t k, void* scratch) {
  for (int64_t r = begin; r < end; ++r) {
    const TopkSpan row{tensor, r * cols, (r + 1) * cols};
    TopkStatus status = topk_direct(problem, &row, 1, k, scratch);
    status.span = r;
    if (status.kind != TopkStatus::ok) return status;
  }
  return {TopkStatus::ok, 0, 0};
}

void topk_norms(const TopkProblem& problem, int64_t tensor, int64_t cols, int64_t begin,
                int64_t end, double* norms) {
  const TopkTensor& t = problem.tensors[tensor];
  alignas(64) double squares[kBlock];
  for (int64_t r = begin; r < end; ++r) {
    double lanes[16] = {};
    for (int64_t at = 0; at < cols; at += kBlock) {
      int64_t n = cols - at < kBlock ? cols - at : kBlock;
      is_double(problem, t) ? square_scores<double>(problem, t, r * cols + at, n, squares)
                            : square_scores<float>(problem, t, r * cols + at, n, squares);
      for (; n % 16 != 0; ++n) squares[n] = 0.0;
      add_lanes(squares, n, lanes);
    }
    norms[r] = __builtin_sqrt(add_up(lanes));
  }
}

}  // namespace fastprune::FASTPRUNE_ISA
