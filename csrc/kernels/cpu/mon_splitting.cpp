#include "kernels/cpu/mon_splitting.h"

#include "kernels/cpu/masked_linear_tiles.h"
#include "kernels/cpu/mon_dense.h"
#include "kernels/cpu/mon_samples.h"
#include "kernels/cpu/mon_step.h"
#include "kernels/cpu/panel.h"
#include "kernels/cpu/panel_pack.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// Between panels, in elements: rows of the same number would stand at the same place of a page
// where a panel is whole pages, and loads would wait for stores that they have nothing to do with.
constexpr int64_t kPanelGap = 96;

// Panels of n rows x tile lanes. Which of z[0], z[1] (rhs[0], rhs[1]) is current follows from the
// number of steps made.
template <typename T>
struct State {
  T* bias;   // b, or g
  T* slope;  // J
  T* scale;  // J / (J + alpha (1 - J))
  T* z[2];
  T *half, *rhs[2];  // Peaceman-Rachford: u_half, and what the resolvent is applied to
  typename SignedOf<sizeof(T)>::type* active;  // per lane: -1 until the sample has converged

  static int64_t panels(const MonSplittingArgs& a) {
    return 3 + (a.slope != nullptr ? 2 : 0) + (a.resolvent != nullptr ? 3 : 0);
  }
  State(const MonSplittingArgs& a, int tile, void* memory) {
    T* next = static_cast<T*>(memory);
    const auto panel = [&](bool wanted) {
      T* here = wanted ? next : nullptr;
      if (wanted) next += a.n * tile + kPanelGap;
      return here;
    };
    bias = panel(true);
    z[0] = panel(true);
    z[1] = panel(true);
    slope = panel(a.slope != nullptr);
    scale = panel(a.slope != nullptr);
    half = panel(a.resolvent != nullptr);
    rhs[0] = panel(a.resolvent != nullptr);
    rhs[1] = panel(a.resolvent != nullptr);
    active = reinterpret_cast<typename SignedOf<sizeof(T)>::type*>(next);
  }
};

template <typename T>
struct TileOf {
  int64_t first;
  int n, lanes;  // samples, and lanes that hold them
  TileOf(const MonSplittingArgs& a, int64_t index) : first(index * a.tile) {
    const int64_t left = a.batch - first;
    n = static_cast<int>(left < a.tile ? left : a.tile);
    lanes = tile_for<T>(n);
  }
};

enum class Phase { step, apply };

// What happens to a row of a product once it is complete.
template <typename T, Phase P, bool Resolvent, bool Adjoint, MonActivation A>
struct Finish {
  static constexpr int W = kLanes<T>;
  using Bits = typename VectorOf<typename SignedOf<sizeof(T)>::type>::type;

  const State<T>& s;
  int lanes;
  MonStep<T, Resolvent, Adjoint, A> step;
  const T* z;
  T* to;
  const T* rhs;
  T* next_rhs;
  bool per_sample;
  T* norms;  // 2 * lanes

  // The sums stand where the new state is to be.
  void rows(int64_t first, int64_t count, int lane, int width) const {
    for (int j = lane; j < lane + width; j += W) {
      if constexpr (P == Phase::apply) {
        for (int64_t r = first; r < first + count; ++r) one(r * lanes + j, j, nullptr, nullptr);
      } else {
        Vec<T> change = load(norms + j), norm = load(norms + lanes + j);
        for (int64_t r = first; r < first + count; ++r) one(r * lanes + j, j, &change, &norm);
        store(norms + j, change);
        store(norms + lanes + j, norm);
      }
    }
  }
  RowsDone done() const {
    return {[](const void* self, int64_t first, int64_t count, int lane, int width) {
              static_cast<const Finish*>(self)->rows(first, count, lane, width);
            },
            this};
  }

 private:
  inline void one(int64_t i, int j, Vec<T>* changes, Vec<T>* norm) const {
    const Vec<T> sum = load(to + i);
    if constexpr (P == Phase::apply) {
      store(to + i, Adjoint ? load(s.slope + i) * sum : activate<A, T>(sum));
      return;
    }
    const Vec<T> old = load(z + i);
    Vec<T> made = step(sum, old, {s.bias, s.scale, s.half, rhs, next_rhs}, i);
    if (per_sample) {
      const Bits on = (Bits)load(s.active + j);
      made = (Vec<T>)(((Bits)made & on) | ((Bits)old & ~on));
    }
    store(to + i, made);
    const Vec<T> change = made - old;
    *changes += change * change;
    *norm += made * made;
  }
};

// The part of a packed matrix that products with panels read.
template <typename T>
const T* groups_of(const void* packed, int64_t n) {
  return static_cast<const T*>(packed) + mon_columns_size(n);
}

// sums = bias + W x; every row is handed to `done` when it is complete. down: a panel.
template <typename T>
void multiply(const MonSplittingArgs& a, const T* x, const T* bias, int lanes, T* sums, T* down,
              const RowsDone& done) {
  const MonMatrix& m = a.matrix;
  if (m.dense != nullptr) {
    DenseProduct<T>{groups_of<T>(m.dense, a.n), a.n, x, bias, lanes, sums}.run(done);
    return;
  }
  constexpr int W = kLanes<T>;
  const auto add = [&](const PatternView& p, const void* values, const T* panel, T* rows) {
    for (int64_t b = 0; b < p.blocks(); ++b) {
      panel_product(rows_of(p, b, 0, a.n, rows), panel + b * p.block_depth * lanes, lanes,
                    static_cast<const T*>(values));
    }
  };
  const Vec<T> diagonal = broadcast(static_cast<T>(m.diagonal));
  for (int64_t i = 0; i < a.n * lanes; i += W) {
    store(sums + i, load(bias + i) + diagonal * load(x + i));
  }
  if (m.has_single) add(m.single, m.single_values, x, sums);
  if (m.has_pair) {
    start_rows<T>(down, nullptr, 0, a.n, lanes);
    add(m.down, m.down_values, x, down);
    add(m.up, m.up_values, down, sums);
  }
  done(0, a.n, 0, lanes);
}

template <typename T>
void begin(const MonSplittingArgs& a, int64_t index, void* memory) {
  const TileOf<T> tile(a, index);
  const State<T> s(a, tile.lanes, memory);
  const int64_t size = a.n * tile.lanes;
  const auto pack = [&](const void* from, T* to) {
    pack_transposed(static_cast<const T*>(from) + tile.first * a.n, a.n, tile.n, a.n, tile.lanes,
                    to);
  };
  pack(a.bias, s.bias);
  for (int64_t i = 0; i < size; ++i) s.z[0][i] = 0;
  if (a.slope != nullptr) {
    pack(a.slope, s.slope);
    adjoint_scales(s.slope, size, static_cast<T>(a.alpha), s.scale);
  }
  if (a.resolvent != nullptr) {
    const T alpha = a.slope == nullptr ? static_cast<T>(a.alpha) : T(0);
    for (int64_t i = 0; i < size; ++i) {
      s.half[i] = 0;
      s.rhs[0][i] = alpha * s.bias[i];
    }
  }
  for (int j = 0; j < tile.lanes; ++j) s.active[j] = j < tile.n ? -1 : 0;
}

// The residual of every running sample after a step; true while one runs on.
template <typename T>
bool stop_samples(const MonSplittingArgs& a, const State<T>& s, const TileOf<T>& tile,
                  const T* norms, const MonNotes& notes) {
  bool running = false;
  for (int j = 0; j < tile.n; ++j) {
    if (s.active[j] == 0) continue;
    const double residual = sample_residual(norms[j], norms[tile.lanes + j]);
    ++notes.iterations[j];
    notes.residuals[j] = residual;
    if (goes_on(residual, a.tol)) {
      running = true;
    } else {
      s.active[j] = 0;
    }
  }
  return running;
}

template <typename T, bool Resolvent, bool Adjoint, MonActivation A>
int64_t steps(const MonSplittingArgs& a, int64_t index, void* memory, void* scratch, int64_t first,
              int64_t count, const MonNotes& notes) {
  const TileOf<T> tile(a, index);
  const State<T> s(a, tile.lanes, memory);
  T* const down = static_cast<T*>(scratch);
  T* const own_norms = down + a.n * tile.lanes;
  const T alpha = static_cast<T>(a.alpha);
  for (int64_t step = first; step < first + count; ++step) {
    const int from = static_cast<int>(step & 1);
    T* norms =
        a.per_sample ? own_norms : static_cast<T*>(notes.norms) + (step - first) * 2 * tile.lanes;
    for (int j = 0; j < 2 * tile.lanes; ++j) norms[j] = 0;
    const Finish<T, Phase::step, Resolvent, Adjoint, A> finish{
        s,           tile.lanes,      {alpha, 1 - alpha}, s.z[from], s.z[1 - from],
        s.rhs[from], s.rhs[1 - from], a.per_sample,       norms};
    if constexpr (Resolvent) {
      DenseProduct<T>{
          groups_of<T>(a.resolvent, a.n), a.n, s.rhs[from], nullptr, tile.lanes, s.z[1 - from]}
          .run(finish.done());
    } else if (step == 0) {  // W 0 = 0
      for (int64_t i = 0; i < a.n * tile.lanes; i += kLanes<T>) {
        store(s.z[1 - from] + i, load(s.bias + i));
      }
      finish.rows(0, a.n, 0, tile.lanes);
    } else {
      multiply<T>(a, s.z[from], s.bias, tile.lanes, s.z[1 - from], down, finish.done());
    }
    if (a.per_sample && !stop_samples(a, s, tile, norms, notes)) return step + 1;
  }
  return first + count;
}

template <typename T, bool Adjoint, MonActivation A>
void finish_tile(const MonSplittingArgs& a, int64_t index, void* memory, void* scratch,
                 int64_t made, void* out, void* z) {
  const TileOf<T> tile(a, index);
  const State<T> s(a, tile.lanes, memory);
  const int from = static_cast<int>(made & 1);
  T* const applied = s.z[1 - from];
  const Finish<T, Phase::apply, false, Adjoint, A> finish{
      s, tile.lanes, {T(1), T(0)}, s.z[from], applied, nullptr, nullptr, false, nullptr};
  multiply<T>(a, s.z[from], s.bias, tile.lanes, applied, static_cast<T*>(scratch), finish.done());
  const auto unpack = [&](const T* from_panel, void* to) {
    write_transposed<T>(from_panel, a.n, tile.lanes, tile.n, static_cast<T*>(to) + tile.first * a.n,
                        nullptr, false, a.n);
  };
  unpack(applied, out);
  unpack(s.z[from], z);
}

}  // namespace

int64_t mon_pack_groups(int64_t n) { return row_groups(n); }

int64_t mon_packed_size(int64_t n) { return mon_columns_size(n) + row_groups(n) * kGroupRows * n; }

void mon_pack_matrix(DType dtype, int64_t n, const void* matrix, void* packed, int64_t begin,
                     int64_t end) {
  const auto pack = [&](const auto* from, auto* to) {
    pack_groups(n, from, to + mon_columns_size(n), begin, end);
  };
  if (dtype == DType::f64) {
    pack(static_cast<const double*>(matrix), static_cast<double*>(packed));
  } else {
    pack(static_cast<const float*>(matrix), static_cast<float*>(packed));
  }
  if (begin == 0) mon_pack_columns(dtype, n, matrix, packed);
}

int64_t mon_widest_tile(DType dtype, int64_t batch) {
  return dtype == DType::f64 ? tile_for<double>(batch) : tile_for<float>(batch);
}

int64_t mon_state_bytes(const MonSplittingArgs& a) {
  if (a.by_sample) return mon_samples_state_bytes(a);
  const int64_t element = a.dtype == DType::f64 ? 8 : 4;
  return ((State<float>::panels(a) * a.n + 1) * a.tile + 8 * kPanelGap) * element;
}

int64_t mon_scratch_bytes(const MonSplittingArgs& a) {
  if (a.by_sample) return mon_samples_scratch_bytes(a);
  const int64_t element = a.dtype == DType::f64 ? 8 : 4;
  return (a.n + 2) * a.tile * element;
}

void mon_begin(const MonSplittingArgs& a, int64_t tile, void* state) {
  if (a.by_sample) return mon_samples_begin(a, tile, state);
  a.dtype == DType::f64 ? begin<double>(a, tile, state) : begin<float>(a, tile, state);
}

int64_t mon_steps(const MonSplittingArgs& a, int64_t tile, void* state, void* scratch,
                  int64_t first, int64_t count, const MonNotes& notes) {
  if (a.by_sample) return mon_samples_steps(a, tile, state, scratch, first, count, notes);
  return with_method(a, [&](auto zero, auto resolvent, auto adjoint, auto activation) {
    return steps<decltype(zero), resolvent.value, adjoint.value, activation.value>(
        a, tile, state, scratch, first, count, notes);
  });
}

void mon_finish(const MonSplittingArgs& a, int64_t tile, void* state, void* scratch, int64_t made,
                void* out, void* z) {
  if (a.by_sample) return mon_samples_finish(a, tile, state, scratch, out, z);
  with_equation(a, [&](auto zero, auto adjoint, auto activation) {
    finish_tile<decltype(zero), adjoint.value, activation.value>(a, tile, state, scratch, made, out,
                                                                 z);
  });
}

}  // namespace fastprune::FASTPRUNE_ISA
