// One exact selection of global_topk_mask, driven over the kernels' passes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "kernels/cpu/global_topk_mask.h"
#include "ops/common.h"

namespace fastprune {

constexpr const char* kTopkOp = "global_topk_mask";

[[noreturn]] inline void fail_nan(int64_t tensor) {
  STD_TORCH_CHECK(false, kTopkOp, ": values[", tensor, "]: a candidate's score is NaN");
}

// Exactly k of the elements of some spans. Several that differ in k and in their masks share
// passes.
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

  // Selections over the same spans, scores and restrictions.
  static void run(std::vector<Selection>& selections) {
    std::vector<Selection*> left;
    std::optional<Sample> sample;  // the same for all: it depends on the scores only
    for (Selection& s : selections) {
      s.start(sample);
      left.push_back(&s);
    }
    while (!left.empty()) {
      pass(left);
      std::vector<Selection*> wrong;
      for (Selection* s : left) {
        if (s->complete()) {
          s->give_back();
        } else {
          wrong.push_back(s);
        }
      }
      for (Selection* s : wrong) s->refine();
      left = std::move(wrong);
    }
  }

 private:
  int64_t worker_count() const {
    return std::min(static_cast<int64_t>(chunks_.size()), thread_count());
  }

  template <typename F>
  void for_each_worker(const F& f) const {
    const int64_t n = static_cast<int64_t>(chunks_.size()), workers = worker_count();
    for_each_range(workers, 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t w = begin; w < end; ++w) f(w, n * w / workers, n * (w + 1) / workers);
    });
  }

  struct Sample {
    Scratch keys;
    int64_t found;
  };

  void start(std::optional<Sample>& sample) {
    const int64_t lowest = topk_lowest_key(problem_.wide),
                  highest = topk_highest_key(problem_.wide);
    bracket_ = {{lowest, lowest, lowest, lowest}};  // every candidate is above
    if (k_ == 0) {
      bracket_ = {{highest, highest, highest, highest}};
    } else if (k_ < candidates_) {
      if (!sample) sample = draw();
      bracket_ = guess(*sample);
    }
  }

  // The counts of the last pass say on which side of the bracket, or where in it, the threshold is.
  void refine() {
    int64_t lo = bracket_.bounds[2] + 1, hi = bracket_.bounds[1];
    int64_t above = above_ + top_, inside = inside_;
    if (k_ <= above_) {
      lo = bracket_.bounds[0] + 1, hi = topk_highest_key(problem_.wide), above = 0, inside = above_;
    } else if (k_ > above_ + top_ + inside_ + bottom_) {
      above = above_ + top_ + inside_ + bottom_;
      lo = topk_lowest_key(problem_.wide) + 1, hi = bracket_.bounds[3];
      inside = candidates_ - above;
    }
    bracket_ = refine(lo, hi, above, inside, capacity_);
  }

  Sample draw() const {
    const double n = static_cast<double>(candidates_);
    // Larger samples cost more, but leave fewer candidates to rank.
    const double size = std::clamp(0.7 * std::cbrt(n * n), 1024.0, 65536.0);
    const int64_t wanted = std::min<int64_t>(
        elements_ / 8, static_cast<int64_t>(size * static_cast<double>(elements_) / n));
    // Each part in its own place, then side by side.
    const int64_t workers = wanted < 4096 ? 1 : worker_count();
    Sample sample{Scratch((wanted + 64 * workers) * key_bytes()), 0};
    std::vector<int64_t> found(static_cast<size_t>(workers));
    const auto place = [&](int64_t w) {
      return sample.keys.as<char>() + (wanted * w / workers + 64 * w) * key_bytes();
    };
    for_each_range(workers, 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t w = begin; w < end; ++w) {
        found[w] = FASTPRUNE_PICK(topk_sample_part)(
            problem_, chunks_.data(), static_cast<int64_t>(chunks_.size()), elements_, wanted,
            wanted * w / workers, wanted * (w + 1) / workers, place(w));
      }
    });
    for (int64_t w = 0; w < workers; ++w) {
      std::memmove(sample.keys.as<char>() + sample.found * key_bytes(), place(w),
                   static_cast<size_t>(found[w] * key_bytes()));
      sample.found += found[w];
    }
    return sample;
  }

  // A bracket that holds the k-th largest key with high probability.
  TopkBracket guess(const Sample& sample) {
    const int64_t found = sample.found;
    const Scratch &keys = sample.keys, scratch((found / 2 + 64) * key_bytes());
    const double n = static_cast<double>(candidates_), s = static_cast<double>(found);
    const double share = static_cast<double>(k_) / n;
    const double slack = 3.5 * std::sqrt(s * share * (1.0 - share)) + 3.0;
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
    capacity_ = static_cast<int64_t>(3.0 * slack * n / (s + 1.0)) + 4096;
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

  // One pass over the factors that counts the classes of every bracket, keeps what is inside and
  // writes the masks as if the upper ends were the thresholds.
  static void pass(const std::vector<Selection*>& all) {
    const Selection& first = *all.front();
    const int64_t workers = first.worker_count(), key_bytes = first.key_bytes();
    for (Selection* s : all) {
      // Any worker may meet all of them; pages that none touches are never backed by memory.
      const int64_t room = checked_product(workers, s->capacity_, kTopkOp);
      s->keys_.emplace(checked_product(room, key_bytes, kTopkOp));
      s->positions_.emplace(room * 2);
      s->first_chunk_.assign(static_cast<size_t>(workers) + 1, 0);
    }
    first.for_each_worker([&](int64_t w, int64_t begin, int64_t end) {
      std::vector<TopkJob> jobs;
      for (Selection* s : all) {
        s->first_chunk_[w + 1] = end;
        jobs.push_back({&s->problem_,
                        s->chunks_.data(),
                        s->bracket_,
                        {s->keys_->as<char>() + w * s->capacity_ * key_bytes,
                         s->positions_->as<uint16_t>() + w * s->capacity_, s->capacity_}});
      }
      FASTPRUNE_PICK(topk_filter_all)(jobs.data(), static_cast<int64_t>(jobs.size()), begin, end);
    });
  }

  int64_t key_bytes() const { return problem_.wide ? 8 : 4; }

  void give_back() {
    keys_.reset();
    positions_.reset();
  }

  // Completes the masks if the threshold lies where the bracket says. False: it does not.
  bool complete() {
    const int64_t workers = worker_count(), key_bytes = this->key_bytes();
    const Scratch &keys = *keys_, &positions = *positions_;
    above_ = top_ = inside_ = bottom_ = 0;
    for (const TopkChunk& c : chunks_) {
      if (c.has_nan) fail_nan(c.span.tensor);
      above_ += c.above, top_ += c.top, inside_ += c.inside, bottom_ += c.bottom;
    }
    const int64_t after_top = above_ + top_, after_inside = after_top + inside_;
    if (k_ == after_top) return true;
    if (k_ < above_ || k_ > after_inside + bottom_) return false;
    if (k_ < after_top) {
      settle(&TopkChunk::top, bracket_.bounds[0], k_ - above_, true);
      return true;
    }
    // Bring the workers' candidates together; `first` counts from the common start from here on.
    int64_t used = 0;
    for (int64_t w = 0; w < workers; ++w) {
      int64_t found = 0;
      for (int64_t c = first_chunk_[w]; c < first_chunk_[w + 1]; ++c) {
        found += chunks_[c].inside;
        chunks_[c].first += used;
      }
      if (found + 64 > capacity_ && found > 0) return false;
      std::copy_n(keys.as<char>() + w * capacity_ * key_bytes, found * key_bytes,
                  keys.as<char>() + used * key_bytes);
      std::copy_n(positions.as<uint16_t>() + w * capacity_, found, positions.as<uint16_t>() + used);
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
    const TopkCandidates found{keys.as<void>(), positions.as<uint16_t>(), used};
    const auto accept = FASTPRUNE_PICK(topk_accept);
    if (ties < threshold.equal) {  // the first of the equal ones: in order
      accept(problem_, chunks_.data(), static_cast<int64_t>(chunks_.size()), found, threshold.key,
             ties);
    } else {  // those over the key below; where workers wrote, the masks are in their caches
      const int64_t below = threshold.key - (threshold.equal > 0 ? 1 : 0);
      for_each_worker([&](int64_t, int64_t begin, int64_t end) {
        accept(problem_, chunks_.data() + begin, end - begin, found, below, 0);
      });
    }
    if (k_ > after_inside)
      settle(&TopkChunk::bottom, bracket_.bounds[3] + 1, k_ - after_inside, false);
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
  TopkBracket bracket_{};
  int64_t capacity_ = 0;                     // for candidates, of each worker
  std::optional<Scratch> keys_, positions_;  // of the candidates
  std::vector<int64_t> first_chunk_;         // of each worker
  int64_t above_ = 0, top_ = 0, inside_ = 0, bottom_ = 0;
};

}  // namespace fastprune
