// The passes of a selection over whole chunks: filter, histograms, and what settles the masks.
#include <cstring>
#include <new>

#include "kernels/cpu/global_topk_mask.h"
#include "kernels/cpu/topk_keys.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// What one job sees of a chunk.
template <typename K>
class Filter {
 public:
  Filter(const TopkJob& job, TopkChunk& chunk, int64_t& used)
      : chunk_(chunk), out_(job.candidates), used_(used), packed_(job.problem->packed) {
    for (int i = 0; i < 4; ++i) bounds_[i] = static_cast<K>(job.bracket.bounds[i]);
    ends_ = bounds_[0] != bounds_[1] || bounds_[2] != bounds_[3];
    mask_ = job.problem->tensors[chunk.span.tensor].mask;
    chunk.has_nan = false;
    chunk.first = used;
    chunk.above = chunk.top = chunk.inside = chunk.bottom = 0;
  }

  void add(const K* keys, int64_t at, int64_t n, bool nan) {
    if (packed_) {
      ends_ ? add<true, true>(keys, at, n, nan) : add<true, false>(keys, at, n, nan);
    } else {
      ends_ ? add<false, true>(keys, at, n, nan) : add<false, false>(keys, at, n, nan);
    }
  }

 private:
  template <bool Packed, bool Ends>
  void add(const K* keys, int64_t at, int64_t n, bool nan) {
    // Locals: the stores below may alias members as far as a compiler knows.
    int64_t over_top = 0, top = 0, inside = 0, bottom = 0, used = used_;
    const int64_t capacity = out_.capacity, offset = at - chunk_.span.begin;
    K* const out_keys = static_cast<K*>(out_.keys);
    uint16_t* const out_positions = out_.positions;
    uint8_t* const mask = mask_;
    const K bounds[4] = {bounds_[0], bounds_[1], bounds_[2], bounds_[3]};
    const auto group = [&](int64_t i, int64_t count) {
      const uint64_t over = greater_bits(keys + i, bounds[1]);
      const uint64_t over_bottom = greater_bits(keys + i, bounds[2]);
      put_mask(Packed, over, at + i, count, mask);
      over_top += __builtin_popcountll(over);
      uint64_t in = over_bottom & ~over;
      const int found = __builtin_popcountll(in);
      inside += found;
      if constexpr (Ends) {
        top += __builtin_popcountll(over & ~greater_bits(keys + i, bounds[0]));
        bottom += __builtin_popcountll(greater_bits(keys + i, bounds[3]) & ~over_bottom);
      }
      if (used + 64 > capacity) return;
      const int64_t position = offset + i;
      int64_t slot = used;
      const auto append = [&] {
        const int bit = __builtin_ctzll(in | uint64_t{1} << 63);
        out_keys[slot] = keys[i + bit];
        out_positions[slot++] = static_cast<uint16_t>(position + bit);
        in &= in - 1;
      };
      // Mostly none to two of 64: two slots are written in any case, since branches that cannot be
      // foreseen would cost more.
      append();
      append();
      while (in != 0) append();
      used += found;
    };
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) group(i, 64);
    if (i < n) group(i, n - i);
    used_ = used;
    chunk_.has_nan |= nan;
    chunk_.above += over_top - top;
    chunk_.top += top;
    chunk_.inside += inside;
    chunk_.bottom += bottom;
  }

  TopkChunk& chunk_;
  const TopkCandidates out_;
  int64_t& used_;
  const bool packed_;
  bool ends_;
  uint8_t* mask_;
  K bounds_[4];
};

template <typename K>
void filter_all(const TopkJob* jobs, int64_t n_jobs, int64_t begin, int64_t end) {
  constexpr int64_t kTogether = 16;  // jobs that share a pass: their states stay in L1
  for (int64_t first = 0; first < n_jobs; first += kTogether) {
    const int64_t n = n_jobs - first < kTogether ? n_jobs - first : kTogether;
    const TopkJob* group = jobs + first;
    int64_t used[kTogether] = {};
    for (int64_t c = begin; c < end; ++c) {
      alignas(Filter<K>) char memory[kTogether * sizeof(Filter<K>)];
      Filter<K>* filters = reinterpret_cast<Filter<K>*>(memory);
      for (int64_t j = 0; j < n; ++j)
        new (filters + j) Filter<K>(group[j], group[j].chunks[c], used[j]);
      for_each_block<K>(*group->problem, group->chunks[c].span,
                        [&](const K* keys, int64_t at, int64_t count, bool nan) {
                          for (int64_t j = 0; j < n; ++j) filters[j].add(keys, at, count, nan);
                        });
    }
  }
}

template <typename K>
void histogram(const TopkProblem& problem, const TopkSpan& span, int64_t lo, int64_t hi,
               int64_t (*bins)[kTopkBins + 1]) {
  for_each_block<K>(problem, span, [&](const K* keys, int64_t, int64_t n, bool) {
    add_to_bins(keys, n, static_cast<K>(lo), static_cast<K>(hi), bins);
  });
}

template <typename K>
void square_bins(const TopkProblem& problem, const TopkSpan& span, int64_t* counts, double* sums) {
  constexpr int kShift = 8 * sizeof(K) - 16;
  for_each_block<K>(problem, span, [&](const K* keys, int64_t, int64_t n, bool) {
    for (int64_t i = 0; i < n; ++i) {
      if (keys[i] < 0) continue;  // not a candidate
      const double w = score_of(keys[i]);
      const int64_t bin = static_cast<int64_t>(keys[i] >> kShift);
      ++counts[bin];
      sums[bin] += w * w;
    }
  });
}

// Without branches: which candidates stay cannot be foreseen. The filter left all of them 0.
template <bool Packed, typename K>
void accept(const TopkProblem& problem, const TopkChunk& chunk, const TopkCandidates& candidates,
            K key, int64_t& ties) {
  uint8_t* mask = problem.tensors[chunk.span.tensor].mask;
  mask += Packed ? chunk.span.begin / 8 : chunk.span.begin;
  const K* keys = static_cast<const K*>(candidates.keys) + chunk.first;
  const uint16_t* positions = candidates.positions + chunk.first;
  int64_t left = ties;
  for (int64_t i = 0; i < chunk.inside; ++i) {
    const int64_t tie = static_cast<int64_t>(keys[i] == key) & static_cast<int64_t>(left > 0);
    left -= tie;
    const unsigned kept = static_cast<unsigned>(keys[i] > key) | static_cast<unsigned>(tie);
    const unsigned at = positions[i];
    if constexpr (Packed) {
      mask[at / 8] = static_cast<uint8_t>(mask[at / 8] | (kept << (at % 8)));
    } else {
      mask[at] = static_cast<uint8_t>(kept);
    }
  }
  ties = left;
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
      if (problem.packed) {
        uint64_t bits = 0;
        const size_t bytes = static_cast<size_t>(((n - i < 64 ? n - i : 64) + 7) / 8);
        std::memcpy(&bits, mask + (at + i) / 8, bytes);
        bits = (bits & ~equal) | kept;
        std::memcpy(mask + (at + i) / 8, &bits, bytes);
        continue;
      }
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

}  // namespace

void topk_filter(const TopkProblem& problem, TopkChunk* chunks, int64_t begin, int64_t end,
                 const TopkBracket& bracket, const TopkCandidates& candidates) {
  const TopkJob job{&problem, chunks, bracket, candidates};
  topk_filter_all(&job, 1, begin, end);
}

void topk_filter_all(const TopkJob* jobs, int64_t n_jobs, int64_t begin, int64_t end) {
  jobs->problem->wide ? filter_all<int64_t>(jobs, n_jobs, begin, end)
                      : filter_all<int32_t>(jobs, n_jobs, begin, end);
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

void topk_square_bins(const TopkProblem& problem, const TopkChunk* chunks, int64_t begin,
                      int64_t end, int64_t* counts, double* sums) {
  for (int64_t c = begin; c < end; ++c) {
    problem.wide ? square_bins<int64_t>(problem, chunks[c].span, counts, sums)
                 : square_bins<int32_t>(problem, chunks[c].span, counts, sums);
  }
}

void topk_accept(const TopkProblem& problem, const TopkChunk* chunks, int64_t n_chunks,
                 const TopkCandidates& candidates, int64_t key, int64_t ties) {
  const int32_t narrow = static_cast<int32_t>(key);
  for (int64_t c = 0; c < n_chunks; ++c) {
    if (problem.packed) {
      problem.wide ? accept<true, int64_t>(problem, chunks[c], candidates, key, ties)
                   : accept<true, int32_t>(problem, chunks[c], candidates, narrow, ties);
    } else {
      problem.wide ? accept<false, int64_t>(problem, chunks[c], candidates, key, ties)
                   : accept<false, int32_t>(problem, chunks[c], candidates, narrow, ties);
    }
  }
}

void topk_settle_ties(const TopkProblem& problem, const TopkChunk& chunk, int64_t key,
                      int64_t ties) {
  problem.wide ? settle_ties<int64_t>(problem, chunk.span, key, ties)
               : settle_ties<int32_t>(problem, chunk.span, static_cast<int32_t>(key), ties);
}

}  // namespace fastprune::FASTPRUNE_ISA
