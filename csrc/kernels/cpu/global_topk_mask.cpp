#include "kernels/cpu/global_topk_mask.h"

#include <cstring>

#include "kernels/cpu/topk_keys.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

template <typename K, typename F>
inline void for_each_block(const TopkProblem& problem, const TopkSpan& span, F f) {
  alignas(64) K keys[kBlock];
  for (int64_t at = span.begin; at < span.end; at += kBlock) {
    const int64_t n = span.end - at < kBlock ? span.end - at : kBlock;
    const bool nan = make_keys(problem.score, problem.tensors[span.tensor], at, n, keys);
    f(keys, at, n, nan);
  }
}

template <typename K>
void filter(const TopkProblem& problem, TopkChunk& chunk, const TopkBracket& bracket,
            const TopkCandidates& out, int64_t& used) {
  K bounds[4];
  for (int i = 0; i < 4; ++i) bounds[i] = static_cast<K>(bracket.bounds[i]);
  const bool ends = bounds[0] != bounds[1] || bounds[2] != bounds[3];
  const TopkTensor& t = problem.tensors[chunk.span.tensor];
  int64_t above_top = 0, top = 0, inside = 0, bottom = 0;
  chunk.has_nan = false;
  chunk.first = used;
  for_each_block<K>(problem, chunk.span, [&](const K* keys, int64_t at, int64_t n, bool nan) {
    chunk.has_nan |= nan;
    for (int64_t i = 0; i < n; i += 64) {
      const uint64_t over = greater_bits(keys + i, bounds[1]);
      const uint64_t over_bottom = greater_bits(keys + i, bounds[2]);
      write_bits(over, n - i < 64 ? n - i : 64, t.mask + at + i);
      above_top += __builtin_popcountll(over);
      uint64_t in = over_bottom & ~over;
      const int found = __builtin_popcountll(in);
      inside += found;
      if (ends) {
        top += __builtin_popcountll(over & ~greater_bits(keys + i, bounds[0]));
        bottom += __builtin_popcountll(greater_bits(keys + i, bounds[3]) & ~over_bottom);
      }
      if (used + 64 > out.capacity) continue;
      const int64_t position = at - chunk.span.begin + i;
      int64_t slot = used;
      const auto append = [&] {
        const int bit = __builtin_ctzll(in | uint64_t{1} << 63);
        static_cast<K*>(out.keys)[slot] = keys[i + bit];
        out.positions[slot++] = static_cast<uint16_t>(position + bit);
        in &= in - 1;
      };
      // Mostly none to two of 64: two slots are written in any case, since branches that cannot be
      // foreseen would cost more.
      append();
      append();
      while (in != 0) append();
      used += found;
    }
  });
  chunk.above = above_top - top;
  chunk.top = top;
  chunk.inside = inside;
  chunk.bottom = bottom;
}

template <typename K>
void histogram(const TopkProblem& problem, const TopkSpan& span, int64_t lo, int64_t hi,
               int64_t (*bins)[kTopkBins + 1]) {
  for_each_block<K>(problem, span, [&](const K* keys, int64_t, int64_t n, bool) {
    add_to_bins(keys, n, static_cast<K>(lo), static_cast<K>(hi), bins);
  });
}

template <typename K>
void accept(const TopkProblem& problem, const TopkChunk& chunk, const TopkCandidates& candidates,
            int64_t key, int64_t& ties) {
  uint8_t* mask = problem.tensors[chunk.span.tensor].mask + chunk.span.begin;
  const K* keys = static_cast<const K*>(candidates.keys) + chunk.first;
  const uint16_t* positions = candidates.positions + chunk.first;
  for (int64_t i = 0; i < chunk.inside; ++i) {
    const bool tie = keys[i] == key && ties > 0;
    ties -= tie ? 1 : 0;
    mask[positions[i]] = keys[i] > key || tie ? 1 : 0;
  }
}

template <typename K>
void settle_ties(const TopkProblem& problem, const TopkSpan& span, K key, int64_t ties) {
  uint8_t* mask = problem.tensors[span.tensor].mask;
  for_each_block<K>(problem, span, [&](const K* keys, int64_t at, int64_t n, bool) {
    for (int64_t i = 0; i < n; i += 64) {
      const uint64_t equal =
          greater_bits(keys + i, static_cast<K>(key - 1)) & ~greater_bits(keys + i, key);
      if (equal == 0) continue;
      uint64_t kept = equal;
      int64_t surplus = __builtin_popcountll(equal) - ties;
      for (; surplus > 0; --surplus) kept &= ~(uint64_t{1} << (63 - __builtin_clzll(kept)));
      ties -= __builtin_popcountll(kept);
      uint8_t is_equal[64], is_kept[64];
      write_bits(equal, 64, is_equal);
      write_bits(kept, 64, is_kept);
      uint8_t* m = mask + at + i;
      for (int64_t j = 0; j < (n - i < 64 ? n - i : 64); ++j) {
        m[j] = static_cast<uint8_t>((m[j] & ~is_equal[j]) | is_kept[j]);
      }
    }
  });
}

// Keys of `count` elements at the given offsets of one tensor.
template <typename T, typename S>
void gather(const void* from, const int64_t* offsets, int64_t count, T* out) {
  const S* p = static_cast<const S*>(from);
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(widen(p[offsets[i]]));
}

template <typename T>
void gather(DType dtype, const void* from, const int64_t* offsets, int64_t count, T* out) {
  switch (dtype) {
    case DType::f32:
      return gather<T, float>(from, offsets, count, out);
    case DType::f64:
      return gather<T, double>(from, offsets, count, out);
    case DType::bf16:
      return gather<T, BFloat16>(from, offsets, count, out);
    default:
      return gather<T, Float16>(from, offsets, count, out);
  }
}

template <typename T, typename K>
int64_t sample_keys(TopkScore score, const TopkTensor& t, const int64_t* offsets, int64_t count,
                    K* keys) {
  alignas(64) T a[kBlock], b[kBlock];
  gather(t.dtype, t.values, offsets, count, a);
  if (t.other != nullptr) gather(t.other_dtype, t.other, offsets, count, b);
  fuse_keys(score, a, t.other == nullptr ? a : b, count, keys);
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
               int64_t elements, int64_t wanted, K* keys) {
  // Element i * step + (something below step): stratified, and no period of the data can hide.
  const int64_t step = elements / wanted > 0 ? elements / wanted : 1;
  int64_t offsets[kBlock], count = 0, found = 0, first = 0, i = 0;
  for (int64_t c = 0; c < n_chunks && i < wanted; ++c) {
    const TopkSpan& span = chunks[c].span;
    const TopkTensor& t = problem.tensors[span.tensor];
    const int64_t end = first + span.end - span.begin;
    while (i < wanted) {
      uint64_t hash = static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15u;
      hash = (hash ^ (hash >> 29)) * 0xbf58476d1ce4e5b9u;
      const int64_t at =
          i * step + static_cast<int64_t>((hash >> 33) % static_cast<uint64_t>(step));
      if (at < end) offsets[count++] = span.begin + at - first, ++i;
      const bool leave = at >= end || i == wanted;
      if (count == kBlock || (leave && count > 0)) {
        if constexpr (sizeof(K) == 8) {
          found += is_double(t)
                       ? sample_keys<double>(problem.score, t, offsets, count, keys + found)
                       : sample_keys<float>(problem.score, t, offsets, count, keys + found);
        } else {
          found += sample_keys<float>(problem.score, t, offsets, count, keys + found);
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
      if (make_keys(problem.score, t, at, n, keys + total)) {
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
    uint8_t* mask = problem.tensors[spans[s].tensor].mask + spans[s].begin;
    for (int64_t i = 0; i < n; ++i) mask[i] = key[i] > bound ? 1 : 0;
    for (int64_t i = 0; i < n && ties > 0; ++i) {
      if (key[i] == bound) mask[i] = 1, --ties;
    }
    key += n;
  }
  return {TopkStatus::ok, 0, present};
}

template <TopkScore S, typename T>
void square_scores(const T* a, const T* b, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i) {
    const double score = fuse<S>(a[i], b[i]);
    out[i] = score * score;
  }
}

template <typename T>
void square_scores(TopkScore score, const TopkTensor& t, int64_t begin, int64_t n, double* out) {
  alignas(64) T buffer_a[kBlock], buffer_b[kBlock];
  const T* a = as_scores<T>(t.dtype, t.values, begin, n, buffer_a);
  const T* b = t.other == nullptr ? a : as_scores<T>(t.other_dtype, t.other, begin, n, buffer_b);
  switch (score) {
    case TopkScore::identity:
    case TopkScore::magnitude:
      return square_scores<TopkScore::identity>(a, a, n, out);
    case TopkScore::product:
    case TopkScore::saliency:
      return square_scores<TopkScore::product>(a, b, n, out);
    default:
      return square_scores<TopkScore::square>(a, a, n, out);
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

int64_t topk_sample(const TopkProblem& problem, const TopkChunk* chunks, int64_t n_chunks,
                    int64_t elements, int64_t wanted, void* keys) {
  return problem.wide
             ? sample(problem, chunks, n_chunks, elements, wanted, static_cast<int64_t*>(keys))
             : sample(problem, chunks, n_chunks, elements, wanted, static_cast<int32_t*>(keys));
}

TopkThreshold topk_select(bool wide, void* keys, int64_t n, int64_t rank, void* scratch) {
  return wide ? select_key(static_cast<int64_t*>(keys), n, rank, static_cast<int64_t*>(scratch))
              : select_key(static_cast<int32_t*>(keys), n, rank, static_cast<int32_t*>(scratch));
}

void topk_filter(const TopkProblem& problem, TopkChunk* chunks, int64_t begin, int64_t end,
                 const TopkBracket& bracket, const TopkCandidates& candidates) {
  int64_t used = 0;
  for (int64_t c = begin; c < end; ++c) {
    problem.wide ? filter<int64_t>(problem, chunks[c], bracket, candidates, used)
                 : filter<int32_t>(problem, chunks[c], bracket, candidates, used);
  }
}

void topk_histogram(const TopkProblem& problem, const TopkChunk* chunks, int64_t begin, int64_t end,
                    int64_t lo, int64_t hi, int64_t* out) {
  int64_t bins[2][kTopkBins + 1] = {};
  for (int64_t c = begin; c < end; ++c) {
    problem.wide ? histogram<int64_t>(problem, chunks[c].span, lo, hi, bins)
                 : histogram<int32_t>(problem, chunks[c].span, lo, hi, bins);
  }
  for (int64_t b = 0; b < kTopkBins; ++b) out[b] += bins[0][b] + bins[1][b];
}

void topk_accept(const TopkProblem& problem, const TopkChunk* chunks, int64_t n_chunks,
                 const TopkCandidates& candidates, int64_t key, int64_t ties) {
  for (int64_t c = 0; c < n_chunks; ++c) {
    problem.wide ? accept<int64_t>(problem, chunks[c], candidates, key, ties)
                 : accept<int32_t>(problem, chunks[c], candidates, key, ties);
  }
}

void topk_settle_ties(const TopkProblem& problem, const TopkChunk& chunk, int64_t key,
                      int64_t ties) {
  problem.wide ? settle_ties<int64_t>(problem, chunk.span, key, ties)
               : settle_ties<int32_t>(problem, chunk.span, static_cast<int32_t>(key), ties);
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
      is_double(t) ? square_scores<double>(problem.score, t, r * cols + at, n, squares)
                   : square_scores<float>(problem.score, t, r * cols + at, n, squares);
      for (; n % 16 != 0; ++n) squares[n] = 0.0;
      add_lanes(squares, n, lanes);
    }
    for (int half = 8; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    }
    norms[r] = __builtin_sqrt(lanes[0]);
  }
}

}  // namespace fastprune::FASTPRUNE_ISA
