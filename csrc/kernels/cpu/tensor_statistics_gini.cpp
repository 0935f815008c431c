// The passes over keys, and the exact sums inside one bin, that the Gini index is made of.
#include <cstring>

#include "kernels/cpu/statistics_math.h"
#include "kernels/cpu/tensor_statistics.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

template <typename T>
using Key = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <typename K>
constexpr K kMagnitude = static_cast<K>(~std::make_unsigned_t<K>{0} >> 1);

// The lanes whose magnitude is not 0 and in [lo, lo + span).
#if defined(__AVX512F__)
template <typename K>
inline uint32_t in_range(__m512i v, K lo, K span) {
  if constexpr (sizeof(K) == 4) {
    const __m512i key = _mm512_and_si512(v, _mm512_set1_epi32(kMagnitude<int32_t>));
    const __m512i offset = _mm512_sub_epi32(key, _mm512_set1_epi32(static_cast<int>(lo)));
    return _mm512_mask_cmplt_epu32_mask(_mm512_test_epi32_mask(key, key), offset,
                                        _mm512_set1_epi32(static_cast<int>(span)));
  } else {
    const __m512i key = _mm512_and_si512(v, _mm512_set1_epi64(kMagnitude<int64_t>));
    const __m512i offset = _mm512_sub_epi64(key, _mm512_set1_epi64(static_cast<int64_t>(lo)));
    return _mm512_mask_cmplt_epu64_mask(_mm512_test_epi64_mask(key, key), offset,
                                        _mm512_set1_epi64(static_cast<int64_t>(span)));
  }
}
#elif defined(__AVX2__)
template <typename K>
inline uint32_t in_range(__m256i v, K lo, K span) {
  constexpr int32_t kFlip = INT32_MIN;  // signed order of flipped numbers is unsigned order
  const __m256i key = _mm256_and_si256(v, _mm256_set1_epi32(INT32_MAX));
  const __m256i offset = _mm256_sub_epi32(key, _mm256_set1_epi32(static_cast<int>(lo) ^ kFlip));
  const __m256i inside =
      _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(span) ^ kFlip), offset);
  const __m256i both = _mm256_and_si256(inside, _mm256_cmpgt_epi32(key, _mm256_setzero_si256()));
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(both)));
}
#endif

// Calls f(offsets, n) with the keys, less range.lo, of the elements in the range. Zeros are in
// none: they may be very many, and they are known.
template <typename T, typename F>
void for_each_in_range(const StatisticsTensor& tensor, int64_t begin, int64_t end,
                       const GiniRange& range, F f) {
  using K = Key<T>;
  alignas(64) T buffer[kRoom<T>];
  alignas(64) K keys[kRoom<T>];
  const K lo = static_cast<K>(range.lo), span = static_cast<K>(range.span);
  for (int64_t at = begin; at < end; at += kBlock) {
    int64_t n = end - at < kBlock ? end - at : kBlock, found = 0;
    const T* x = load_block(tensor, at, n, buffer);
    if constexpr (kCompresses<T>) {
#if defined(__AVX2__)
      found = compress(x, n, reinterpret_cast<T*>(keys),
                       [&](Lanes v, int64_t) { return in_range<K>(v, lo, span); });
#endif
      for (int64_t i = 0; i < found; ++i) keys[i] = (keys[i] & kMagnitude<K>)-lo;
    } else {
      for (int64_t i = 0; i < n; ++i) {
        K key;
        std::memcpy(&key, x + i, sizeof(K));
        key &= kMagnitude<K>;
        keys[found] = key - lo;
        found += static_cast<K>(key - lo) < span && key != 0 ? 1 : 0;
      }
    }
    f(keys, found);
  }
}

template <typename F>
void for_each_in_range(const StatisticsTensor& tensor, int64_t begin, int64_t end,
                       const GiniRange& range, F f) {
  if (range.wide) {
    for_each_in_range<double>(tensor, begin, end, range, f);
  } else {
    for_each_in_range<float>(tensor, begin, end, range, f);
  }
}

// Of `count` sorted numbers.
template <typename U>
GiniGroup group_of_sorted(const U* keys, int64_t count) {
  // Sum of keys[i] * (2 i + 1 - count): unsigned arithmetic modulo 2^128, the result is positive.
  unsigned __int128 sum = 0, weighted = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += keys[i];
    weighted += static_cast<unsigned __int128>(keys[i]) * static_cast<uint64_t>(2 * i + 1);
  }
  return {count, sum, weighted - sum * static_cast<uint64_t>(count)};
}

template <typename U>
void insertion_sort(U* keys, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    const U key = keys[i];
    int64_t j = i;
    for (; j > 0 && keys[j - 1] > key; --j) keys[j] = keys[j - 1];
    keys[j] = key;
  }
}

constexpr int64_t kFewKeys = 32;

// 15 bits: by the low 7, then by the high 8.
void sort_short(uint16_t* keys, int64_t n, uint16_t* other) {
  uint32_t low[128] = {}, high[256] = {};
  for (int64_t i = 0; i < n; ++i) ++low[keys[i] & 127], ++high[keys[i] >> 7];
  uint32_t a = 0, b = 0;
  for (uint32_t& c : low) a += c, c = a - c;
  for (uint32_t& c : high) b += c, c = b - c;
  for (int64_t i = 0; i < n; ++i) other[low[keys[i] & 127]++] = keys[i];
  for (int64_t i = 0; i < n; ++i) keys[high[other[i] >> 7]++] = other[i];
}

// In place, from the highest of `bits` bits down, eight at a time: every key is carried to the
// next free place of its digit, whose key is carried on.
void sort_wide(uint64_t* keys, int64_t n, int bits) {
  if (n <= kFewKeys) return insertion_sort(keys, n);
  const int shift = bits > 8 ? bits - 8 : 0;
  int64_t next[256], end[256], counts[256] = {}, total = 0;
  for (int64_t i = 0; i < n; ++i) ++counts[keys[i] >> shift & 255];
  for (int d = 0; d < 256; ++d) {
    next[d] = total;
    end[d] = total += counts[d];
  }
  for (int d = 0; d < 256; ++d) {
    while (next[d] < end[d]) {
      uint64_t key = keys[next[d]];
      for (int to = key >> shift & 255; to != d; to = key >> shift & 255) {
        const uint64_t displaced = keys[next[to]];
        keys[next[to]++] = key;
        key = displaced;
      }
      keys[next[d]++] = key;
    }
  }
  if (shift == 0) return;
  for (int d = 0; d < 256; ++d) sort_wide(keys + end[d] - counts[d], counts[d], shift);
}

// With r(u) of the c numbers at most u: the pairs differ by the sum over u of r (c - r), and the
// numbers' sum is that of c - r.
template <typename Total>
GiniGroup group_of_counts(const uint32_t* counts, int64_t n, int64_t total) {
  const uint64_t c = static_cast<uint64_t>(total);
  uint64_t r = 0;
  unsigned __int128 sum = 0;
  Total pairs = 0;
  constexpr int64_t kRun = 1024;
  for (int64_t at = 0; at < n; at += kRun) {
    uint64_t part = 0;
    for (int64_t u = at; u < (n - at < kRun ? n : at + kRun); ++u) {
      r += counts[u];
      part += c - r;
      pairs += static_cast<Total>(r) * (c - r);
    }
    sum += part;
  }
  return {total, sum, pairs};
}

// Of at most 2^24 numbers below 2^15: 2^15 products of at most 2^46 fit 64 bits.
#if defined(__AVX512F__)
GiniGroup group_of_few_counts(const uint32_t* counts, int64_t n, int64_t total) {
  const __m512i c = _mm512_set1_epi32(static_cast<int>(total)), zero = _mm512_setzero_si512();
  const __m512i last = _mm512_set1_epi32(15);
  __m512i before = zero, sum = zero, pairs = zero;  // the two sums: 64 bits a lane
  for (int64_t at = 0; at < n; at += 16) {
    __m512i r = load_lanes(counts + at);
    r = _mm512_add_epi32(r, _mm512_alignr_epi32(r, zero, 15));
    r = _mm512_add_epi32(r, _mm512_alignr_epi32(r, zero, 14));
    r = _mm512_add_epi32(r, _mm512_alignr_epi32(r, zero, 12));
    r = _mm512_add_epi32(r, _mm512_alignr_epi32(r, zero, 8));
    r = _mm512_add_epi32(r, before);
    before = _mm512_permutexvar_epi32(last, r);
    const __m512i above = _mm512_sub_epi32(c, r);
    const __m512i odd_r = _mm512_srli_epi64(r, 32), odd_above = _mm512_srli_epi64(above, 32);
    pairs = _mm512_add_epi64(pairs, _mm512_mul_epu32(r, above));
    pairs = _mm512_add_epi64(pairs, _mm512_mul_epu32(odd_r, odd_above));
    sum = _mm512_add_epi64(sum, odd_above);
    sum = _mm512_add_epi64(sum, _mm512_and_si512(above, _mm512_set1_epi64(0xffffffff)));
  }
  return {total, static_cast<uint64_t>(_mm512_reduce_add_epi64(sum)),
          static_cast<uint64_t>(_mm512_reduce_add_epi64(pairs))};
}
#else
GiniGroup group_of_few_counts(const uint32_t* counts, int64_t n, int64_t total) {
  return group_of_counts<uint64_t>(counts, n, total);
}
#endif

}  // namespace

void gini_histogram(const StatisticsTensor& tensor, int64_t begin, int64_t end,
                    const GiniRange& range, uint32_t* counts) {
  for_each_in_range(tensor, begin, end, range, [&](const auto* keys, int64_t n) {
    for (int64_t i = 0; i < n; ++i) ++counts[keys[i] >> range.shift];
  });
}

void gini_scatter(const StatisticsTensor& tensor, int64_t begin, int64_t end,
                  const GiniRange& range, uint32_t* cursors, void* out) {
  const uint64_t low = (uint64_t{1} << range.shift) - 1;
  for_each_in_range(tensor, begin, end, range, [&](const auto* keys, int64_t n) {
    using K = std::decay_t<decltype(keys[0])>;
    using Out = std::conditional_t<sizeof(K) == 8, uint64_t, uint16_t>;
    for (int64_t i = 0; i < n; ++i) {
      static_cast<Out*>(out)[cursors[keys[i] >> range.shift]++] = static_cast<Out>(keys[i] & low);
    }
  });
}

GiniGroup gini_group(bool wide, void* keys, int64_t count, int bits, void* scratch) {
  constexpr int64_t kMany = 4096;  // are sooner counted than sorted
  if (wide) {
    sort_wide(static_cast<uint64_t*>(keys), count, bits);
    return group_of_sorted(static_cast<const uint64_t*>(keys), count);
  }
  uint16_t* const narrow = static_cast<uint16_t*>(keys);
  if (count <= kFewKeys) {
    insertion_sort(narrow, count);
  } else if (count < kMany) {
    sort_short(narrow, count, static_cast<uint16_t*>(scratch));
  } else {
    uint32_t* const counts = static_cast<uint32_t*>(scratch);
    std::memset(counts, 0, sizeof(uint32_t) << bits);
    for (int64_t i = 0; i < count; ++i) ++counts[narrow[i]];
    const int64_t n = int64_t{1} << bits;
    return count <= int64_t{1} << 24 ? group_of_few_counts(counts, n, count)
                                     : group_of_counts<unsigned __int128>(counts, n, count);
  }
  return group_of_sorted(static_cast<const uint16_t*>(narrow), count);
}

}  // namespace fastprune::FASTPRUNE_ISA
