// Selection by the scores of LAMP: w_i^2 / sum of w_j^2 over the j of the tensor with |w_j| >=
// |w_i|.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#include "ops/topk_selection.h"

namespace fastprune {

// Within a tensor the score grows with |w|. Counts and sums of squares in bins of |w| bound the
// scores of each bin; bins whose bounds do not settle the matter are collected, sorted and scored
// exactly. Sums are in float64, over parts of a tensor that do not depend on the threads.
class LampSelection {
 public:
  // first: what the first tensor is called in messages.
  LampSelection(const TopkProblem& problem, size_t n_tensors, int64_t first = 0)
      : problem_(problem), layers_(n_tensors), first_(first) {
    for (size_t i = 0; i < n_tensors; ++i) {
      const TopkTensor& t = problem_.tensors[i];
      problem_.wide |= t.dtype == DType::f64;
      for (int64_t at = 0; at < t.numel; at += kTopkChunk) {
        layers_[i].chunks.push_back(
            {{static_cast<int64_t>(i), at, std::min(at + kTopkChunk, t.numel)},
             0,
             0,
             0,
             0,
             0,
             false});
      }
    }
    for (size_t i = 0; i < n_tensors; ++i) measure(i);
  }

  int64_t candidates() const { return candidates_; }

  // Writes the masks of `tensors`, which differ from the problem's in nothing else.
  void run(const std::vector<TopkTensor>& tensors, int64_t k) {
    problem_.tensors = tensors.data();
    const auto [lower, upper] = bracket(k);
    std::vector<Scored> open;
    int64_t sure = 0;
    for (size_t i = 0; i < layers_.size(); ++i) sure += collect(i, k, lower, upper, open);
    const int64_t wanted = k - sure;
    STD_TORCH_CHECK(wanted >= 0 && wanted <= static_cast<int64_t>(open.size()), kTopkOp,
                    ": values: the bounds of LAMP's scores do not hold");
    if (wanted > 0 && wanted < static_cast<int64_t>(open.size())) {
      std::nth_element(open.begin(), open.begin() + wanted - 1, open.end(), before);
    }
    for (int64_t n = 0; n < static_cast<int64_t>(open.size()); ++n) {
      uint8_t* mask = tensors[open[n].tensor].mask;
      const int64_t at = open[n].index;
      if (!problem_.packed) {
        mask[at] = n < wanted ? 1 : 0;
      } else if (n < wanted) {  // not set so far
        mask[at / 8] = static_cast<uint8_t>(mask[at / 8] | (1u << (at % 8)));
      }
    }
  }

 private:
  struct Layer {
    std::vector<TopkChunk> chunks;
    std::vector<int64_t> count;  // of each bin
    std::vector<double> sum;     // of squares
    std::vector<double> over;    // sum of squares of all bins above
  };
  struct Scored {
    double score;
    int64_t tensor, index;
  };

  static bool before(const Scored& a, const Scored& b) {
    if (a.score != b.score) return a.score > b.score;
    return std::tie(a.tensor, a.index) < std::tie(b.tensor, b.index);
  }

  int shift() const { return problem_.wide ? 48 : 16; }
  int64_t lowest_key(int64_t bin) const { return bin << shift(); }
  int64_t highest_key(int64_t bin) const { return key_below(bin + 1); }
  int64_t key_below(int64_t bin) const {
    return bin == kTopkSquareBins ? topk_highest_key(problem_.wide) : lowest_key(bin) - 1;
  }

  double square(int64_t key) const {
    double w;
    if (problem_.wide) {
      std::memcpy(&w, &key, 8);
    } else {
      const int32_t bits = static_cast<int32_t>(key);
      float narrow;
      std::memcpy(&narrow, &bits, 4);
      w = narrow;
    }
    return w * w;
  }

  static double ratio(double square, double total) { return square == 0.0 ? 0.0 : square / total; }

  void measure(size_t i) {
    Layer& layer = layers_[i];
    const int64_t n = static_cast<int64_t>(layer.chunks.size());
    constexpr int64_t kPart = 32;  // chunks: a million elements
    const int64_t parts = std::min<int64_t>(8, (n + kPart - 1) / kPart);
    std::vector<std::vector<int64_t>> counts(parts);
    std::vector<std::vector<double>> sums(parts);
    for_each_range(parts, 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t p = begin; p < end; ++p) {
        counts[p].resize(kTopkSquareBins);
        sums[p].resize(kTopkSquareBins);
        FASTPRUNE_PICK(topk_square_bins)
        (problem_, layer.chunks.data(), n * p / parts, n * (p + 1) / parts, counts[p].data(),
         sums[p].data());
      }
    });
    layer.count.resize(kTopkSquareBins);
    layer.sum.resize(kTopkSquareBins);
    layer.over.resize(kTopkSquareBins);
    for (int64_t p = 0; p < parts; ++p) {
      for (int64_t b = 0; b < kTopkSquareBins; ++b) {
        layer.count[b] += counts[p][b];
        layer.sum[b] += sums[p][b];
      }
    }
    double over = 0.0;
    for (int64_t b = kTopkSquareBins - 1; b >= 0; --b) {
      layer.over[b] = over;
      over += layer.sum[b];
      candidates_ += layer.count[b];
    }
    // Infinity and NaN share the topmost bin in use; infinite squares reach the sum as well.
    if (!std::isfinite(over)) fail_nan(first_ + static_cast<int64_t>(i));
  }

  // Scores that the k-th best is not below and not above.
  std::pair<double, double> bracket(int64_t k) const {
    if (k == 0) return {INFINITY, INFINITY};
    if (k == candidates_) return {-1.0, -1.0};
    std::vector<std::pair<double, int64_t>> least, most;
    for (const Layer& layer : layers_) {
      for (int64_t b = 0; b < kTopkSquareBins; ++b) {
        if (layer.count[b] == 0) continue;
        least.emplace_back(lower_bound(layer, b), layer.count[b]);
        most.emplace_back(upper_bound(layer, b), layer.count[b]);
      }
    }
    const auto kth = [&](std::vector<std::pair<double, int64_t>>& scores) {
      std::sort(scores.begin(), scores.end(), std::greater<>());
      int64_t seen = 0;
      size_t i = 0;
      while (seen + scores[i].second < k) seen += scores[i++].second;
      return scores[i].first;
    };
    constexpr double kRounding = 1e-9;  // sums of a billion squares err by less
    return {kth(least) * (1 - kRounding), kth(most) * (1 + kRounding)};
  }

  double lower_bound(const Layer& layer, int64_t b) const {
    return ratio(square(lowest_key(b)), layer.over[b] + layer.sum[b]);
  }
  double upper_bound(const Layer& layer, int64_t b) const {
    const double largest = square(highest_key(b));
    return ratio(largest, layer.over[b] + largest);
  }

  // Marks what is surely kept, appends what is open; returns how many are sure.
  int64_t collect(size_t i, int64_t k, double lower, double upper, std::vector<Scored>& open) {
    Layer& layer = layers_[i];
    int64_t first_sure = kTopkSquareBins, first_open = kTopkSquareBins, wanted = 0, sure = 0;
    for (int64_t b = kTopkSquareBins - 1; b >= 0; --b) {
      if (k == candidates_ || (layer.count[b] > 0 && lower_bound(layer, b) > upper)) {
        first_sure = first_open = b;
      } else if (k > 0 && (layer.count[b] == 0 || upper_bound(layer, b) >= lower)) {
        first_open = b;
      } else if (layer.count[b] > 0) {
        break;
      }
    }
    for (int64_t b = first_sure; b < kTopkSquareBins; ++b) sure += layer.count[b];
    for (int64_t b = first_open; b < first_sure; ++b) wanted += layer.count[b];
    const int64_t top = key_below(first_sure), bottom = key_below(first_open);
    const TopkBracket bracket{{top, top, bottom, bottom}};
    const int64_t n = static_cast<int64_t>(layer.chunks.size()), key_bytes = problem_.wide ? 8 : 4;
    const int64_t workers = std::max<int64_t>(1, std::min(n, thread_count()));
    const int64_t capacity = wanted + 64, room = checked_product(workers, capacity, kTopkOp);
    const Scratch keys(checked_product(room, key_bytes, kTopkOp)), positions(room * 2);
    for_each_range(workers, 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t w = begin; w < end; ++w) {
        FASTPRUNE_PICK(topk_filter)
        (problem_, layer.chunks.data(), n * w / workers, n * (w + 1) / workers, bracket,
         {keys.as<char>() + w * capacity * key_bytes, positions.as<uint16_t>() + w * capacity,
          capacity});
      }
    });
    std::vector<std::pair<int64_t, int64_t>> found;  // minus the key, index
    for (int64_t w = 0; w < workers; ++w) {
      for (int64_t c = n * w / workers; c < n * (w + 1) / workers; ++c) {
        const TopkChunk& chunk = layer.chunks[c];
        for (int64_t j = chunk.first; j < chunk.first + chunk.inside; ++j) {
          const int64_t at = w * capacity + j;
          const int64_t key = problem_.wide ? keys.as<int64_t>()[at] : keys.as<int32_t>()[at];
          found.emplace_back(-key, chunk.span.begin + positions.as<uint16_t>()[at]);
        }
      }
    }
    std::sort(found.begin(), found.end());
    double total =
        first_sure < kTopkSquareBins ? layer.over[first_sure] + layer.sum[first_sure] : 0.0;
    for (size_t j = 0; j < found.size();) {
      size_t same = j;
      const double square = this->square(-found[j].first);
      while (same < found.size() && found[same].first == found[j].first) ++same;
      total += square * static_cast<double>(same - j);
      for (; j < same; ++j) {
        open.push_back({ratio(square, total), static_cast<int64_t>(i), found[j].second});
      }
    }
    return sure;
  }

  TopkProblem problem_;
  std::vector<Layer> layers_;
  int64_t first_;
  int64_t candidates_ = 0;
};

}  // namespace fastprune
