// The Gini index, exact, without a sort of everything and without a copy of everything.
//
// Ascending magnitudes fall into bins b of consecutive keys, with c_b of them, sum s_b, and R_b of
// them in earlier bins. With N in all and S their sum, Hurley and Rickard's
//   G = 1 - 2 sum_k x_(k) / S * (N - k + 1/2) / N
// is the sum of the differences of all pairs over N S:
//   G = (sum_b s_b (2 R_b + c_b - N) + sum_b D_b) / (N S),
// D_b being the differences of the pairs inside bin b. Keys of one bin share an exponent, so that
// s_b and D_b are integers in units of its last place (GiniGroup); only the outer sum rounds.
//
// One pass counts the bins. Runs of bins that fit the budget are then gathered, a pass each; a
// single bin that does not (a value that occurs in masses) is counted by its next bits.

#include <algorithm>
#include <cmath>

#include "ops/tensor_statistics.h"

namespace fastprune {
namespace {

constexpr int64_t kSmallestBudget = int64_t{1} << 20;  // bytes
constexpr int64_t kShare = 16;                         // of the tensors' bytes

class Gini {
 public:
  Gini(const StatisticsTensor* tensors, int64_t n) : tensors_(tensors) {
    int64_t elements = 0, bytes = 0;
    bool all_bf16 = true, all_f16 = true;
    for (int64_t i = 0; i < n; ++i) {
      const StatisticsTensor& t = tensors[i];
      wide_ |= t.dtype == DType::f64;
      all_bf16 &= t.dtype == DType::bf16;
      all_f16 &= t.dtype == DType::f16;
      elements += t.numel;
      bytes += t.numel * (t.dtype == DType::f64 ? 8 : t.dtype == DType::f32 ? 4 : 2);
      for (int64_t at = 0; at < t.numel; at += kStatisticsChunk) {
        chunks_.push_back({i, at, std::min(at + kStatisticsChunk, t.numel)});
      }
    }
    // Half-precision numbers have no bits below their bin.
    top_bits_ = wide_ ? 63 : 31;
    alike_ = all_bf16 || all_f16;
    top_shift_ = wide_ ? 47 : all_bf16 ? 16 : all_f16 ? 13 : 15;
    const int64_t budget_bytes = std::max(kSmallestBudget, bytes / kShare);
    budget_ = std::min({budget_bytes / (wide_ ? 8 : 2), elements, int64_t{1} << 31});
    // A worker's counts are 32 bits, and its bins are a share of the memory too.
    constexpr int64_t kMost = int64_t{1} << 31, kWorthIt = int64_t{1} << 20;
    workers_ =
        std::max(std::min(thread_count(), elements / kWorthIt + 1), (elements + kMost - 1) / kMost);
    workers_ = std::clamp<int64_t>(workers_, 1, std::max<int64_t>(1, chunks_.size()));
  }

  double index(const StatisticsPart& part) {
    const double largest = std::max(part.max, -part.min);
    const int64_t n = part.count;
    if (part.nonzero == 0) return 0.0;
    if (!std::isfinite(largest)) return std::nan("");
    // In units of 2^unit no sum overflows.
    const int64_t unit = exponent_of(largest);
    int64_t before = n - part.nonzero;  // zeros come first and add nothing
    ScaledSum total{0.0, 0.0, 0}, differences{0.0, 0.0, 0};
    for_each_group(0, top_bits_, top_shift_, [&](int64_t bin, const GiniGroup& g) {
      const uint64_t key = static_cast<uint64_t>(bin) << top_shift_;
      const int mantissa = wide_ ? 52 : 23, bias = wide_ ? 1075 : 150;
      const int64_t field = std::max<int64_t>(1, static_cast<int64_t>(key >> mantissa));
      const int64_t place = field - bias;  // the last place is 2^place
      const uint64_t significand = (key & ((uint64_t{1} << mantissa) - 1)) |
                                   (key >> mantissa == 0 ? 0 : uint64_t{1} << mantissa);
      const unsigned __int128 sum =
          g.sum + static_cast<unsigned __int128>(significand) * static_cast<uint64_t>(g.count);
      const double s = scale_by(static_cast<double>(sum), place - unit);
      const double d = scale_by(static_cast<double>(g.pairs), place - unit);
      accumulate(total, {s, 0.0, 0});
      accumulate(differences, {s * static_cast<double>(2 * before + g.count - n), 0.0, 0});
      accumulate(differences, {d, 0.0, 0});
      before += g.count;
    });
    const double s = total.hi + total.lo, d = differences.hi + differences.lo;
    return std::clamp(d / (static_cast<double>(n) * s), 0.0, 1.0);
  }

 private:
  struct Chunk {
    int64_t tensor, begin, end;
  };

  // Calls f(worker, chunk) for all chunks, each worker's in order.
  template <typename F>
  void for_each_chunk(const F& f) const {
    const int64_t n = static_cast<int64_t>(chunks_.size());
    for_each_range(workers_, 0, [&](int64_t first, int64_t last, void*) {
      for (int64_t w = first; w < last; ++w) {
        for (int64_t c = n * w / workers_; c < n * (w + 1) / workers_; ++c) f(w, chunks_[c]);
      }
    });
  }

  // Calls f(bin, group) for the bins that are not empty, in order: 2^(bits - shift) bins of
  // 2^shift keys from `lo` on.
  template <typename F>
  void for_each_group(uint64_t lo, int bits, int shift, const F& f) {
    const int64_t bins = int64_t{1} << (bits - shift);
    const GiniRange range{wide_, lo, uint64_t{1} << bits, shift};
    std::vector<uint32_t> counts(static_cast<size_t>(bins * workers_));
    for_each_chunk([&](int64_t w, const Chunk& c) {
      FASTPRUNE_PICK(gini_histogram)
      (tensors_[c.tensor], c.begin, c.end, range, counts.data() + w * bins);
    });
    std::vector<int64_t> totals(static_cast<size_t>(bins));
    for (int64_t w = 0; w < workers_; ++w) {
      for (int64_t bin = 0; bin < bins; ++bin) totals[bin] += counts[w * bins + bin];
    }
    for (int64_t bin = 0, end; bin < bins; bin = end) {
      end = bin + 1;
      int64_t found = totals[bin];
      if (found == 0) continue;
      if (shift == 0 || alike_) {
        f(bin, GiniGroup{found, 0, 0});
      } else if (found > budget_) {
        f(bin, refine(lo + (static_cast<uint64_t>(bin) << shift), shift, found));
      } else {
        while (end < bins && found + totals[end] <= budget_) found += totals[end++];
        gather(range, bin, end, found, totals, counts.data(), f);
      }
    }
  }

  // The group of one bin of 2^shift keys from `lo` on, from those of its parts.
  GiniGroup refine(uint64_t lo, int shift, int64_t count) {
    const int next = std::max(shift - 16, 0);
    GiniGroup whole{count, 0, 0};
    int64_t before = 0;
    for_each_group(lo, shift, next, [&](int64_t bin, const GiniGroup& g) {
      using Wide = unsigned __int128;  // modulo 2^128: the terms may be negative, their sum is not
      const Wide sum = g.sum + (static_cast<Wide>(bin) << next) * static_cast<Wide>(g.count);
      whole.sum += sum;
      whole.pairs += g.pairs + sum * static_cast<Wide>(2 * before + g.count - count);
      before += g.count;
    });
    return whole;
  }

  // for_each_group for a run of bins that are brought together, `found` elements.
  template <typename F>
  void gather(const GiniRange& all, int64_t bin, int64_t end, int64_t found,
              const std::vector<int64_t>& totals, uint32_t* counts, const F& f) {
    const int64_t bins = static_cast<int64_t>(totals.size());
    std::vector<int64_t> filled, starts;
    int64_t at = 0;
    for (int64_t b = bin; b < end; ++b) {
      if (totals[b] == 0) continue;
      filled.push_back(b);
      starts.push_back(at);
      for (int64_t w = 0; w < workers_; ++w) {  // a worker's count becomes where it writes
        const uint32_t n = counts[w * bins + b];
        counts[w * bins + b] = static_cast<uint32_t>(at);
        at += n;
      }
    }
    const int64_t key_bytes = wide_ ? 8 : 2;
    if (keys_ == nullptr) keys_ = std::make_unique<Scratch>(budget_ * key_bytes);
    const GiniRange range{wide_, all.lo + (static_cast<uint64_t>(bin) << all.shift),
                          static_cast<uint64_t>(end - bin) << all.shift, all.shift};
    for_each_chunk([&](int64_t w, const Chunk& c) {
      FASTPRUNE_PICK(gini_scatter)
      (tensors_[c.tensor], c.begin, c.end, range, counts + w * bins + bin, keys_->as<void>());
    });
    std::vector<GiniGroup> groups(filled.size());
    for_each_range(static_cast<int64_t>(filled.size()), kGiniScratch,
                   [&](int64_t first, int64_t last, void* scratch) {
                     for (int64_t i = first; i < last; ++i) {
                       groups[i] = FASTPRUNE_PICK(gini_group)(
                           wide_, keys_->as<char>() + starts[i] * key_bytes, totals[filled[i]],
                           all.shift, scratch);
                     }
                   });
    for (size_t i = 0; i < filled.size(); ++i) f(filled[i], groups[i]);
  }

  const StatisticsTensor* tensors_;
  std::vector<Chunk> chunks_;
  bool wide_ = false;
  bool alike_;  // the elements of one bin are equal
  int top_bits_, top_shift_;
  int64_t budget_, workers_;
  std::unique_ptr<Scratch> keys_;  // of the run of bins in hand
};

}  // namespace

double gini_index(const StatisticsTensor* tensors, int64_t n, const StatisticsPart& part) {
  return Gini(tensors, n).index(part);
}

}  // namespace fastprune
