// One exact selection of global_topk_mask, driven over the kernels' passes.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "kernels/cpu/global_topk_mask.h"
#include "ops/common.h"

namespace fastprune {

constexpr const char* kTopkOp = "global_topk_mask";

[[noreturn]] inline void fail_nan(int64_t tensor) {
  STD_TORCH_CHECK(false, kTopkOp, ": values[", tensor, "]: a candidate's score is NaN");
}

// Exactly k of the elements of some spans.
class Selection {
 public:
  // candidates: elements of the spans that are inside `within`; k is at most that.
  Selection(const TopkProblem& problem, const std::vector<TopkSpan>& spans, int64_t k,
            int64_t candidates)
      : problem_(problem), k_(k), candidates_(candidates) {
    for (const TopkSpan& s : spans) {
      elements_ += s.end - s.begin;
      for (int64_t at = s.begin; at < s.end; at += kTopkChunk) {
        chunks_.push_back({{s.tensor, at, std::min(at + kTopkChunk, s.end)}, 0, 0, 0, 0, 0, false});
      }
    }
  }

  void run() {
    const int64_t lowest = topk_lowest_key(problem_.wide),
                  highest = topk_highest_key(problem_.wide);
    int64_t capacity = 0;
    TopkBracket bracket{{lowest, lowest, lowest, lowest}};  // every candidate is above
    if (k_ == 0) {
      bracket = {{highest, highest, highest, highest}};
    } else if (k_ < candidates_) {
      bracket = guess(capacity);
    }
    while (!decide(bracket, capacity)) {
      // The counts of the pass say on which side of the bracket, or where in it, the threshold is.
      int64_t lo = bracket.bounds[2] + 1, hi = bracket.bounds[1];
      int64_t above = above_ + top_, inside = inside_;
      if (k_ <= above_) {
        lo = bracket.bounds[0] + 1, hi = highest, above = 0, inside = above_;
      } else if (k_ > above_ + top_ + inside_ + bottom_) {
        above = above_ + top_ + inside_ + bottom_;
        lo = lowest + 1, hi = bracket.bounds[3], inside = candidates_ - above;
      }
      bracket = refine(lo, hi, above, inside, capacity);
    }
  }

 private:
  template <typename F>
  void for_each_worker(const F& f) const {
    const int64_t n = static_cast<int64_t>(chunks_.size()), workers = std::min(n, thread_count());
    for_each_range(workers, 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t w = begin; w < end; ++w) f(w, n * w / workers, n * (w + 1) / workers);
    });
  }

  // A bracket that holds the k-th largest key with high probability.
  TopkBracket guess(int64_t& capacity) const {
    const double n = static_cast<double>(candidates_);
    // Larger samples cost more, but leave fewer candidates to rank.
    const double size = std::clamp(0.7 * std::cbrt(n * n), 1024.0, 65536.0);
    const int64_t wanted = std::min<int64_t>(
        elements_ / 8, static_cast<int64_t>(size * static_cast<double>(elements_) / n));
    const int64_t key_bytes = problem_.wide ? 8 : 4;
    const Scratch keys((wanted + 64) * key_bytes), scratch((wanted / 2 + 64) * key_bytes);
    const int64_t found =
        FASTPRUNE_PICK(topk_sample)(problem_, chunks_.data(), static_cast<int64_t>(chunks_.size()),
                                    elements_, wanted, keys.as<void>());
    const double share = static_cast<double>(k_) / n, s = static_cast<double>(found);
    const double slack = 4.0 * std::sqrt(s * share * (1.0 - share)) + 3.0;
    const int64_t hi_rank = static_cast<int64_t>(std::floor(s * share - slack));
    const int64_t lo_rank = static_cast<int64_t>(std::ceil(s * share + slack));
    TopkThreshold hi{topk_highest_key(problem_.wide), 0, 0};
    TopkThreshold lo{topk_lowest_key(problem_.wide) + 1, 0, 0};
    const auto select = FASTPRUNE_PICK(topk_select);
    if (hi_rank >= 1) {
      hi = select(problem_.wide, keys.as<void>(), found, hi_rank, scratch.as<void>());
    }
    if (lo_rank <= found) {
      lo = select(problem_.wide, keys.as<void>(), found, lo_rank, scratch.as<void>());
    }
    capacity = static_cast<int64_t>(3.0 * slack * n / (s + 1.0)) + 4096;
    if (lo.key == hi.key) return {{lo.key, lo.key, lo.key, lo.key - 1}};
    constexpr int64_t kMassed = 8;  // so many equal samples: a value to count, not to collect
    const bool top = hi.equal >= kMassed, bottom = lo.equal >= kMassed;
    return {{hi.key, hi.key - (top ? 1 : 0), lo.key - (bottom ? 0 : 1), lo.key - 1}};
  }

  // Narrows [lo, hi], which holds the k-th largest key, until few elements or one key are left.
  TopkBracket refine(int64_t lo, int64_t hi, int64_t above, int64_t inside,
                     int64_t& capacity) const {
    const int64_t few = std::max<int64_t>(65536, elements_ / 64);
    while (lo < hi && inside > few) {
      std::vector<int64_t> histogram(kTopkBins);
      std::mutex mutex;
      for_each_worker([&](int64_t, int64_t begin, int64_t end) {
        std::vector<int64_t> part(kTopkBins);
        FASTPRUNE_PICK(topk_histogram)(problem_, chunks_.data(), begin, end, lo, hi, part.data());
        const std::lock_guard<std::mutex> lock(mutex);
        for (int64_t b = 0; b < kTopkBins; ++b) histogram[b] += part[b];
      });
      inside = topk_narrow(histogram.data(), k_, lo, hi, above);
    }
    capacity = lo == hi ? 0 : inside + 64;  // a single key is counted, not collected
    if (lo == hi) return {{lo, lo, lo, lo - 1}};
    return {{hi, hi, lo - 1, lo - 1}};
  }

  // One pass over the factors that counts the classes of the bracket and, if the threshold lies
  // where the bracket says, completes the masks. False: it does not.
  bool decide(const TopkBracket& bracket, int64_t capacity) {
    const int64_t workers = std::min<int64_t>(static_cast<int64_t>(chunks_.size()), thread_count());
    const int64_t key_bytes = problem_.wide ? 8 : 4;
    // Any worker may meet all of them; pages that none touches are never backed by memory.
    const Scratch keys(
        checked_product(checked_product(workers, capacity, kTopkOp), key_bytes, kTopkOp));
    const Scratch positions(checked_product(workers, capacity, kTopkOp) * 2);
    std::vector<int64_t> first_chunk(static_cast<size_t>(workers) + 1);
    for_each_worker([&](int64_t w, int64_t begin, int64_t end) {
      first_chunk[w + 1] = end;
      FASTPRUNE_PICK(topk_filter)
      (problem_, chunks_.data(), begin, end, bracket,
       {keys.as<char>() + w * capacity * key_bytes, positions.as<uint16_t>() + w * capacity,
        capacity});
    });
    above_ = top_ = inside_ = bottom_ = 0;
    for (const TopkChunk& c : chunks_) {
      if (c.has_nan) fail_nan(c.span.tensor);
      above_ += c.above, top_ += c.top, inside_ += c.inside, bottom_ += c.bottom;
    }
    const int64_t after_top = above_ + top_, after_inside = after_top + inside_;
    if (k_ == after_top) return true;
    if (k_ < above_ || k_ > after_inside + bottom_) return false;
    if (k_ < after_top) {
      settle(&TopkChunk::top, bracket.bounds[0], k_ - above_, true);
      return true;
    }
    // Bring the workers' candidates together; `first` counts from the common start from here on.
    int64_t used = 0;
    for (int64_t w = 0; w < workers; ++w) {
      int64_t found = 0;
      for (int64_t c = first_chunk[w]; c < first_chunk[w + 1]; ++c) {
        found += chunks_[c].inside;
        chunks_[c].first += used;
      }
      if (found + 64 > capacity && found > 0) return false;
      std::copy_n(keys.as<char>() + w * capacity * key_bytes, found * key_bytes,
                  keys.as<char>() + used * key_bytes);
      std::copy_n(positions.as<uint16_t>() + w * capacity, found, positions.as<uint16_t>() + used);
      used += found;
    }
    TopkThreshold threshold{topk_lowest_key(problem_.wide), 0, 0};
    int64_t ties = 0;
    if (k_ < after_inside) {
      const Scratch scratch((used / 2 + 64) * key_bytes);
      threshold = FASTPRUNE_PICK(topk_select)(problem_.wide, keys.as<void>(), used, k_ - after_top,
                                              scratch.as<void>());
      ties = k_ - after_top - threshold.above;
    }
    FASTPRUNE_PICK(topk_accept)
    (problem_, chunks_.data(), static_cast<int64_t>(chunks_.size()),
     {keys.as<void>(), positions.as<uint16_t>(), used}, threshold.key, ties);
    if (k_ > after_inside)
      settle(&TopkChunk::bottom, bracket.bounds[3] + 1, k_ - after_inside, false);
    return true;
  }

  // The first `ties` elements of a massed key are kept; `kept` says what their masks hold now.
  void settle(int64_t TopkChunk::* members, int64_t key, int64_t ties, bool kept) const {
    std::vector<std::pair<const TopkChunk*, int64_t>> work;
    for (const TopkChunk& c : chunks_) {
      const int64_t share = std::min(c.*members, ties);
      ties -= share;
      if (share != (kept ? c.*members : 0)) work.emplace_back(&c, share);
    }
    for_each_range(static_cast<int64_t>(work.size()), 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t i = begin; i < end; ++i) {
        FASTPRUNE_PICK(topk_settle_ties)(problem_, *work[i].first, key, work[i].second);
      }
    });
  }

  TopkProblem problem_;
  int64_t k_, candidates_, elements_ = 0;
  std::vector<TopkChunk> chunks_;
  int64_t above_ = 0, top_ = 0, inside_ = 0, bottom_ = 0;
};

}  // namespace fastprune
