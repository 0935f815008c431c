#include "kernels/cpu/mon_samples.h"

#include "kernels/cpu/mon_step.h"
#include "kernels/cpu/panel.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// Features of the largest matrix that is read column by column: beyond, only a sample or two would
// gain by it, and every matrix would be kept twice.
constexpr int64_t kMostFeatures = 1024;
// Rows of samples and columns begin at whole vectors of any ISA and type.
constexpr int64_t kRowElements = 16;
inline int64_t stride_of(int64_t n) { return (n + kRowElements - 1) / kRowElements * kRowElements; }

template <typename T>
void pack(int64_t n, const T* matrix, T* columns) {
  constexpr int W = kLanes<T>;
  const int64_t stride = stride_of(n);
  for (int64_t i = 0; i < stride; i += W) {  // squares of rows [i, i + W)
    for (int64_t k = 0; k < n; k += W) {
      const int wide = static_cast<int>(n - k < W ? n - k : W);
      Vec<T> square[W];
      for (int r = 0; r < W; ++r) {
        square[r] = i + r < n ? load_part(matrix + (i + r) * n + k, wide) : Vec<T>{};
      }
      transpose<T>(square);
      for (int c = 0; c < wide; ++c) store(columns + (k + c) * stride + i, square[c]);
    }
  }
}

// Rows of `stride` values, one per sample of the tile.
template <typename T>
struct Rows {
  int64_t first, count;  // samples
  int64_t stride;
  T *bias, *z;
  T *slope, *scale;  // adjoint
  T *half, *rhs;     // Peaceman-Rachford

  // Between the arrays, in elements: loads would wait for stores at the same place of a page.
  static constexpr int64_t kGap = 96;
  static int64_t arrays(const MonSplittingArgs& a) {
    return 2 + (a.slope != nullptr ? 2 : 0) + (a.resolvent != nullptr ? 2 : 0);
  }
  Rows(const MonSplittingArgs& a, int64_t tile, void* memory)
      : first(tile * a.tile),
        count(a.batch - first < a.tile ? a.batch - first : a.tile),
        stride(stride_of(a.n)) {
    T* next = static_cast<T*>(memory);
    const auto array = [&](bool wanted) {
      T* here = wanted ? next : nullptr;
      if (wanted) next += a.tile * stride + kGap;
      return here;
    };
    bias = array(true);
    z = array(true);
    slope = array(a.slope != nullptr);
    scale = array(a.slope != nullptr);
    half = array(a.resolvent != nullptr);
    rhs = array(a.resolvent != nullptr);
  }
};

// The factors of a product: elements of a row, each with the column of the same number.
template <typename T>
struct Factors {
  const T* row;
  const uint16_t* at;
  int64_t count;
};

// The elements of a row that are not zero; NaN is not. at: room for a vector more.
template <typename T>
Factors<T> nonzeros_of(const T* row, int64_t n, uint16_t* at) {
  int64_t count = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    __m512i k = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t i = 0; i < n; i += kLanes<T>) {  // past n the row is zero
      const uint32_t kept =
          _mm512_cmp_ps_mask(_mm512_loadu_ps(row + i), _mm512_setzero_ps(), _CMP_NEQ_UQ);
      const __m512i some = _mm512_maskz_compress_epi32(static_cast<__mmask16>(kept), k);
      // Half as wide: a store that crosses cache lines takes twice as long.
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + count), _mm512_cvtepi32_epi16(some));
      count += __builtin_popcount(kept);
      k = _mm512_add_epi32(k, _mm512_set1_epi32(kLanes<T>));
    }
    return {row, at, count};
  }
#endif
  for (int64_t k = 0; k < n; ++k) {
    at[count] = static_cast<uint16_t>(k);
    count += row[k] != T(0) ? 1 : 0;
  }
  return {row, at, count};
}

// sums = start (or 0) + the columns times their factors, of V vectors. Few vectors are summed in
// several parts, so that additions need not wait for each other.
template <typename T, int V>
void add_columns(const T* matrix, int64_t stride, const Factors<T>& f, const T* start, T* sums) {
  constexpr int W = kLanes<T>, kParts = V >= 4 ? 1 : V >= 2 ? 2 : 4;
  Vec<T> sum[kParts][V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) sum[p][v] = Vec<T>{};
    if (start != nullptr) sum[0][v] = load(start + v * W);
  }
  int64_t k = 0;
  for (; k + kParts <= f.count; k += kParts) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const T* column = matrix + f.at[k + p] * stride;
      const Vec<T> value = broadcast(f.row[f.at[k + p]]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[p][v] += value * load(column + v * W);
    }
  }
  for (; k < f.count; ++k) {
    const T* column = matrix + f.at[k] * stride;
    const Vec<T> value = broadcast(f.row[f.at[k]]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[0][v] += value * load(column + v * W);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    Vec<T> total = sum[0][v];
#pragma GCC unroll 4
    for (int p = 1; p < kParts; ++p) total += sum[p][v];
    store(sums + v * W, total);
  }
}

// The product of a sample, its vectors cut into pieces that fit the registers.
template <typename T>
class Product {
 public:
  explicit Product(int64_t n) : vectors_((n + kLanes<T> - 1) / kLanes<T>), stride_(stride_of(n)) {
    const int64_t pieces = (vectors_ + kMost - 1) / kMost;
    piece_ = (vectors_ + pieces - 1) / pieces;
  }
  void operator()(const T* matrix, const Factors<T>& f, const T* start, T* sums) const {
    for (int64_t done = 0; done < vectors_; done += piece_) {
      const int64_t v = piece_ < vectors_ - done ? piece_ : vectors_ - done;
      const int64_t at = done * kLanes<T>;
      const T* from = start == nullptr ? nullptr : start + at;
      kAdd[v - 1](matrix + at, stride_, f, from, sums + at);
    }
  }

 private:
  static constexpr int kMost = 8;
  using Add = void (*)(const T*, int64_t, const Factors<T>&, const T*, T*);
  static constexpr Add kAdd[kMost] = {add_columns<T, 1>, add_columns<T, 2>, add_columns<T, 3>,
                                      add_columns<T, 4>, add_columns<T, 5>, add_columns<T, 6>,
                                      add_columns<T, 7>, add_columns<T, 8>};
  int64_t vectors_, stride_, piece_;
};

// A worker's: sums of a product, and the numbers of a row's elements, all and those that count.
template <typename T>
struct Memory {
  T* sums;
  uint16_t *all, *some;
  // Packing stores whole vectors.
  static int64_t room(int64_t n) { return stride_of(n) + kRowElements; }
  Memory(int64_t n, void* scratch) {
    sums = static_cast<T*>(scratch);
    all = reinterpret_cast<uint16_t*>(sums + room(n));
    some = all + room(n);
    for (int64_t k = 0; k < n; ++k) all[k] = static_cast<uint16_t>(k);
  }
};

template <typename T>
void begin(const MonSplittingArgs& a, int64_t tile, void* memory) {
  const Rows<T> r(a, tile, memory);
  const auto copy = [&](const void* from, T* to) {
    const T* row = static_cast<const T*>(from) + r.first * a.n;
    for (int64_t s = 0; s < r.count; ++s, row += a.n) {
      for (int64_t i = 0; i < r.stride; ++i) to[s * r.stride + i] = i < a.n ? row[i] : T(0);
    }
  };
  const int64_t size = r.count * r.stride;
  copy(a.bias, r.bias);
  for (int64_t i = 0; i < size; ++i) r.z[i] = 0;
  if (a.slope != nullptr) {
    copy(a.slope, r.slope);
    adjoint_scales(r.slope, size, static_cast<T>(a.alpha), r.scale);
  }
  if (a.resolvent != nullptr) {
    const T alpha = a.slope == nullptr ? static_cast<T>(a.alpha) : T(0);
    for (int64_t i = 0; i < size; ++i) {
      r.half[i] = 0;
      r.rhs[i] = alpha * r.bias[i];
    }
  }
}

template <typename T, bool Resolvent, bool Adjoint, MonActivation A>
struct Steps {
  static constexpr int W = kLanes<T>;
  // Whether states have zeros worth looking for.
  static constexpr bool kZeros = !Resolvent && (Adjoint || A == MonActivation::relu);

  // Whether a nonlinearity makes something of nothing, which is not part of the state.
  static constexpr bool kMask =
      !Adjoint && (A == MonActivation::sigmoid || A == MonActivation::softplus);

  const MonSplittingArgs& a;
  const Rows<T>& r;
  const Memory<T>& memory;
  Product<T> product;
  MonStep<T, Resolvent, Adjoint, A> step;
  Vec<T> inside;  // 1 in the lanes of the last vector that are features

  Steps(const MonSplittingArgs& args, const Rows<T>& rows, const Memory<T>& m)
      : a(args),
        r(rows),
        memory(m),
        product(args.n),
        step{static_cast<T>(args.alpha), 1 - static_cast<T>(args.alpha)} {
    const int64_t last = (a.n - 1) / W * W;
    for (int j = 0; j < W; ++j) inside[j] = last + j < a.n ? T(1) : T(0);
  }

  // One step of one sample: squared change and squared norm, to be summed over the lanes.
  void make(int64_t sample, bool first, Vec<T>* change, Vec<T>* norm) {
    const int64_t at = sample * r.stride;
    T* const z = r.z + at;
    // Copies: stores might change what is behind a pointer.
    const typename MonStep<T, Resolvent, Adjoint, A>::Beside beside{r.bias, r.scale, r.half, r.rhs,
                                                                    r.rhs};
    const MonStep<T, Resolvent, Adjoint, A> move = step;
    const Vec<T> in = inside;
    if constexpr (Resolvent) {
      product(static_cast<const T*>(a.resolvent), {r.rhs + at, memory.all, a.n}, nullptr,
              memory.sums);
    } else {
      Factors<T> factors{z, memory.all, first ? 0 : a.n};  // W 0 = 0
      if (kZeros && !first) factors = nonzeros_of(z, a.n, memory.some);
      product(static_cast<const T*>(a.matrix.dense), factors, r.bias + at, memory.sums);
    }
    const T* const sums = memory.sums;
    Vec<T> changes{}, squares{};
    for (int64_t i = 0; i < a.n; i += W) {
      const Vec<T> old = load(z + i);
      Vec<T> made = move(load(sums + i), old, beside, at + i);
      if (kMask && i + W > a.n) made = in != T(0) ? made : Vec<T>{};
      store(z + i, made);
      const Vec<T> moved = made - old;
      changes += moved * moved;
      squares += made * made;
    }
    *change = changes;
    *norm = squares;
  }

  // W samples at a time through all steps: their state stays in the L1 cache.
  void run(int64_t first, int64_t count, T* norms) {
    const int64_t lanes = tile_for<T>(r.count);
    for (int64_t group = 0; group < r.count; group += W) {
      const int64_t here = r.count - group < W ? r.count - group : W;
      for (int64_t i = 0; i < count; ++i) {
        Vec<T> changes[W] = {}, squares[W] = {};
        for (int64_t s = 0; s < here; ++s) {
          make(group + s, first + i == 0, changes + s, squares + s);
        }
        T* to = norms + i * 2 * lanes + group;
        store(to, sum_lanes<T>(changes));
        store(to + lanes, sum_lanes<T>(squares));
      }
    }
  }

  // Until the sample itself has met the tolerance.
  void run_sample(int64_t sample, int64_t first, int64_t count, const MonNotes& notes) {
    for (int64_t i = first; i < first + count; ++i) {
      Vec<T> changes[W] = {}, squares[W] = {};
      make(sample, i == 0, changes, squares);
      const double residual = sample_residual(sum_lanes<T>(changes)[0], sum_lanes<T>(squares)[0]);
      notes.iterations[sample] = i + 1;
      notes.residuals[sample] = residual;
      if (!goes_on(residual, a.tol)) return;
    }
  }
};

template <typename T, bool Adjoint, MonActivation A>
void finish(const MonSplittingArgs& a, int64_t tile, void* state, void* scratch, void* out,
            void* z) {
  const Rows<T> r(a, tile, state);
  const Memory<T> memory(a.n, scratch);
  const Product<T> product(a.n);
  for (int64_t s = 0; s < r.count; ++s) {
    const int64_t at = s * r.stride, to = (r.first + s) * a.n;
    const T* row = r.z + at;
    product(static_cast<const T*>(a.matrix.dense), nonzeros_of(row, a.n, memory.some), r.bias + at,
            memory.sums);
    T *applied = static_cast<T*>(out) + to, *kept = static_cast<T*>(z) + to;
    for (int64_t i = 0; i < a.n; i += kLanes<T>) {
      const Vec<T> sum = load(memory.sums + i);
      const Vec<T> value = Adjoint ? load(r.slope + at + i) * sum : activate<A, T>(sum);
      const int n = static_cast<int>(a.n - i < kLanes<T> ? a.n - i : kLanes<T>);
      store_part(applied + i, value, n);
      store_part(kept + i, load(row + i), n);
    }
  }
}

// Of all values of a batch, those that the states will have nonzero: at the start, at least.
template <typename T>
double active_share(const MonSplittingArgs& a) {
  const bool adjoint = a.slope != nullptr;
  const T* x = static_cast<const T*>(adjoint ? a.slope : a.bias);
  const auto is_active = [&](auto value) { return adjoint ? value != T(0) : value > T(0); };
  const int64_t size = a.batch * a.n;
  Int<T> counts{};
  int64_t active = 0, i = 0;
  for (; i + kLanes<T> <= size; i += kLanes<T>) counts -= Int<T>(is_active(load(x + i)));
  for (int j = 0; j < kLanes<T>; ++j) active += counts[j];
  for (; i < size; ++i) active += is_active(x[i]) ? 1 : 0;
  return static_cast<double>(active) / static_cast<double>(size);
}

template <typename T>
bool all_finite(const void* columns, int64_t size) {
  Vec<T> sum{};
  const T* values = static_cast<const T*>(columns);
  for (int64_t i = 0; i < size; i += kLanes<T>) sum += load(values + i) * T(0);
  T total = 0;
  for (int j = 0; j < kLanes<T>; ++j) total += sum[j];
  return total == T(0);
}

// By the cycles of a step, measured on a Zen 4 with vectors of 64 bytes (bench_mon_forms): a
// vector of a column costs a load, more of them where columns come from afar; beside the product, a
// vector of a state costs about 20 cycles where zeros are looked for, and a vector of a panel 15.
template <typename T>
bool cheaper(const MonSplittingArgs& a) {
  constexpr int W = kLanes<T>;
  const double n = static_cast<double>(a.n), batch = static_cast<double>(a.batch);
  const double vectors = static_cast<double>((a.n + W - 1) / W);
  const bool zeros =
      a.resolvent == nullptr && (a.slope != nullptr || a.activation == MonActivation::relu);
  const double active = zeros ? n * active_share<T>(a) : n;
  const double bytes = static_cast<double>(mon_columns_size(a.n)) * sizeof(T);
  const auto outside = [&](double cache) { return bytes > cache ? 1 - cache / bytes : 0.0; };
  const double column = 1 + 1.2 * (outside(32 << 10) + outside(1 << 20));
  const double beside = zeros ? 60 + 20 * vectors : 40 + 12 * vectors;
  const double here = batch * (active * (vectors + 1) * column + beside);
  const int64_t last = a.batch % kTile<T>;
  const int64_t lanes = a.batch - last + (last > 0 ? tile_for<T>(last) : 0);
  const double there = static_cast<double>(lanes / W) * n * (1.1 * n + 15);
  return here < there;
}

}  // namespace

// Zeros of a state would hide what is not finite in the columns that they skip.
bool mon_can_go_by_sample(const MonSplittingArgs& a) {
  const void* columns = a.matrix.dense;
  if (columns == nullptr || a.n > kMostFeatures || a.n == 0 || a.batch == 0) return false;
  const int64_t size = mon_columns_size(a.n);
  return a.dtype == DType::f64 ? all_finite<double>(columns, size)
                               : all_finite<float>(columns, size);
}

bool mon_cheaper_by_sample(const MonSplittingArgs& a) {
  if (a.matrix.dense == nullptr || a.n > kMostFeatures) return false;
  return a.dtype == DType::f64 ? cheaper<double>(a) : cheaper<float>(a);
}

int64_t mon_columns_size(int64_t n) { return n > kMostFeatures ? 0 : n * stride_of(n); }

void mon_pack_columns(DType dtype, int64_t n, const void* matrix, void* columns) {
  if (n > kMostFeatures) return;
  if (dtype == DType::f64) {
    pack(n, static_cast<const double*>(matrix), static_cast<double*>(columns));
  } else {
    pack(n, static_cast<const float*>(matrix), static_cast<float*>(columns));
  }
}

int64_t mon_samples_state_bytes(const MonSplittingArgs& a) {
  const int64_t element = a.dtype == DType::f64 ? 8 : 4;
  return Rows<float>::arrays(a) * (a.tile * stride_of(a.n) + Rows<float>::kGap) * element;
}

int64_t mon_samples_scratch_bytes(const MonSplittingArgs& a) {
  const int64_t element = a.dtype == DType::f64 ? 8 : 4;
  return Memory<float>::room(a.n) * (element + 2 * 4);
}

void mon_samples_begin(const MonSplittingArgs& a, int64_t tile, void* state) {
  a.dtype == DType::f64 ? begin<double>(a, tile, state) : begin<float>(a, tile, state);
}

int64_t mon_samples_steps(const MonSplittingArgs& a, int64_t tile, void* state, void* scratch,
                          int64_t first, int64_t count, const MonNotes& notes) {
  with_method(a, [&](auto zero, auto resolvent, auto adjoint, auto activation) {
    using T = decltype(zero);
    const Rows<T> rows(a, tile, state);
    const Memory<T> memory(a.n, scratch);
    Steps<T, resolvent.value, adjoint.value, activation.value> steps(a, rows, memory);
    if (!a.per_sample) return steps.run(first, count, static_cast<T*>(notes.norms));
    for (int64_t s = 0; s < rows.count; ++s) steps.run_sample(s, first, count, notes);
  });
  return first + count;
}

void mon_samples_finish(const MonSplittingArgs& a, int64_t tile, void* state, void* scratch,
                        void* out, void* z) {
  with_equation(a, [&](auto zero, auto adjoint, auto activation) {
    finish<decltype(zero), adjoint.value, activation.value>(a, tile, state, scratch, out, z);
  });
}

}  // namespace fastprune::FASTPRUNE_ISA
