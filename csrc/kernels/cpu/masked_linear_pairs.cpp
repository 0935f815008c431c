#include "kernels/cpu/masked_linear_pairs.h"

#include "kernels/cpu/masked_linear_tiles.h"
#include "kernels/cpu/panel.h"

#if defined(__AVX512BF16__)
namespace fastprune::FASTPRUNE_ISA {
namespace {

constexpr int64_t kColumnBytes = 64;  // of the panel: one vector
constexpr int64_t kPairsPrefetch = 2048;

inline char* column(void* panel, int64_t k) { return static_cast<char*>(panel) + k * kColumnBytes; }

// The panel holds one vector per column: 32 batch entries in the order that interleaving undoes, or
// each of 16 batch entries twice.
template <bool Wide>
struct Panel;

template <>
struct Panel<true> {
  static constexpr int kTile = 32;
  // Both columns' batch entries 0-15 in pairs, and 16-31.
  static inline void pair(const char* a, const char* b, __m512i* low, __m512i* high) {
    const __m512i x = _mm512_load_si512(a), y = _mm512_load_si512(b);
    *low = _mm512_unpacklo_epi16(x, y);
    *high = _mm512_unpackhi_epi16(x, y);
  }
  // Columns 2 k and 2 k + 1, from vectors of such pairs of batch entries 0-15 and 16-31.
  static inline void split(__m512i low, __m512i high, __m512i* even, __m512i* odd) {
    const __m512i mask = _mm512_set1_epi32(0xffff);
    *even = _mm512_packus_epi32(_mm512_and_si512(low, mask), _mm512_and_si512(high, mask));
    *odd = _mm512_packus_epi32(_mm512_srli_epi32(low, 16), _mm512_srli_epi32(high, 16));
  }
  // A column from batch entries that follow each other in memory.
  static inline __m512i spread(const BFloat16* x, int n) {
    const __m512i v = _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, static_cast<uint32_t>(n)), x);
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(v));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1));
    return _mm512_packus_epi32(low, high);
  }
};

template <>
struct Panel<false> {
  static constexpr int kTile = 16;
  static inline void pair(const char* a, const char* b, __m512i* low, __m512i*) {
    *low = _mm512_mask_loadu_epi16(_mm512_load_si512(a), 0xaaaaaaaau, b);
  }
  static inline void split(__m512i low, __m512i, __m512i* even, __m512i* odd) {
    const __m512i mask = _mm512_set1_epi32(0xffff);
    *even = _mm512_or_si512(_mm512_and_si512(low, mask), _mm512_slli_epi32(low, 16));
    *odd = _mm512_or_si512(_mm512_srli_epi32(low, 16), _mm512_andnot_si512(mask, low));
  }
  static inline __m512i spread(const BFloat16* x, int n) {
    const __m512i v = _mm512_cvtepu16_epi32((__m256i)load_halves(x, n));
    return _mm512_or_si512(v, _mm512_slli_epi32(v, 16));
  }
};

// Sixteen batch entries of 32 columns as pairs of columns: block[k] has columns 2 k and 2 k + 1.
inline void load_pairs(const BFloat16* x, int64_t stride, int64_t n, int64_t cols,
                       Vec<float>* block) {
  const __mmask32 mask = _bzhi_u32(~0u, static_cast<uint32_t>(cols));
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    block[i] = i < n ? (Vec<float>)_mm512_maskz_loadu_epi16(mask, x + i * stride) : Vec<float>{};
  }
  transpose<float>(block);
}

// The panel of `count` columns from `col` on, for n batch entries from `first` on.
template <bool Wide>
void pack_panel(const MaskedLinearArgs& a, int64_t cols, int64_t first, int n, int64_t col,
                int64_t count, void* panel) {
  const BFloat16* x = static_cast<const BFloat16*>(a.x);
  if (a.x_transposed) {
    for (int64_t k = 0; k < count; ++k) {
      _mm512_store_si512(column(panel, k), Panel<Wide>::spread(x + (col + k) * a.batch + first, n));
    }
    return;
  }
  x += first * cols + col;
  for (int64_t k = 0; k < count; k += 32) {
    const int64_t wide = least(32, count - k);
    Vec<float> low[16], high[16] = {};
    load_pairs(x + k, cols, n, wide, low);
    if (Wide) load_pairs(x + 16 * cols + k, cols, n - 16, wide, high);
    for (int64_t i = 0; i < 16 && 2 * i < wide; ++i) {
      __m512i even, odd;
      Panel<Wide>::split((__m512i)low[i], (__m512i)high[i], &even, &odd);
      _mm512_store_si512(column(panel, k + 2 * i), even);
      // Past the last column of an odd count, which the zeros overwrite later.
      _mm512_store_si512(column(panel, k + 2 * i + 1), odd);
    }
  }
}

// The eight offsets of a group. Two loads, not eight: loads are what the product is bound by.
inline void load_offsets(const uint16_t* offset, uint64_t* to) {
  uint64_t words[2];
  std::memcpy(words, offset, sizeof(words));
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    asm("" : "+r"(words[h]));  // else the compiler loads each offset by itself
    to[4 * h] = words[h] & 0xffff;
    to[4 * h + 1] = _bextr_u64(words[h], 16, 16);
    to[4 * h + 2] = _bextr_u64(words[h], 32, 16);
    to[4 * h + 3] = words[h] >> 48;
  }
}

// tile_rows[r] += the rows' entries of one block times the panel. The four pairs of a group go to
// four sums, which hides the latency of the additions.
template <bool Wide>
void multiply(const PairsView& p, int64_t block, int64_t begin, int64_t end, const void* panel_of,
              float* tile_rows) {
  constexpr int kVectors = Wide ? 2 : 1;
  const char* panel = static_cast<const char*>(panel_of);
  const int64_t* group_ptr = p.group_ptr + block * p.rows;
  const int32_t* row_at = p.row_at + block * p.rows;
  const uint16_t* entry = p.entries + kPairsStride * group_ptr[begin];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t groups = group_ptr[i + 1] - group_ptr[i];
    if (groups == 0) continue;
    __m512 low[4], high[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) low[j] = high[j] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g) {
      _mm_prefetch(reinterpret_cast<const char*>(entry) + kPairsPrefetch, _MM_HINT_T0);
      uint64_t at[kPairsGroup];
      load_offsets(entry, at);
      const __m512i all = _mm512_broadcast_i32x4(
          _mm_load_si128(reinterpret_cast<const __m128i*>(entry + kPairsGroup)));
      const __m512i weights[4] = {
          _mm512_shuffle_epi32(all, _MM_PERM_AAAA), _mm512_shuffle_epi32(all, _MM_PERM_BBBB),
          _mm512_shuffle_epi32(all, _MM_PERM_CCCC), _mm512_shuffle_epi32(all, _MM_PERM_DDDD)};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        __m512i x_low, x_high;
        Panel<Wide>::pair(panel + 8 * at[2 * j], panel + 8 * at[2 * j + 1], &x_low, &x_high);
        low[j] = _mm512_dpbf16_ps(low[j], (__m512bh)x_low, (__m512bh)weights[j]);
        if (Wide) high[j] = _mm512_dpbf16_ps(high[j], (__m512bh)x_high, (__m512bh)weights[j]);
      }
      entry += kPairsStride;
    }
    float* out = tile_rows + row_at[i] * int64_t{16 * kVectors};
    const __m512 sum = _mm512_add_ps(_mm512_add_ps(low[0], low[1]), _mm512_add_ps(low[2], low[3]));
    _mm512_store_ps(out, _mm512_add_ps(_mm512_load_ps(out), sum));
    if (Wide) {
      const __m512 other =
          _mm512_add_ps(_mm512_add_ps(high[0], high[1]), _mm512_add_ps(high[2], high[3]));
      _mm512_store_ps(out + 16, _mm512_add_ps(_mm512_load_ps(out + 16), other));
    }
  }
}

template <bool Wide>
void product(const PairsView& p, const MaskedLinearArgs& a, int64_t first, int n, int64_t row_begin,
             int64_t row_end, void* scratch) {
  constexpr int kTileWidth = Panel<Wide>::kTile;
  const int64_t rows = row_end - row_begin;
  float* tile_rows = reinterpret_cast<float*>(column(scratch, p.width() + 1));
  start_rows(tile_rows, static_cast<const float*>(a.bias), row_begin, row_end, kTileWidth);
  for (int64_t b = 0; b < p.blocks(); ++b) {
    const int64_t* group_ptr = p.group_ptr + b * p.rows;
    if (group_ptr[row_begin] == group_ptr[row_end]) continue;
    const int64_t col = b << p.width_shift;
    pack_panel<Wide>(a, p.cols, first, n, col, least(p.width(), p.cols - col), scratch);
    std::memset(column(scratch, p.width()), 0, kColumnBytes);
    multiply<Wide>(p, b, row_begin, row_end, scratch, tile_rows - row_begin * kTileWidth);
  }
  BFloat16* y = static_cast<BFloat16*>(a.y);
  const BFloat16* residual = static_cast<const BFloat16*>(a.residual);
  const int64_t at = a.y_transposed ? row_begin * a.batch + first : first * p.rows + row_begin;
  const BFloat16* added = residual == nullptr ? nullptr : residual + at;
  if (a.y_transposed) {
    write_rows(tile_rows, rows, kTileWidth, n, y + at, added, a.relu, a.batch);
  } else {
    write_transposed(tile_rows, rows, kTileWidth, n, y + at, added, a.relu, p.rows);
  }
}

// Calls f(row, column) for the entries in rising order of rows, then columns, of the pattern.
template <typename F>
inline void for_each_entry(const PatternView& p, bool transposed, const F& f) {
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t b = 0; b < p.blocks(); ++b) {
      const int64_t place = b * p.rows + p.place(b, r);
      for (int64_t e = p.row_ptr[place]; e < p.row_ptr[place + 1]; ++e) {
        const int64_t c = b * p.block_depth + p.offset[e];
        transposed ? f(c, r) : f(r, c);
      }
    }
  }
}

constexpr int64_t kPlacesAhead = 2;

// `Contiguous`: rows are contiguous in the weight.
template <bool Contiguous>
uint32_t copy_with_values(const PairsView& p, const uint16_t* weight, WeightStrides strides,
                          uint16_t* entries, int64_t begin, int64_t end) {
  const int64_t stride = Contiguous ? 1 : strides.col;
  const uint64_t none = static_cast<uint64_t>(8 * p.width());
  const auto start = [&](int64_t place) {
    return weight + p.row_at[place] * strides.row + (place / p.rows << p.width_shift) * strides.col;
  };
  __m128i least_of = _mm_set1_epi16(-1);  // absolute values less one, where a zero is largest
  for (int64_t place = begin; place < end; ++place) {
    const uint16_t* from = start(place);
    if (Contiguous && place + kPlacesAhead < end) {  // a short piece, far from the last one
      const char* next = reinterpret_cast<const char*>(start(place + kPlacesAhead));
      for (int64_t i = 0; i < 2 * p.width(); i += 64) _mm_prefetch(next + i, _MM_HINT_T0);
    }
    const int64_t last = p.group_ptr[place + 1];
    for (int64_t g = p.group_ptr[place]; g < last; ++g) {
      const uint16_t* group = p.entries + kPairsStride * g;
      uint64_t at[kPairsGroup], values[2] = {};
      load_offsets(group, at);
      if (at[kPairsGroup - 1] != none) {
#pragma GCC unroll 8
        for (int i = 0; i < kPairsGroup; ++i) {
          values[i / 4] |= uint64_t{from[(at[i] >> 3) * stride]} << (16 * (i % 4));
        }
      } else {
#pragma GCC unroll 8
        for (int i = 0; i < kPairsGroup; ++i) {
          if (at[i] != none)
            values[i / 4] |= uint64_t{from[(at[i] >> 3) * stride]} << (16 * (i % 4));
        }
      }
      const __m128i bits =
          _mm_set_epi64x(static_cast<int64_t>(values[1]), static_cast<int64_t>(values[0]));
      __m128i* to = reinterpret_cast<__m128i*>(entries + kPairsStride * g);
      _mm_store_si128(to, _mm_load_si128(reinterpret_cast<const __m128i*>(group)));
      _mm_store_si128(to + 1, bits);
      const __m128i magnitude = _mm_and_si128(bits, _mm_set1_epi16(0x7fff));
      least_of = _mm_min_epu16(least_of, _mm_sub_epi16(magnitude, _mm_set1_epi16(1)));
    }
  }
  const uint32_t smallest = static_cast<uint16_t>(_mm_extract_epi16(_mm_minpos_epu16(least_of), 0));
  return smallest == 0xffff ? ~uint32_t{0} : smallest + 1;
}

}  // namespace

int64_t pairs_bounds(const PatternView& forward, bool transposed, const PairsView& s,
                     PairsIndex index) {
  int64_t* count = index.cursor;
  std::memset(count, 0, sizeof(int64_t) * static_cast<size_t>(s.blocks() * s.rows));
  for_each_entry(forward, transposed,
                 [&](int64_t r, int64_t c) { ++count[(c >> s.width_shift) * s.rows + r]; });
  int64_t at = 0;
  for (int64_t b = 0; b < s.blocks(); ++b) {
    int64_t* counts = count + b * s.rows;
    int32_t* row_at = index.row_at + b * s.rows;
    for (int64_t first = 0; first < s.rows; first += kRowWindow) {
      const int64_t last = least(first + kRowWindow, s.rows);
      const auto groups = [&](int64_t r) { return (counts[r] + kPairsGroup - 1) / kPairsGroup; };
      // Insertion into the front, which falls in the number of groups: windows are short, and
      // loops of equal length in a row are predicted.
      for (int64_t i = first; i < last; ++i) {
        int64_t j = i;
        for (; j > first && groups(row_at[j - 1]) < groups(i); --j) row_at[j] = row_at[j - 1];
        row_at[j] = static_cast<int32_t>(i);
      }
      for (int64_t i = first; i < last; ++i) {
        index.group_ptr[b * s.rows + i] = at;
        at += groups(row_at[i]);
      }
    }
    // From here on the cursor of each row, not its count.
    for (int64_t i = 0; i < s.rows; ++i) {
      counts[row_at[i]] = kPairsGroup * index.group_ptr[b * s.rows + i];
    }
  }
  index.group_ptr[s.blocks() * s.rows] = at;
  return at;
}

void pairs_entries(const PatternView& forward, bool transposed, const PairsView& s,
                   PairsIndex index, uint16_t* entries) {
  const uint16_t none = static_cast<uint16_t>(8 * s.width());
  for (int64_t g = 0; g < index.group_ptr[s.blocks() * s.rows]; ++g) {
    uint16_t* group = entries + kPairsStride * g;
    for (int64_t i = 0; i < kPairsGroup; ++i) group[i] = none;
    std::memset(group + kPairsGroup, 0, sizeof(uint16_t) * kPairsGroup);
  }
  for_each_entry(forward, transposed, [&](int64_t r, int64_t c) {
    const int64_t e = index.cursor[(c >> s.width_shift) * s.rows + r]++;
    entries[e / kPairsGroup * kPairsStride + e % kPairsGroup] =
        static_cast<uint16_t>(8 * (c & (s.width() - 1)));
  });
}

uint32_t pairs_values(const PairsView& p, const void* weight_of, WeightStrides strides,
                      uint16_t* entries, int64_t begin, int64_t end) {
  const uint16_t* weight = static_cast<const uint16_t*>(weight_of);
  return strides.col == 1 ? copy_with_values<true>(p, weight, strides, entries, begin, end)
                          : copy_with_values<false>(p, weight, strides, entries, begin, end);
}

int64_t pairs_scratch(const PairsView& p, int64_t rows) {
  return (p.width() + 1) * kColumnBytes + rows * kPairsTile * 4;
}

void pairs_product(const PairsView& p, const MaskedLinearArgs& a, int64_t tile, int64_t row_begin,
                   int64_t row_end, void* scratch) {
  const int64_t first = tile * kPairsTile;
  const int n = static_cast<int>(least(kPairsTile, a.batch - first));
  if (n <= 16) {
    product<false>(p, a, first, n, row_begin, row_end, scratch);
  } else {
    product<true>(p, a, first, n, row_begin, row_end, scratch);
  }
}

}  // namespace fastprune::FASTPRUNE_ISA
#endif
