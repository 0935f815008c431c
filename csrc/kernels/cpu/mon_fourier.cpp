#include "kernels/cpu/mon_fourier.h"

#include <type_traits>

#include "kernels/cpu/mon_fourier_dft.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// ---- The splitting methods, point by point
// -------------------------------------------------------

// Lanes of z (and of what it follows from) at one point of one group.
template <typename T>
struct Point {
  Vec<T>*bias, *slope, *u, *z;
};

template <typename T, MonActivation A, bool Adjoint, bool Resolvent>
struct Rule {
  static constexpr bool kCheap = A == MonActivation::relu || A == MonActivation::identity;
  static constexpr bool kKeepsZ = !Resolvent || (!Adjoint && !kCheap);
  T alpha;

  // The proximal operator at v. In the adjoint, of forward-backward: slope * v.
  Vec<T> prox(Vec<T> v, const Point<T>& at) const {
    if constexpr (!Adjoint) {
      return proximal<A, T>(v, alpha);
    } else if constexpr (Resolvent) {
      return *at.slope * (*at.bias * alpha + v);
    } else {
      return *at.slope * v;
    }
  }
  Vec<T> z(const Point<T>& at, bool inside) const {
    if constexpr (kKeepsZ) {
      return *at.z;
    } else {
      return inside ? prox(*at.u, at) : Vec<T>{};
    }
  }
  // value: of the product; the first step has none, and starts at 0. Returns the next right-hand
  // side; writes the old and the new z.
  template <bool First>
  Vec<T> step(const Point<T>& at, bool inside, Vec<T> value, Int<T> active, Vec<T>& old,
              Vec<T>& moved) const {
    if constexpr (First) {
      value = old = Vec<T>{};
    } else {
      old = z(at, inside);
    }
    if constexpr (Resolvent) {
      const Vec<T> u = *at.u, u_next = active ? value * T(2) - (old * T(2) - u) : u;
      *at.u = u_next;
      moved = inside ? prox(u_next, at) : Vec<T>{};
      if constexpr (kKeepsZ) {
        moved = active ? moved : old;
        *at.z = moved;
      }
      return right(at, moved, u_next);
    } else {
      const Vec<T> v = (value + *at.bias) * alpha + old * (T(1) - alpha);
      moved = inside ? prox(v, at) : Vec<T>{};
      moved = active ? moved : old;
      *at.z = moved;
      return moved;
    }
  }
  Vec<T> right(const Point<T>& at, Vec<T> z, Vec<T> u) const {
    const Vec<T> reflected = z * T(2) - u;
    return Adjoint ? reflected : *at.bias * alpha + reflected;
  }
  void finish(const Point<T>& at, bool inside, Vec<T> value) const {
    const Vec<T> v = value + *at.bias;
    Vec<T> result{};
    if (inside) {
      if constexpr (Adjoint) {
        result = *at.slope == T(0) ? Vec<T>{} : *at.slope * v;
      } else {
        result = activate<A, T>(v);
      }
    }
    *at.bias = result;
  }
};

// ---- A pair of groups
// -----------------------------------------------------------------------------

struct PairOf {
  int64_t first;
  int parts;  // 1 where the last group has no partner
  PairOf(const MonFourierMaps& m, int64_t pair) {
    const int64_t pairs = (m.per_block + 1) / 2, within = 2 * (pair % pairs);
    first = pair / pairs * m.per_block + within;
    parts = within + 1 < m.per_block ? 2 : 1;
  }
};

template <typename T, typename R>
class Pair {
 public:
  static constexpr int W = kLanes<T>;

  Pair(const MonFourierMaps& maps, R rule, PairOf of, void* scratch)
      : m_(maps),
        rule_(rule),
        first_(of.first),
        parts_(of.parts),
        map_(static_cast<Vec<T>*>(scratch)),
        work_(map_ + 2 * maps.height * maps.pitch) {}

  void run(MonFourierStep step, bool inverse, bool forward) {
    if (inverse) columns_from_spectrum();
    const double scale = 1.0 / (2.0 * static_cast<double>(m_.height * m_.width));
    if (step == MonFourierStep::iterate) clear_sums();
    for (int64_t y = 0; y < m_.height; ++y) {
      Vec<T>* row = map_ + m_.column.places[y];
      if (inverse) dft_line<T>(m_.row, row, work_);
      if (parts_ == 1) clear_imaginary(row);
      for (int part = 0; part < parts_; ++part) {
        update(step, inverse, static_cast<T>(scale), y, row + part, part);
      }
      if (forward) dft_line<T>(m_.row, row, work_);
    }
    if (forward) columns_to_spectrum();
  }

 private:
  Vec<T>* spectrum(int64_t frequency) const {
    return static_cast<Vec<T>*>(m_.spectrum) + 2 * (frequency * m_.groups + first_);
  }
  Vec<T>* column(int64_t kx) const { return map_ + 2 * kx; }
  int64_t row_at(int64_t ky) const { return 2 * m_.pitch * ky; }

  // Calls f(kx, -kx, ky, -ky, where in the spectrum) for the frequencies of column kx.
  template <typename F>
  void each_frequency(int64_t kx, int64_t& frequency, F f) const {
    const int64_t minus_kx = kx == 0 ? 0 : m_.width - kx;
    const int64_t count = fourier_column_height(m_.height, m_.width, kx);
    for (int64_t ky = 0; ky < count; ++ky) {
      const int64_t minus_ky = ky == 0 ? 0 : m_.height - ky;
      f(column(kx) + row_at(ky), column(minus_kx) + row_at(minus_ky), spectrum(frequency++));
    }
  }

  // With A and B the transforms of the two maps, Z = A + i B is that of the complex map;
  // A = (Z(k) + conj Z(-k)) / 2, i B = (Z(k) - conj Z(-k)) / 2. The halves are left to `scale`.
  void columns_to_spectrum() {
    int64_t frequency = 0;
    for (int64_t kx = 0; kx <= m_.width / 2; ++kx) {
      dft_line<T>(m_.column, column(kx), work_);
      if (kx != 0 && 2 * kx != m_.width) dft_line<T>(m_.column, column(m_.width - kx), work_);
      each_frequency(kx, frequency, [&](const Vec<T>* plus, const Vec<T>* minus, Vec<T>* s) {
        s[0] = plus[0] + minus[0], s[1] = plus[1] - minus[1];
        if (parts_ == 2) s[2] = plus[1] + minus[1], s[3] = minus[0] - plus[0];
      });
    }
  }

  // The inverse transform is the transform of what is at -k.
  void columns_from_spectrum() {
    int64_t frequency = 0;
    for (int64_t kx = 0; kx <= m_.width / 2; ++kx) {
      each_frequency(kx, frequency, [&](Vec<T>* plus, Vec<T>* minus, const Vec<T>* s) {
        const Vec<T> br = parts_ == 2 ? s[2] : Vec<T>{}, bi = parts_ == 2 ? s[3] : Vec<T>{};
        if (plus == minus) {  // real but for rounding
          plus[0] = s[0], plus[1] = br;
        } else {
          minus[0] = s[0] - bi, minus[1] = s[1] + br;
          plus[0] = s[0] + bi, plus[1] = br - s[1];
        }
      });
      dft_line<T>(m_.column, column(kx), work_);
      if (kx != 0 && 2 * kx != m_.width) dft_line<T>(m_.column, column(m_.width - kx), work_);
    }
  }

  void clear_sums() {
    double* sums = m_.sums + first_ * 2 * W;
    for (int i = 0; i < parts_ * 2 * W; ++i) sums[i] = 0;
  }
  void clear_imaginary(Vec<T>* row) {
    for (int64_t x = 0; x < m_.width; ++x) row[2 * x + 1] = Vec<T>{};
  }
  // In a fixed order, and in double: the same sums for any number of threads.
  static void add(double* sums, Vec<T> terms) {
    alignas(kVectorBytes) T lanes[W];
    store(lanes, terms);
    for (int j = 0; j < W; ++j) sums[j] += static_cast<double>(lanes[j]);
  }

  // row: that of the values and of the next right-hand side, at the places of the transform.
  void update(MonFourierStep step, bool inverse, T scale, int64_t y, Vec<T>* row, int part) {
    const int64_t group = first_ + part;
    // Maps of no more than two rings have no inside at all.
    const bool row_inside = y >= m_.ring && y < m_.height - m_.ring && m_.ring < m_.width - m_.ring;
    const int64_t begin = row_inside ? m_.ring : m_.width;
    const int64_t end = row_inside ? m_.width - m_.ring : m_.width;
    const auto each = [&](auto at_point) {
      const int64_t offset = (group * m_.height + y) * m_.width;
      const auto of = [&](void* p) { return static_cast<Vec<T>*>(p) + offset; };
      const Point<T> start{of(m_.bias), of(m_.slope), of(m_.u), of(m_.z)};
      const auto run = [&](int64_t from, int64_t to, auto inside) {
        for (int64_t x = from; x < to; ++x) {
          at_point(Point<T>{start.bias + x, start.slope + x, start.u + x, start.z + x},
                   row + m_.row.places[x], inside);
        }
      };
      run(0, begin, std::false_type{});
      run(begin, end, std::true_type{});
      run(end, m_.width, std::false_type{});
    };
    switch (step) {
      case MonFourierStep::start:
        each(
            [&](const Point<T>& at, Vec<T>* x, auto) { *x = rule_.right(at, Vec<T>{}, Vec<T>{}); });
        break;
      case MonFourierStep::iterate: {
        const Int<T> active = static_cast<const Int<T>*>(m_.active)[group];
        Vec<T> changes{}, squares{};
        const auto steps = [&](auto first) {
          each([&](const Point<T>& at, Vec<T>* x, auto inside) {
            Vec<T> old, moved;
            *x = rule_.template step<first.value>(at, inside, *x * scale, active, old, moved);
            const Vec<T> change = moved - old;
            changes += change * change, squares += moved * moved;
          });
        };
        if (inverse) {
          steps(std::false_type{});
        } else {
          steps(std::true_type{});
        }
        double* sums = m_.sums + group * 2 * W;
        add(sums, changes), add(sums + W, squares);
        break;
      }
      case MonFourierStep::prepare:
        each([&](const Point<T>& at, Vec<T>* x, auto inside) {
          *x = rule_.z(at, inside);
          if constexpr (!R::kKeepsZ) *at.u = *x;
        });
        break;
      case MonFourierStep::finish:
        each([&](const Point<T>& at, Vec<T>* x, auto inside) {
          rule_.finish(at, inside, *x * scale);
        });
        break;
    }
  }

  const MonFourierMaps& m_;
  const R rule_;
  const int64_t first_;
  const int parts_;
  Vec<T>*const map_, *const work_;
};

// ---- By the types
// -----------------------------------------------------------------------------------

// Nothing of the pair moves any more.
template <typename T>
bool at_rest(const MonFourierMaps& m, const PairOf& of) {
  const Int<T>* active = static_cast<const Int<T>*>(m.active) + of.first;
  for (int part = 0; part < of.parts; ++part) {
    for (int j = 0; j < kLanes<T>; ++j) {
      if (active[part][j] != 0) return false;
    }
  }
  return true;
}

template <typename T, MonActivation A, bool Adjoint, bool Resolvent>
void run_pairs(const MonFourierMaps& m, MonFourierStep step, bool inverse, bool forward,
               int64_t begin, int64_t end, void* scratch) {
  using R = Rule<T, A, Adjoint, Resolvent>;
  for (int64_t pair = begin; pair < end; ++pair) {
    const PairOf of(m, pair);
    if (step == MonFourierStep::iterate && at_rest<T>(m, of)) continue;
    Pair<T, R>(m, R{static_cast<T>(m.alpha)}, of, scratch).run(step, inverse, forward);
  }
}

template <typename T>
auto choose_rule(const MonFourierMaps& m) {
  const auto either = [&](auto splitting, auto fb) { return m.resolvent ? splitting : fb; };
  if (m.adjoint) {  // whatever the nonlinearity
    constexpr auto A = MonActivation::relu;
    return either(&run_pairs<T, A, true, true>, &run_pairs<T, A, true, false>);
  }
  switch (m.activation) {
    case MonActivation::tanh: {
      constexpr auto A = MonActivation::tanh;
      return either(&run_pairs<T, A, false, true>, &run_pairs<T, A, false, false>);
    }
    case MonActivation::sigmoid: {
      constexpr auto A = MonActivation::sigmoid;
      return either(&run_pairs<T, A, false, true>, &run_pairs<T, A, false, false>);
    }
    case MonActivation::identity: {
      constexpr auto A = MonActivation::identity;
      return either(&run_pairs<T, A, false, true>, &run_pairs<T, A, false, false>);
    }
    case MonActivation::softplus: {
      constexpr auto A = MonActivation::softplus;
      return either(&run_pairs<T, A, false, true>, &run_pairs<T, A, false, false>);
    }
    default: {
      constexpr auto A = MonActivation::relu;
      return either(&run_pairs<T, A, false, true>, &run_pairs<T, A, false, false>);
    }
  }
}

// ---- Maps and groups
// ----------------------------------------------------------------------------------

template <typename T>
void from_maps(const MonFourierLayout& l, const double* slope_alpha, const T* maps, Vec<T>* groups,
               int64_t begin, int64_t end) {
  constexpr int W = kLanes<T>;
  for (int64_t g = begin; g < end; ++g) {
    const MonFourierLayout::Group group = l.group(g);
    const T* from = maps + group.first * l.points;
    Vec<T>* to = groups + g * l.points;
    for (int64_t i = 0; i < l.points; i += W) {
      const int n = static_cast<int>(l.points - i < W ? l.points - i : W);
      Vec<T> v[W];
      for (int j = 0; j < W; ++j) {
        v[j] = j < group.filled ? load_part(from + j * group.step * l.points + i, n) : Vec<T>{};
      }
      if (slope_alpha != nullptr) {
        const T alpha = static_cast<T>(*slope_alpha);
        for (int j = 0; j < W; ++j) v[j] /= (T(1) - v[j]) * alpha + v[j];
      }
      transpose<T>(v);
      for (int j = 0; j < n; ++j) to[i + j] = v[j];
    }
  }
}

template <typename T>
void to_maps(const MonFourierLayout& l, const Vec<T>* groups, T* maps, int64_t begin, int64_t end) {
  constexpr int W = kLanes<T>;
  for (int64_t g = begin; g < end; ++g) {
    const MonFourierLayout::Group group = l.group(g);
    T* to = maps + group.first * l.points;
    const Vec<T>* from = groups + g * l.points;
    for (int64_t i = 0; i < l.points; i += W) {
      const int n = static_cast<int>(l.points - i < W ? l.points - i : W);
      Vec<T> v[W] = {};
      for (int j = 0; j < n; ++j) v[j] = from[i + j];
      transpose<T>(v);
      for (int j = 0; j < group.filled; ++j) {
        store_part(to + j * group.step * l.points + i, v[j], n);
      }
    }
  }
}

}  // namespace

int64_t mon_fourier_lanes(DType dtype) {
  return dtype == DType::f64 ? kLanes<double> : kLanes<float>;
}

int64_t mon_fourier_maps_scratch(const MonFourierMaps& m) {
  return (2 * m.height * m.pitch + m.work) * kVectorBytes;
}

void mon_fourier_maps(const MonFourierMaps& m, MonFourierStep step, bool inverse, bool forward,
                      int64_t begin, int64_t end, void* scratch) {
  const auto run = m.dtype == DType::f64 ? choose_rule<double>(m) : choose_rule<float>(m);
  run(m, step, inverse, forward, begin, end, scratch);
}

void mon_fourier_from_maps(const MonFourierLayout& layout, const double* slope_alpha,
                           const void* maps, void* groups, int64_t begin, int64_t end) {
  if (layout.dtype == DType::f64) {
    from_maps(layout, slope_alpha, static_cast<const double*>(maps),
              static_cast<Vec<double>*>(groups), begin, end);
  } else {
    from_maps(layout, slope_alpha, static_cast<const float*>(maps),
              static_cast<Vec<float>*>(groups), begin, end);
  }
}

void mon_fourier_to_maps(const MonFourierLayout& layout, const void* groups, void* maps,
                         int64_t begin, int64_t end) {
  if (layout.dtype == DType::f64) {
    to_maps(layout, static_cast<const Vec<double>*>(groups), static_cast<double*>(maps), begin,
            end);
  } else {
    to_maps(layout, static_cast<const Vec<float>*>(groups), static_cast<float*>(maps), begin, end);
  }
}

}  // namespace fastprune::FASTPRUNE_ISA
