#include "kernels/cpu/mon_direct.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

template <typename T, MonActivation A, bool Adjoint>
struct Update {
  static constexpr int W = kLanes<T>;

  const MonDirectMaps& m;

  // Items whose sample rests keep their sums, which nobody reads.
  void step(const T* value, int64_t begin, int64_t end) const {
    const Int<T> all = Int<T>{} - 1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item * m.rows * m.width;
      double* sums = m.sums + item * m.sums_per_item();
      if (m.batch_last) {
        for (int64_t j = 0; j < m.width; j += W) {
          const int n = part(j);
          const Int<T> active = (Int<T>)load_part(static_cast<const T*>(m.active) + j, n);
          Vec<T> change{}, norm{};
          for (int64_t r = 0; r < m.rows; ++r) {
            one(value, first + r * m.width + j, n, active, change, norm);
          }
          for (int i = 0; i < n; ++i) {
            sums[j + i] = static_cast<double>(change[i]);
            sums[m.width + j + i] = static_cast<double>(norm[i]);
          }
        }
        continue;
      }
      using Bits = typename SignedOf<sizeof(T)>::type;
      if (static_cast<const Bits*>(m.active)[item / m.per_sample] == 0) continue;
      Vec<T> change{}, norm{};
      for (int64_t j = 0; j < m.width; j += W) one(value, first + j, part(j), all, change, norm);
      sums[0] = sums[1] = 0;
      for (int i = 0; i < W; ++i) {
        sums[0] += static_cast<double>(change[i]);
        sums[1] += static_cast<double>(norm[i]);
      }
    }
  }

  void finish(T* value, int64_t begin, int64_t end) const {
    const T diagonal = static_cast<T>(m.diagonal);
    const int64_t last = end * m.rows * m.width;
    for (int64_t i = begin * m.rows * m.width; i < last; i += W) {
      const int n = static_cast<int>(last - i < W ? last - i : W);
      const Vec<T> v = load_part(value + i, n) + load_part(z() + i, n) * diagonal;
      Vec<T> result;
      if constexpr (Adjoint) {
        const Vec<T> slope = load_part(slopes() + i, n);
        result = slope == T(0) ? Vec<T>{} : slope * v;
      } else {
        result = activate<A, T>(v);
      }
      store_part(value + i, result, n);
    }
  }

 private:
  T* z() const { return static_cast<T*>(m.z); }
  const T* slopes() const { return static_cast<const T*>(m.slope); }
  int part(int64_t j) const { return static_cast<int>(m.width - j < W ? m.width - j : W); }

  // Lanes beyond n add nothing: what they make of zeros is not kept.
  void one(const T* value, int64_t i, int n, Int<T> active, Vec<T>& changes, Vec<T>& norms) const {
    const T alpha = static_cast<T>(m.alpha), diagonal = static_cast<T>(m.diagonal);
    const Vec<T> old = load_part(z() + i, n);
    const Vec<T> v = (load_part(value + i, n) + old * diagonal) * alpha + old * (T(1) - alpha);
    Vec<T> made;
    if constexpr (Adjoint) {
      made = load_part(slopes() + i, n) * v;
    } else {
      made = proximal<A, T>(v, alpha);
    }
    made = active ? made : old;
    if (n < W) {
      for (int j = n; j < W; ++j) made[j] = 0;
    }
    store_part(z() + i, made, n);
    const Vec<T> change = made - old;
    changes += change * change;
    norms += made * made;
  }
};

template <typename T, typename F>
void choose(const MonDirectMaps& m, F f) {
  if (m.slope != nullptr) return f(Update<T, MonActivation::relu, true>{m});
  switch (m.activation) {
    case MonActivation::tanh:
      return f(Update<T, MonActivation::tanh, false>{m});
    case MonActivation::sigmoid:
      return f(Update<T, MonActivation::sigmoid, false>{m});
    case MonActivation::softplus:
      return f(Update<T, MonActivation::softplus, false>{m});
    case MonActivation::identity:
      return f(Update<T, MonActivation::identity, false>{m});
    default:
      return f(Update<T, MonActivation::relu, false>{m});
  }
}

template <typename T>
void scale_of(T alpha, const T* slope, T* scale, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T j = slope[i];
    scale[i] = j == 0 ? T(0) : j / (j + alpha * (1 - j));
  }
}

}  // namespace

int64_t mon_direct_lanes(DType dtype) {
  return dtype == DType::f64 ? kLanes<double> : kLanes<float>;
}

void mon_direct_scale(DType dtype, double alpha, const void* slope, void* scale, int64_t begin,
                      int64_t end) {
  if (dtype == DType::f64) {
    return scale_of(alpha, static_cast<const double*>(slope), static_cast<double*>(scale), begin,
                    end);
  }
  scale_of(static_cast<float>(alpha), static_cast<const float*>(slope), static_cast<float*>(scale),
           begin, end);
}

void mon_direct_step(const MonDirectMaps& m, const void* value, int64_t begin, int64_t end) {
  if (m.dtype == DType::f64) {
    return choose<double>(m,
                          [&](auto u) { u.step(static_cast<const double*>(value), begin, end); });
  }
  choose<float>(m, [&](auto u) { u.step(static_cast<const float*>(value), begin, end); });
}

void mon_direct_finish(const MonDirectMaps& m, void* value, int64_t begin, int64_t end) {
  if (m.dtype == DType::f64) {
    return choose<double>(m, [&](auto u) { u.finish(static_cast<double*>(value), begin, end); });
  }
  choose<float>(m, [&](auto u) { u.finish(static_cast<float*>(value), begin, end); });
}

}  // namespace fastprune::FASTPRUNE_ISA
