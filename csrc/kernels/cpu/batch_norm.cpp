#include "kernels/cpu/batch_norm.h"

#include <cmath>

#include "kernels/cpu/activations.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// Sums of vectors in float64: partial sums in the lanes hold few terms each, so that float32 sums
// lose no more than the rounding of their terms.
template <typename T, int Sums>
class LongSums {
 public:
  static constexpr int W = kLanes<T>;
  static constexpr int kTerms = 64;  // of a lane, before it moves to float64

  inline void add(const Vec<T>* terms) {
    for (int s = 0; s < Sums; ++s) partial_[s] += terms[s];
    if (++terms_ == kTerms) flush();
  }
  void flush() {
    for (int s = 0; s < Sums; ++s) {
      alignas(kVectorBytes) T lanes[W];
      store(lanes, partial_[s]);
      double sum = 0;
      for (int j = 0; j < W; ++j) sum += static_cast<double>(lanes[j]);
      total_[s] += sum;
      partial_[s] = Vec<T>{};
    }
    terms_ = 0;
  }
  double total(int s) const { return total_[s]; }

 private:
  Vec<T> partial_[Sums] = {};
  double total_[Sums] = {};
  int terms_ = 0;
};

// Calls f(offset, n) for the vectors of channel c: n elements from `offset`.
template <typename T, typename F>
inline void for_each_vector(const ChannelRuns& r, int64_t c, F f) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t p = 0; p < r.pieces; ++p) {
    const int64_t first = c * r.channel_stride + p * r.piece_stride;
    int64_t i = 0;
    for (; i + W <= r.length; i += W) f(first + i, static_cast<int>(W));
    if (i < r.length) f(first + i, static_cast<int>(r.length - i));
  }
}

// The lanes below n; the others are zeros.
template <typename T>
inline Vec<T> first_lanes(Vec<T> v, int n) {
  if (n == kLanes<T>) return v;
  for (int j = n; j < kLanes<T>; ++j) v[j] = T(0);
  return v;
}

template <typename T>
inline T at_or(const void* values, int64_t c, T otherwise) {
  return values == nullptr ? otherwise : static_cast<const T*>(values)[c];
}

template <typename S>
void normalize(const BatchNormArgs& a, int64_t c) {
  using T = Accumulator<S>;
  const S* x = static_cast<const S*>(a.x);
  S* y = static_cast<S*>(a.y);
  const double count = static_cast<double>(a.runs.count());
  LongSums<T, 1> sum;
  for_each_vector<T>(a.runs, c, [&](int64_t i, int n) {
    const Vec<T> v = load_widened(x + i, n);
    sum.add(&v);
  });
  sum.flush();
  const T mean = static_cast<T>(sum.total(0) / count);
  // Around the rounded mean, and corrected for its rounding: no cancellation.
  LongSums<T, 2> squares;
  const Vec<T> means = broadcast(mean);
  for_each_vector<T>(a.runs, c, [&](int64_t i, int n) {
    const Vec<T> d = first_lanes<T>(load_widened(x + i, n) - means, n);
    const Vec<T> terms[2] = {d * d, d};
    squares.add(terms);
  });
  squares.flush();
  const double shift = squares.total(1) / count;
  double variance = squares.total(0) / count - shift * shift;
  variance = variance < 0 ? 0 : variance;  // a NaN stays
  const double invstd = 1.0 / std::sqrt(variance + a.eps);
  static_cast<T*>(a.mean)[c] = static_cast<T>(static_cast<double>(mean) + shift);
  static_cast<T*>(a.variance)[c] = static_cast<T>(variance);
  static_cast<T*>(a.invstd)[c] = static_cast<T>(invstd);
  const Vec<T> center = broadcast(static_cast<T*>(a.mean)[c]);
  const Vec<T> scale = broadcast(static_cast<T>(invstd) * at_or<T>(a.weight, c, T(1)));
  const Vec<T> offset = broadcast(at_or<T>(a.bias, c, T(0)));
  for_each_vector<T>(a.runs, c, [&](int64_t i, int n) {
    const Vec<T> v = (load_widened(x + i, n) - center) * scale + offset;
    finish_vector<S>(v, y + i, nullptr, a.relu, n);
  });
}

template <typename S>
void normalize_grad(const BatchNormGradArgs& a, int64_t c) {
  using T = Accumulator<S>;
  constexpr int W = kLanes<T>;
  const S *x = static_cast<const S*>(a.x), *dy = static_cast<const S*>(a.y_grad);
  S* dx = static_cast<S*>(a.x_grad);
  const double count = static_cast<double>(a.runs.count());
  const T invstd = static_cast<const T*>(a.invstd)[c], weight = at_or<T>(a.weight, c, T(1));
  const Vec<T> center = broadcast(static_cast<const T*>(a.mean)[c]);
  const Vec<T> scale = broadcast(invstd * weight), offset = broadcast(at_or<T>(a.bias, c, T(0)));
  // The gradient where ReLU let the value through: the same expression as in the forward pass.
  const auto passed = [&](Vec<T> centered, Vec<T> g) {
    return a.relu ? (centered * scale + offset > Vec<T>{} ? g : Vec<T>{}) : g;
  };
  LongSums<T, 2> sums;
  for_each_vector<T>(a.runs, c, [&](int64_t i, int n) {
    const Vec<T> centered = first_lanes<T>(load_widened(x + i, n) - center, n);
    const Vec<T> g = passed(centered, load_widened(dy + i, n));
    const Vec<T> terms[2] = {g, g * centered};
    sums.add(terms);
  });
  sums.flush();
  static_cast<T*>(a.bias_grad)[c] = static_cast<T>(sums.total(0));
  static_cast<T*>(a.weight_grad)[c] = static_cast<T>(sums.total(1) * static_cast<double>(invstd));
  const Vec<T> mean_g = broadcast(static_cast<T>(sums.total(0) / count));
  const Vec<T> slope = broadcast(static_cast<T>(
      sums.total(1) / count * static_cast<double>(invstd) * static_cast<double>(invstd)));
  for_each_vector<T>(a.runs, c, [&](int64_t i, int n) {
    const Vec<T> centered = load_widened(x + i, n) - center;
    const Vec<T> g = passed(centered, load_widened(dy + i, n));
    store_narrowed(dx + i, (g - mean_g - centered * slope) * scale, n < W ? n : W);
  });
}

}  // namespace

void batch_norm(const BatchNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    switch (a.dtype) {
      case DType::f32:
        normalize<float>(a, c);
        break;
      case DType::f64:
        normalize<double>(a, c);
        break;
      case DType::bf16:
        normalize<BFloat16>(a, c);
        break;
      case DType::f16:
        normalize<Float16>(a, c);
        break;
    }
  }
}

void batch_norm_grad(const BatchNormGradArgs& a, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    switch (a.dtype) {
      case DType::f32:
        normalize_grad<float>(a, c);
        break;
      case DType::f64:
        normalize_grad<double>(a, c);
        break;
      case DType::bf16:
        normalize_grad<BFloat16>(a, c);
        break;
      case DType::f16:
        normalize_grad<Float16>(a, c);
        break;
    }
  }
}

}  // namespace fastprune::FASTPRUNE_ISA
