#include "kernels/cpu/pattern.h"

#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastprune::FASTPRUNE_ISA {
namespace {

// Bit i: whether mask[i] is nonzero, for i < 64.
inline uint64_t bits_of(const uint8_t* mask) {
#if defined(__AVX512BW__)
  const __m512i bytes = _mm512_loadu_si512(mask);
  return _mm512_test_epi8_mask(bytes, bytes);
#elif defined(__AVX2__)
  const __m256i zero = _mm256_setzero_si256();
  const auto half = [&](const uint8_t* at) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, zero)));
  };
  return half(mask) | uint64_t{half(mask + 32)} << 32;
#else
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= uint64_t{mask[i] != 0} << i;
  return bits;
#endif
}

// Calls f(column) for every nonzero byte of mask[0, n), in order. Sixty-four at a time: loops over
// fewer bytes end at unpredictable moments more often than they find something.
template <typename F>
inline void for_each_set(const uint8_t* mask, int64_t n, F f) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    for (uint64_t bits = bits_of(mask + i); bits != 0; bits &= bits - 1) {
      f(i + __builtin_ctzll(bits));
    }
  }
  if (i == n) return;
  uint8_t rest[64] = {};
  std::memcpy(rest, mask + i, static_cast<size_t>(n - i));
  for (uint64_t bits = bits_of(rest); bits != 0; bits &= bits - 1) f(i + __builtin_ctzll(bits));
}

// Calls f(position in the block, channel, tap) for every nonzero of a row's part in one block.
template <typename F>
inline void for_each_entry(const uint8_t* mask, int64_t cols, int64_t taps, SmallDivider by_taps,
                           F f) {
  if (taps == 1) {
    for_each_set(mask, cols, [&](int64_t i) { f(i, i, int64_t{0}); });
  } else {
    for_each_set(mask, cols, [&](int64_t i) {
      const int64_t c = by_taps(i);
      f(i, c, i - c * taps);
    });
  }
}

inline void running_sum(int64_t* row_ptr, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row_ptr[i + 1] += row_ptr[i];
}

}  // namespace

void count_entries(const PatternView& forward, const PatternView& transposed, const uint8_t* mask,
                   int64_t* row_ptr, int64_t* transposed_row_ptr) {
  const int64_t n = forward.blocks() * forward.rows;
  const int64_t n_t = transposed.blocks() * transposed.rows;
  std::memset(row_ptr, 0, sizeof(int64_t) * static_cast<size_t>(n + 1));
  std::memset(transposed_row_ptr, 0, sizeof(int64_t) * static_cast<size_t>(n_t + 1));
  const int64_t rows_per_group = transposed.depth;
  const SmallDivider by_taps(forward.taps);
  for (int64_t r = 0; r < forward.rows; ++r) {
    const int64_t group = r / rows_per_group, in_group = r % rows_per_group;
    int64_t* counts = row_ptr + 1 + r;
    int64_t* counts_t = transposed_row_ptr + 1 +
                        (in_group / transposed.block_depth) * transposed.rows +
                        group * forward.depth;
    const uint8_t* row = mask + r * forward.cols();
    for (int64_t b = 0; b < forward.blocks(); ++b) {
      int64_t* counts_here = counts_t + b * forward.block_depth;
      int64_t found = 0;
      for_each_entry(row + b * forward.block_cols(), forward.depth_of(b) * forward.taps,
                     forward.taps, by_taps, [&](int64_t, int64_t c, int64_t) {
                       ++found;
                       ++counts_here[c];
                     });
      counts[b * forward.rows] = found;
    }
  }
  running_sum(row_ptr, n);
  running_sum(transposed_row_ptr, n_t);
}

void write_entries(const PatternView& forward, const PatternView& transposed, const uint8_t* mask,
                   PatternBuffers out, PatternBuffers transposed_out, int64_t* cursor) {
  const int64_t n_t = transposed.blocks() * transposed.rows;
  std::memcpy(cursor, transposed_out.row_ptr, sizeof(int64_t) * static_cast<size_t>(n_t));
  const int64_t rows_per_group = transposed.depth;
  const SmallDivider by_taps(forward.taps);
  for (int64_t r = 0; r < forward.rows; ++r) {
    const int64_t group = r / rows_per_group, in_group = r % rows_per_group;
    const int64_t block_t = in_group / transposed.block_depth;
    int64_t* cursor_t = cursor + block_t * transposed.rows + group * forward.depth;
    const int64_t base_t = (in_group - block_t * transposed.block_depth) * transposed.taps;
    const uint8_t* row = mask + r * forward.cols();
    for (int64_t b = 0; b < forward.blocks(); ++b) {
      int64_t* cursor_here = cursor_t + b * forward.block_depth;
      int16_t* offset = out.offset + out.row_ptr[b * forward.rows + r];
      for_each_entry(row + b * forward.block_cols(), forward.depth_of(b) * forward.taps,
                     forward.taps, by_taps, [&](int64_t i, int64_t c, int64_t t) {
                       *offset++ = static_cast<int16_t>(i);
                       transposed_out.offset[cursor_here[c]++] = static_cast<int16_t>(base_t + t);
                     });
    }
  }
}

bool pattern_is_valid(const PatternView& p) {
  const int64_t n = p.blocks() * p.rows;
  if (p.row_ptr[0] != 0 || p.row_ptr[n] != p.nnz) return false;
  bool ordered = true;
  for (int64_t i = 0; i < n; ++i) ordered &= p.row_ptr[i] <= p.row_ptr[i + 1];
  if (!ordered) return false;
  for (int64_t b = 0; b < p.blocks(); ++b) {
    const int64_t begin = p.row_ptr[b * p.rows], end = p.row_ptr[(b + 1) * p.rows];
    uint16_t largest = 0;  // a negative offset reads as a large one
    for (int64_t i = begin; i < end; ++i) {
      const uint16_t o = static_cast<uint16_t>(p.offset[i]);
      largest = o > largest ? o : largest;
    }
    if (begin < end && largest >= p.depth_of(b) * p.taps) return false;
  }
  return true;
}

namespace {

// Calls f(row, block, first entry, last entry) for the rows [begin, end). As far as the order of
// the pattern allows, row after row: the dense weight is then read in order, the blocks' entries
// are few streams.
template <typename F>
inline void for_each_row(const PatternView& p, int64_t begin, int64_t end, F f) {
  const int64_t step = p.row_at == nullptr ? 1 : kRowWindow;
  for (int64_t first = begin; first < end; first += step) {
    const int64_t last = first + step < end ? first + step : end;
    for (int64_t b = 0; b < p.blocks(); ++b) {
      const int64_t* bounds = p.row_ptr + b * p.rows;
      for (int64_t i = first; i < last; ++i) f(p.row_of(b, i), b, bounds[i], bounds[i + 1]);
    }
  }
}

template <typename S>
void gather(const PatternView& p, const S* weight, Accumulator<S>* values, int64_t begin,
            int64_t end) {
  for_each_row(p, begin, end, [&](int64_t r, int64_t b, int64_t first, int64_t last) {
    const S* w = weight + r * p.cols() + b * p.block_cols();
    for (int64_t i = first; i < last; ++i) values[i] = widen(w[p.offset[i]]);
  });
}

template <typename S, bool Checked>
bool gather_transposed(const PatternView& p, const PatternView& t, const S* weight,
                       Accumulator<S>* values, int64_t* cursor, int64_t begin, int64_t end) {
  const int64_t blocks_t = t.blocks();
  const SmallDivider by_taps(p.taps);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / blocks_t, block_t = item % blocks_t;
    const int64_t* bounds = t.row_ptr + block_t * t.rows;
    int64_t* limit = cursor + p.depth;
    for (int64_t c = 0; c < p.depth; ++c) {
      const int64_t place = t.place(block_t, group * p.depth + c);
      cursor[c] = bounds[place];
      limit[c] = bounds[place + 1];
    }
    const int64_t first_row = group * t.depth + block_t * t.block_depth;
    for (int64_t k = 0; k < t.depth_of(block_t); ++k) {
      const int64_t r = first_row + k;
      for (int64_t b = 0; b < p.blocks(); ++b) {
        const S* w = weight + r * p.cols() + b * p.block_cols();
        const int64_t place = b * p.rows + p.place(b, r);
        const int64_t last = p.row_ptr[place + 1];
        for (int64_t i = p.row_ptr[place]; i < last; ++i) {
          const int64_t o = p.offset[i];
          const int64_t c = p.taps == 1 ? o : by_taps(o);
          const int64_t channel = b * p.block_depth + c;
          const int64_t at = cursor[channel]++;
          // The entry must be the transposed pattern's next one, else the two disagree.
          if constexpr (Checked) {
            if (at >= limit[channel] || t.offset[at] != k * t.taps + (o - c * p.taps)) return false;
          }
          values[at] = widen(w[o]);
        }
      }
    }
  }
  return true;
}

template <typename S>
void scatter(const PatternView& p, const Accumulator<S>* values, S* grad, int64_t begin,
             int64_t end) {
  if (p.cols() == 0) return;  // there is no memory behind the rows
  std::memset(grad + begin * p.cols(), 0,
              sizeof(S) * static_cast<size_t>((end - begin) * p.cols()));
  for_each_row(p, begin, end, [&](int64_t r, int64_t b, int64_t first, int64_t last) {
    S* g = grad + r * p.cols() + b * p.block_cols();
    for (int64_t i = first; i < last; ++i) g[p.offset[i]] = narrow<S>(values[i]);
  });
}

// Bits are masked, not multiplied: a NaN under a False entry becomes a zero.
template <typename Bits>
void mask_bits(const void* values, const uint8_t* mask, void* out, int64_t begin, int64_t end) {
  const Bits* from = static_cast<const Bits*>(values);
  Bits* to = static_cast<Bits*>(out);
  for (int64_t i = begin; i < end; ++i) {
    to[i] = from[i] & static_cast<Bits>(-static_cast<Bits>(mask[i] != 0));
  }
}

template <typename T>
int64_t filter(const PatternView& p, const T* values, const uint8_t* keep_tap, PatternBuffers out,
               T* out_values) {
  int64_t at = 0;
  const int64_t n = p.blocks() * p.rows;
  const SmallDivider by_taps(p.taps);
  for (int64_t i = 0; i < n; ++i) {
    out.row_ptr[i] = at;
    for (int64_t e = p.row_ptr[i]; e < p.row_ptr[i + 1]; ++e) {
      const int64_t o = p.offset[e];
      if (keep_tap[o - by_taps(o) * p.taps] == 0) continue;
      out.offset[at] = p.offset[e];
      out_values[at++] = values[e];
    }
  }
  out.row_ptr[n] = at;
  return at;
}

}  // namespace

void sort_rows(const PatternView& p, SortedBuffers out) {
  const int64_t rows_per_group = p.rows / p.groups;
  int64_t at = 0;
  for (int64_t b = 0; b < p.blocks(); ++b) {
    const int64_t* bounds = p.row_ptr + b * p.rows;
    for (int64_t first = 0; first < p.rows;) {
      const int64_t group_end = (first / rows_per_group + 1) * rows_per_group;
      const int64_t left = group_end - first, n = left < kRowWindow ? left : kRowWindow;
      int32_t order[kRowWindow];
      // Insertion into the sorted front: windows are short.
      for (int64_t i = 0; i < n; ++i) {
        const int64_t row = first + i, length = bounds[row + 1] - bounds[row];
        int64_t j = i;
        for (; j > 0 && bounds[order[j - 1] + 1] - bounds[order[j - 1]] < length; --j) {
          order[j] = order[j - 1];
        }
        order[j] = static_cast<int32_t>(row);
      }
      for (int64_t i = 0; i < n; ++i) {
        const int64_t row = order[i], length = bounds[row + 1] - bounds[row];
        const int64_t place = b * p.rows + first + i;
        out.row_ptr[place] = at;
        out.row_at[place] = order[i];
        out.place_of[b * p.rows + row] = static_cast<int32_t>(first + i);
        std::memcpy(out.offset + at, p.offset + bounds[row],
                    sizeof(int16_t) * static_cast<size_t>(length));
        at += length;
      }
      first += n;
    }
  }
  out.row_ptr[p.blocks() * p.rows] = at;
}

#define FASTPRUNE_BY_DTYPE(...) \
  switch (dtype) {              \
    case DType::f32: {          \
      using S = float;          \
      return __VA_ARGS__;       \
    }                           \
    case DType::f64: {          \
      using S = double;         \
      return __VA_ARGS__;       \
    }                           \
    case DType::bf16: {         \
      using S = BFloat16;       \
      return __VA_ARGS__;       \
    }                           \
    default: {                  \
      using S = Float16;        \
      return __VA_ARGS__;       \
    }                           \
  }

void gather_values(const PatternView& p, DType dtype, const void* weight, void* values,
                   int64_t begin, int64_t end) {
  FASTPRUNE_BY_DTYPE(
      gather<S>(p, static_cast<const S*>(weight), static_cast<Accumulator<S>*>(values), begin, end))
}

bool gather_transposed_values(const PatternView& p, const PatternView& t, DType dtype,
                              const void* weight, void* values, int64_t* cursor, bool checked,
                              int64_t begin, int64_t end) {
  if (checked) {
    FASTPRUNE_BY_DTYPE(gather_transposed<S, true>(p, t, static_cast<const S*>(weight),
                                                  static_cast<Accumulator<S>*>(values), cursor,
                                                  begin, end))
  }
  FASTPRUNE_BY_DTYPE(gather_transposed<S, false>(p, t, static_cast<const S*>(weight),
                                                 static_cast<Accumulator<S>*>(values), cursor,
                                                 begin, end))
}

void scatter_values(const PatternView& p, DType dtype, const void* values, void* weight_grad,
                    int64_t begin, int64_t end) {
  FASTPRUNE_BY_DTYPE(scatter<S>(p, static_cast<const Accumulator<S>*>(values),
                                static_cast<S*>(weight_grad), begin, end))
}

void apply_mask(DType dtype, const void* values, const uint8_t* mask, void* out, int64_t begin,
                int64_t end) {
  switch (dtype) {
    case DType::f32:
      return mask_bits<uint32_t>(values, mask, out, begin, end);
    case DType::f64:
      return mask_bits<uint64_t>(values, mask, out, begin, end);
    default:
      return mask_bits<uint16_t>(values, mask, out, begin, end);
  }
}

int64_t filter_taps(const PatternView& p, DType dtype, const void* values, const uint8_t* keep_tap,
                    PatternBuffers out, void* out_values) {
  if (dtype == DType::f64) {
    return filter(p, static_cast<const double*>(values), keep_tap, out,
                  static_cast<double*>(out_values));
  }
  return filter(p, static_cast<const float*>(values), keep_tap, out,
                static_cast<float*>(out_values));
}

}  // namespace fastprune::FASTPRUNE_ISA
