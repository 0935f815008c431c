#include "kernels/cpu/masked_linear_bitmap.h"

#include "kernels/cpu/activations.h"

#if defined(__AVX512F__)
namespace fastprune::FASTPRUNE_ISA {
namespace {

constexpr int64_t kRows = kBitmapRows;
constexpr int64_t kBitmapPrefetch = 1024;

// A zero that the compiler cannot fold into the instruction that uses it. Zen 5 lets an expanding
// load wait for the previous value of its target, in its zeroing form too, unless the target was
// just zeroed: 5 cycles instead of 1.
template <typename V>
inline V fresh_zero(V zero) {
  asm("" : "+v"(zero));
  return zero;
}

// What a step of 16 rows is for each dtype: Mask, the packed activation X of one batch entry, and
// the multiplication.
template <typename S>
struct Step;

template <>
struct Step<float> {
  using Mask = uint16_t;
  using Weights = __m512;
  static constexpr int64_t kCols = 1;
  static inline Weights expand(Mask mask, const float* values) {
    return _mm512_mask_expandloadu_ps(fresh_zero(_mm512_setzero_ps()), mask, values);
  }
  static inline __m512 add(__m512 sum, Weights w, __m512i x) {
    return _mm512_fmadd_ps(w, _mm512_castsi512_ps(x), sum);
  }
  static inline uint32_t x(const float* p, int64_t, bool) { return float_to_bits(*p); }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
#define FASTPRUNE_BITMAP_16 1
template <>
struct Step<Float16> {
  using Mask = uint16_t;
  using Weights = __m512;
  static constexpr int64_t kCols = 1;
  static inline Weights expand(Mask mask, const Float16* values) {
    return _mm512_cvtph_ps(
        _mm256_mask_expandloadu_epi16(fresh_zero(_mm256_setzero_si256()), mask, values));
  }
  static inline __m512 add(__m512 sum, Weights w, __m512i x) {
    return _mm512_fmadd_ps(w, _mm512_castsi512_ps(x), sum);
  }
  static inline uint32_t x(const Float16* p, int64_t, bool) { return float_to_bits(widen(*p)); }
};

template <>
struct Step<BFloat16> {
  using Mask = uint32_t;
  using Weights = __m512i;
  static constexpr int64_t kCols = 2;
  static inline Weights expand(Mask mask, const BFloat16* values) {
    return _mm512_mask_expandloadu_epi16(fresh_zero(_mm512_setzero_si512()), mask, values);
  }
  static inline __m512 add(__m512 sum, Weights w, __m512i x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
  }
  // Two columns, `stride` elements apart; the last one may stand alone.
  static inline uint32_t x(const BFloat16* p, int64_t stride, bool both) {
    return p[0].bits | (both ? uint32_t{p[stride].bits} << 16 : 0);
  }
};
#endif

template <typename S>
void pack_x(const BitmapView& w, const MaskedLinearArgs& a, uint32_t* packed) {
  const S* x = static_cast<const S*>(a.x);
  const int64_t between_cols = a.x_transposed ? a.batch : 1;
  const int64_t between_rows = a.x_transposed ? 1 : w.cols;
  const BatchParts cut(a.batch);
  for (int64_t part = 0; part < cut.parts; ++part) {
    const int64_t first = cut.begin(part), n = cut.begin(part + 1) - first;
    uint32_t* to = packed + first * w.steps();
    for (int64_t s = 0; s < w.steps(); ++s) {
      const int64_t col = s * Step<S>::kCols;
      const S* from = x + first * between_rows + col * between_cols;
      for (int64_t j = 0; j < n; ++j) {
        *to++ = Step<S>::x(from + j * between_rows, between_cols, col + 1 < w.cols);
      }
    }
  }
}

// Rows [row, row + 16) of y for batch entry n, from their sums.
template <typename S>
[[gnu::noinline]] void write(const BitmapView& w, const MaskedLinearArgs& a, int64_t row, int64_t n,
                             const float* sums) {
  const int count = static_cast<int>(least(kRows, w.rows - row));
  const float* bias = static_cast<const float*>(a.bias);
  Vec<float> total = load(sums);
  if (bias != nullptr) total += load_part(bias + row, count);
  S* y = static_cast<S*>(a.y);
  const S* residual = static_cast<const S*>(a.residual);
  if (!a.y_transposed) {
    const int64_t at = n * w.rows + row;
    finish_vector<S>(total, y + at, residual == nullptr ? nullptr : residual + at, a.relu, count);
    return;
  }
  S added[kRows], out[kRows];
  const int64_t at = row * a.batch + n;
  for (int i = 0; i < count && residual != nullptr; ++i) added[i] = residual[at + i * a.batch];
  finish_vector<S>(total, out, residual == nullptr ? nullptr : added, a.relu, count);
  for (int i = 0; i < count; ++i) y[at + i * a.batch] = out[i];
}

// G groups from `group` on, B batch entries from `first` on, whose activations are x. Each sum is
// made in U parts, so that enough additions are in flight.
template <typename S, int B, int G, int U>
void multiply(const BitmapView& w, const MaskedLinearArgs& a, int64_t group, int64_t first,
              const uint32_t* x) {
  using Lanes = Step<S>;
  const int64_t steps = w.steps();
  const S* values[G];
  const typename Lanes::Mask* masks[G];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
    values[g] = static_cast<const S*>(w.values) + w.start[group + g];
    masks[g] = static_cast<const typename Lanes::Mask*>(w.masks) + (group + g) * steps;
  }
  __m512 sums[G][B][U];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) sums[g][b][u] = _mm512_setzero_ps();
    }
  }
  const auto step = [&](int64_t s, int u) __attribute__((always_inline)) {
    typename Lanes::Weights weights[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      uint32_t mask = masks[g][s];
      asm("" : "+r"(mask));  // else the compiler loads it twice, and loads are scarce
      weights[g] = Lanes::expand(static_cast<typename Lanes::Mask>(mask), values[g]);
      values[g] += __builtin_popcount(mask);
      _mm_prefetch(reinterpret_cast<const char*>(values[g]) + kBitmapPrefetch, _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      const __m512i xs = _mm512_set1_epi32(static_cast<int>(x[s * B + b]));
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sums[g][b][u] = Lanes::add(sums[g][b][u], weights[g], xs);
    }
  };
  int64_t s = 0;
  for (; s + U <= steps; s += U) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) step(s + u, u);
  }
  for (; s < steps; ++s) step(s, 0);
  alignas(64) float out[G][B][kRows];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) sums[g][b][0] = _mm512_add_ps(sums[g][b][0], sums[g][b][u]);
      _mm512_store_ps(out[g][b], sums[g][b][0]);
    }
  }
  for (int g = 0; g < G; ++g) {
    for (int b = 0; b < B; ++b) write<S>(w, a, (group + g) * kRows, first + b, out[g][b]);
  }
}

template <typename S, int B>
void multiply_groups(const BitmapView& w, const MaskedLinearArgs& a, int64_t begin, int64_t end,
                     int64_t first, const uint32_t* x) {
  constexpr int kTogether = B <= 6 ? 4 : 3;  // 32 registers hold no more sums
  constexpr int kParts = B == 1 ? 2 : 1, kPartsAlone = B <= 4 ? 4 : 2;
  for (; begin + kTogether <= end; begin += kTogether) {
    multiply<S, B, kTogether, kParts>(w, a, begin, first, x);
  }
  for (; begin < end; ++begin) multiply<S, B, 1, kPartsAlone>(w, a, begin, first, x);
}

template <typename S>
void product(const BitmapView& w, const MaskedLinearArgs& a, const uint32_t* packed, int64_t begin,
             int64_t end) {
  const BatchParts cut(a.batch);
  for (int64_t bundle = begin; bundle < end; ++bundle) {
    const int64_t g0 = bundle * cut.bundle(), g1 = least(g0 + cut.bundle(), w.groups());
    for (int64_t part = 0; part < cut.parts; ++part) {
      const int64_t first = cut.begin(part);
      const uint32_t* x = packed + first * w.steps();
      switch (cut.begin(part + 1) - first) {
        case 1:
          multiply_groups<S, 1>(w, a, g0, g1, first, x);
          break;
        case 2:
          multiply_groups<S, 2>(w, a, g0, g1, first, x);
          break;
        case 3:
          multiply_groups<S, 3>(w, a, g0, g1, first, x);
          break;
        case 4:
          multiply_groups<S, 4>(w, a, g0, g1, first, x);
          break;
        case 5:
          multiply_groups<S, 5>(w, a, g0, g1, first, x);
          break;
        case 6:
          multiply_groups<S, 6>(w, a, g0, g1, first, x);
          break;
        case 7:
          multiply_groups<S, 7>(w, a, g0, g1, first, x);
          break;
        default:
          multiply_groups<S, 8>(w, a, g0, g1, first, x);
      }
    }
  }
}

// The values of one step: lanes that the mask marks move to the front of `to`.
inline void keep(uint16_t mask, Vec<float> lanes, float* to) {
  const int n = __builtin_popcount(mask);
  store_part(to, (Vec<float>)_mm512_maskz_compress_ps(mask, (__m512)lanes), n);
}
#if defined(FASTPRUNE_BITMAP_16)
inline void keep(uint16_t mask, Vec<float> lanes, Float16* to) {
  const __m256i halves = _mm512_cvtepi32_epi16((__m512i)lanes);
  const int n = __builtin_popcount(mask);
  store_halves(to, (Halves)_mm256_maskz_compress_epi16(mask, halves), n);
}
inline void keep(uint32_t mask, Vec<float> lanes, BFloat16* to) {
  const __m512i kept = _mm512_maskz_compress_epi16(mask, (__m512i)lanes);
  _mm512_mask_storeu_epi16(to, _bzhi_u32(~0u, static_cast<uint32_t>(__builtin_popcount(mask))),
                           kept);
}
#endif

// 32 bits of weight at a time: one float, one widened float16, two bfloat16.
inline Vec<float> load_words(const float* p, int n) { return load_part(p, n); }
#if defined(FASTPRUNE_BITMAP_16)
inline Vec<float> load_words(const Float16* p, int n) {
  return (Vec<float>)_mm512_cvtepu16_epi32((__m256i)load_halves(p, n));
}
inline Vec<float> load_words(const BFloat16* p, int n) {
  return (Vec<float>)_mm512_maskz_loadu_epi16(_bzhi_u32(~0u, static_cast<uint32_t>(n)), p);
}
#endif

template <typename S>
void group_values(const BitmapView& w, const S* weight, S* values, int64_t group) {
  using Lanes = Step<S>;
  constexpr int64_t kCols = 16 * Lanes::kCols;
  const auto* masks = static_cast<const typename Lanes::Mask*>(w.masks) + group * w.steps();
  const int64_t row = group * kRows;
  S* to = values + w.start[group];
  for (int64_t col = 0; col < w.cols; col += kCols) {
    const int wide = static_cast<int>(least(kCols, w.cols - col));
    Vec<float> block[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      block[i] =
          row + i < w.rows ? load_words(weight + (row + i) * w.cols + col, wide) : Vec<float>{};
    }
    transpose<float>(block);
    for (int64_t i = 0; i * Lanes::kCols < wide; ++i) {
      const auto mask = masks[col / Lanes::kCols + i];
      keep(mask, block[i], to);
      to += __builtin_popcount(mask);
    }
  }
}

inline Magnitudes magnitudes_32(const void* x, int64_t n) {
  const uint32_t* bits = static_cast<const uint32_t*>(x);
  Magnitudes found;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t m = bits[i] & 0x7fffffffu;
    found.largest = m > found.largest ? m : found.largest;
  }
  return found;
}
inline Magnitudes magnitudes_16(const void* x, int64_t n) {
  const uint16_t* bits = static_cast<const uint16_t*>(x);
  uint16_t smallest = 0xffff, largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t m = bits[i] & 0x7fff, less = static_cast<uint16_t>(m - 1);  // 0 turns largest
    largest = m > largest ? m : largest;
    smallest = less < smallest ? less : smallest;
  }
  Magnitudes found;
  found.largest = largest;
  if (smallest != 0xffff) found.smallest = uint32_t{smallest} + 1;
  return found;
}

#if defined(FASTPRUNE_BITMAP_16)
#define FASTPRUNE_BY_BITMAP_DTYPE(dtype, call) \
  switch (dtype) {                             \
    case DType::bf16: {                        \
      using S = BFloat16;                      \
      call;                                    \
      break;                                   \
    }                                          \
    case DType::f16: {                         \
      using S = Float16;                       \
      call;                                    \
      break;                                   \
    }                                          \
    default: {                                 \
      using S = float;                         \
      call;                                    \
    }                                          \
  }
#else
#define FASTPRUNE_BY_BITMAP_DTYPE(dtype, call) \
  {                                            \
    using S = float;                           \
    call;                                      \
  }
#endif

template <typename Mask>
void write_masks(const PatternView& p, int64_t step_cols, int64_t steps, Mask* masks,
                 int64_t* start) {
  const int64_t groups = (p.rows + kRows - 1) / kRows;
  std::memset(masks, 0, sizeof(Mask) * static_cast<size_t>(groups * steps));
  int64_t at = 0;
  for (int64_t group = 0; group < groups; ++group) {
    start[group] = at;
    Mask* row_masks = masks + group * steps;
    for (int64_t r = group * kRows; r < least(p.rows, (group + 1) * kRows); ++r) {
      const int64_t lane = (r - group * kRows) * step_cols;
      for (int64_t b = 0; b < p.blocks(); ++b) {
        const int64_t place = b * p.rows + p.place(b, r);
        for (int64_t e = p.row_ptr[place]; e < p.row_ptr[place + 1]; ++e, ++at) {
          const int64_t col = b * p.block_depth + p.offset[e];
          row_masks[col / step_cols] |= static_cast<Mask>(Mask{1} << (lane + col % step_cols));
        }
      }
    }
  }
  start[groups] = at;
}

}  // namespace

void bitmap_index(const PatternView& forward, DType dtype, void* masks, int64_t* start) {
  if (dtype == DType::bf16) {
    write_masks(forward, 2, (forward.depth + 1) / 2, static_cast<uint32_t*>(masks), start);
  } else {
    write_masks(forward, 1, forward.depth, static_cast<uint16_t*>(masks), start);
  }
}

Magnitudes bitmap_values(const BitmapView& w, const void* weight, void* values, int64_t begin,
                         int64_t end) {
  FASTPRUNE_BY_BITMAP_DTYPE(w.dtype, {
    for (int64_t group = begin; group < end; ++group) {
      group_values(w, static_cast<const S*>(weight), static_cast<S*>(values), group);
    }
  })
  if (w.dtype != DType::bf16) return {};
  return magnitudes_16(static_cast<const BFloat16*>(values) + w.start[begin],
                       w.start[end] - w.start[begin]);
}

Magnitudes magnitudes(DType dtype, const void* x, int64_t n) {
  return dtype == DType::f32 ? magnitudes_32(x, n) : magnitudes_16(x, n);
}

int64_t bitmap_x_bytes(const BitmapView& w, int64_t batch) { return 4 * batch * w.steps(); }

void bitmap_pack_x(const BitmapView& w, const MaskedLinearArgs& a, void* packed) {
  FASTPRUNE_BY_BITMAP_DTYPE(w.dtype, pack_x<S>(w, a, static_cast<uint32_t*>(packed)))
}

void bitmap_product(const BitmapView& w, const MaskedLinearArgs& a, const void* packed,
                    int64_t begin, int64_t end) {
  FASTPRUNE_BY_BITMAP_DTYPE(w.dtype,
                            product<S>(w, a, static_cast<const uint32_t*>(packed), begin, end))
}

}  // namespace fastprune::FASTPRUNE_ISA
#endif
