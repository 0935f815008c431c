#include "kernels/cpu/global_topk_mask.h"

#include <cstring>
#include <type_traits>

#include "kernels/cpu/simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastprune::FASTPRUNE_ISA {
namespace {

constexpr int64_t kBlock = 1024;        // elements whose keys are in flight; a multiple of 64
constexpr int64_t kBisectable = 32768;  // fewer keys are sooner counted a few times than binned

template <typename K>
struct KeyTraits;
template <>
struct KeyTraits<int32_t> {
  using Unsigned = uint32_t;
  using Score = float;
  static constexpr int32_t lowest = INT32_MIN, highest = INT32_MAX, infinity = 0x7f800000;
};
template <>
struct KeyTraits<int64_t> {
  using Unsigned = uint64_t;
  using Score = double;
  static constexpr int64_t lowest = INT64_MIN, highest = INT64_MAX;
  static constexpr int64_t infinity = 0x7ff0000000000000;
};
template <typename K>
using Unsigned = typename KeyTraits<K>::Unsigned;

// ---- Scores and keys, a block at a time --------------------------------------------------------

template <TopkScore S, typename T>
inline T fuse(T a, T b) {
  if constexpr (S == TopkScore::product || S == TopkScore::saliency) return a * b;
  if constexpr (S == TopkScore::square) return a * a;
  return a;
}

template <TopkScore S>
constexpr bool kSigned = S == TopkScore::identity || S == TopkScore::product;

// T is the type that scores are computed in; keys may be wider. Returns the largest key.
template <TopkScore S, typename T, typename K>
K fuse_keys(const T* a, const T* b, int64_t n, K* keys) {
  using Traits = KeyTraits<K>;
  K largest = Traits::lowest;
  for (int64_t i = 0; i < n; ++i) {
    const typename Traits::Score score = fuse<S>(a[i], b[i]);
    K key;
    std::memcpy(&key, &score, sizeof(K));
    if constexpr (kSigned<S>) {
      const K sign = key >> (8 * sizeof(K) - 1);
      const bool nan = (key & Traits::highest) > Traits::infinity;
      key ^= sign & Traits::highest;
      key += key == -1 ? 1 : 0;  // only -0 maps to -1
      key = nan ? Traits::highest : key;
    } else {
      key &= Traits::highest;
    }
    keys[i] = key;
    largest = key > largest ? key : largest;
  }
  return largest;
}

template <typename T, typename K>
K fuse_keys(TopkScore score, const T* a, const T* b, int64_t n, K* keys) {
  switch (score) {
    case TopkScore::identity:
      return fuse_keys<TopkScore::identity>(a, a, n, keys);
    case TopkScore::magnitude:
      return fuse_keys<TopkScore::magnitude>(a, a, n, keys);
    case TopkScore::product:
      return fuse_keys<TopkScore::product>(a, b, n, keys);
    case TopkScore::saliency:
      return fuse_keys<TopkScore::saliency>(a, b, n, keys);
    default:
      return fuse_keys<TopkScore::square>(a, a, n, keys);
  }
}

template <typename S, typename T>
const T* convert(const void* from, int64_t begin, int64_t n, T* buffer) {
  const S* p = static_cast<const S*>(from) + begin;
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<S, Float16> && std::is_same_v<T, float>) {
    for (; i + 8 <= n; i += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i));
      _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(halves));
    }
  }
#endif
  for (; i < n; ++i) buffer[i] = static_cast<T>(widen(p[i]));
  return buffer;
}

// Elements [begin, begin + n) as T: in place where they are stored so, else through the buffer.
template <typename T>
const T* as_scores(DType dtype, const void* from, int64_t begin, int64_t n, T* buffer) {
  switch (dtype) {
    case DType::f32:
      if constexpr (sizeof(T) == 4) return static_cast<const T*>(from) + begin;
      return convert<float>(from, begin, n, buffer);
    case DType::f64:
      if constexpr (sizeof(T) == 8) return static_cast<const T*>(from) + begin;
      return buffer;  // not reached: float64 factors are computed in double
    case DType::bf16:
      return convert<BFloat16>(from, begin, n, buffer);
    default:
      return convert<Float16>(from, begin, n, buffer);
  }
}

inline bool is_double(const TopkTensor& t) {
  return t.dtype == DType::f64 || (t.other != nullptr && t.other_dtype == DType::f64);
}

template <typename T, typename K>
K keys_through(TopkScore score, const TopkTensor& t, int64_t begin, int64_t n, K* keys) {
  alignas(64) T buffer_a[kBlock], buffer_b[kBlock];
  const T* a = as_scores<T>(t.dtype, t.values, begin, n, buffer_a);
  const T* b = t.other == nullptr ? a : as_scores<T>(t.other_dtype, t.other, begin, n, buffer_b);
  return fuse_keys(score, a, b, n, keys);
}

template <typename K>
void restrict_keys(const uint8_t* __restrict within, int64_t n, K* __restrict keys) {
  for (int64_t i = 0; i < n; ++i) {
    const K keep = -static_cast<K>(within[i] != 0);  // all ones, or none
    keys[i] = (keys[i] & keep) | (KeyTraits<K>::lowest & ~keep);
  }
}

template <typename K>
K largest_key(const K* keys, int64_t n) {
  K largest = KeyTraits<K>::lowest;
  for (int64_t i = 0; i < n; ++i) largest = keys[i] > largest ? keys[i] : largest;
  return largest;
}

// Keys of n <= kBlock elements, padded with the lowest key to a multiple of 64. True: one is NaN.
template <typename K>
bool make_keys(TopkScore score, const TopkTensor& t, int64_t begin, int64_t n, K* keys) {
  using Traits = KeyTraits<K>;
  K largest;
  if constexpr (sizeof(K) == 8) {
    largest = is_double(t) ? keys_through<double>(score, t, begin, n, keys)
                           : keys_through<float>(score, t, begin, n, keys);
  } else {
    largest = keys_through<float>(score, t, begin, n, keys);
  }
  for (int64_t i = n; i % 64 != 0; ++i) keys[i] = Traits::lowest;
  if (t.within == nullptr) return largest > Traits::infinity;
  restrict_keys(t.within + begin, n, keys);
  return largest > Traits::infinity && largest_key(keys, n) > Traits::infinity;
}

// ---- 64 keys at a time --------------------------------------------------------------------------

// Bit i of the result: keys[i] > bound.
inline uint64_t greater_bits(const int32_t* keys, int32_t bound) {
  uint64_t bits = 0;
#if defined(__AVX512F__)
  const __m512i limit = _mm512_set1_epi32(bound);
  for (int i = 0; i < 4; ++i) {
    const uint64_t part = _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(keys + 16 * i), limit);
    bits |= part << (16 * i);
  }
#elif defined(__AVX2__)
  const __m256i limit = _mm256_set1_epi32(bound);
  for (int i = 0; i < 8; ++i) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + 8 * i));
    const int part = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(v, limit)));
    bits |= static_cast<uint64_t>(part) << (8 * i);
  }
#elif defined(__SSE2__)
  const __m128i limit = _mm_set1_epi32(bound);
  for (int i = 0; i < 16; ++i) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(keys + 4 * i));
    const int part = _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpgt_epi32(v, limit)));
    bits |= static_cast<uint64_t>(part) << (4 * i);
  }
#else
  for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(keys[i] > bound) << i;
#endif
  return bits;
}

inline uint64_t greater_bits(const int64_t* keys, int64_t bound) {
  uint64_t bits = 0;
#if defined(__AVX512F__)
  const __m512i limit = _mm512_set1_epi64(bound);
  for (int i = 0; i < 8; ++i) {
    const uint64_t part = _mm512_cmpgt_epi64_mask(_mm512_loadu_si512(keys + 8 * i), limit);
    bits |= part << (8 * i);
  }
#elif defined(__AVX2__)
  const __m256i limit = _mm256_set1_epi64x(bound);
  for (int i = 0; i < 16; ++i) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + 4 * i));
    const int part = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(v, limit)));
    bits |= static_cast<uint64_t>(part) << (4 * i);
  }
#else
  for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(keys[i] > bound) << i;
#endif
  return bits;
}

// mask[i] = bit i, for n <= 64 elements.
inline void write_bits(uint64_t bits, int64_t n, uint8_t* mask) {
  if (n == 64) {
#if defined(__AVX512BW__)
    _mm512_storeu_si512(mask, _mm512_maskz_set1_epi8(bits, 1));
#else
    for (int byte = 0; byte < 8; ++byte) {
      // Eight copies of the byte, bit i kept in copy i, then any nonzero byte made 1.
      uint64_t x = ((bits >> (8 * byte)) & 0xff) * 0x0101010101010101u & 0x8040201008040201u;
      x = ((x + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
      std::memcpy(mask + 8 * byte, &x, 8);  // byte i is element i: little-endian, checked below
    }
#endif
    return;
  }
  for (int64_t i = 0; i < n; ++i) mask[i] = static_cast<uint8_t>((bits >> i) & 1);
}
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "write_bits stores words");

// ---- Ranking keys in memory --------------------------------------------------------------------

// Whole vectors: the keys are padded with the lowest to a multiple of 64.
template <typename K>
inline int64_t count_greater(const K* keys, int64_t n, K bound) {
  constexpr int kStep = kLanes<K>;
  const Vec<K> limit = broadcast(bound);
  Vec<K> even{}, odd{};  // a lane that is greater counts -1
  for (int64_t i = 0; i < n; i += 2 * kStep) {
    even += load(keys + i) > limit;
    odd += load(keys + i + kStep) > limit;
  }
  int64_t count = 0;
  for (int j = 0; j < kStep; ++j) count -= static_cast<int64_t>(even[j]) + odd[j];
  return count;
}

template <typename K>
inline K least_greater(const K* keys, int64_t n, K bound) {
  constexpr int kStep = kLanes<K>;
  const Vec<K> limit = broadcast(bound), none = broadcast(KeyTraits<K>::highest);
  Vec<K> least = none;
  for (int64_t i = 0; i < n; i += kStep) {
    const Vec<K> v = load(keys + i);
    const Vec<K> greater = v > limit ? v : none;
    least = greater < least ? greater : least;
  }
  K result = least[0];
  for (int j = 1; j < kStep; ++j) result = least[j] < result ? least[j] : result;
  return result;
}

template <typename K>
inline void pad(K* keys, int64_t n) {
  for (int64_t i = n; i % 64 != 0; ++i) keys[i] = KeyTraits<K>::lowest;
}

// Two histograms of alternate elements, so that a massed key does not wait for its own last store.
template <typename K>
void add_to_bins(const K* keys, int64_t n, K lo, K hi, int64_t (*bins)[kTopkBins + 1]) {
  using U = Unsigned<K>;
  const int shift = topk_shift(lo, hi);
  const U range = static_cast<U>(hi) - static_cast<U>(lo);
  for (int64_t i = 0; i < n; ++i) {
    const U offset = static_cast<U>(keys[i]) - static_cast<U>(lo);
    const U bin = offset > range ? static_cast<U>(kTopkBins) : offset >> shift;  // outside: a dump
    ++bins[i & 1][bin];
  }
}

template <typename K>
TopkThreshold select_key(K* keys, int64_t n, int64_t rank, K* scratch) {
  using U = Unsigned<K>;
  pad(keys, n);
  K lo = KeyTraits<K>::highest, hi = KeyTraits<K>::lowest;
  for (int64_t i = 0; i < n; ++i) {
    lo = keys[i] < lo ? keys[i] : lo;
    hi = keys[i] > hi ? keys[i] : hi;
  }
  // The rank-th largest lies in [lo, hi]: `above` keys are over hi, of which `dropped` are no
  // longer among keys[0, n), and `inside` are in the range.
  int64_t above = 0, dropped = 0, inside = n;
  while (lo < hi && n > kBisectable) {
    int64_t bins[2][kTopkBins + 1] = {};
    add_to_bins(keys, n, lo, hi, bins);
    for (int64_t b = 0; b < kTopkBins; ++b) bins[0][b] += bins[1][b];
    int64_t first = lo, last = hi;
    inside = topk_narrow(bins[0], rank, first, last, above);
    lo = static_cast<K>(first);
    hi = static_cast<K>(last);
    if (inside > n / 2) continue;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      scratch[kept] = keys[i];
      kept += keys[i] >= lo && keys[i] <= hi ? 1 : 0;
    }
    keys = scratch;
    n = kept;
    dropped = above;
    pad(keys, n);
  }
  // Counting narrows the rest. Interpolated bounds close in fast where keys spread evenly; every
  // other bound halves the range, whatever the keys.
  for (bool halve = false; lo < hi; halve = !halve) {
    const U range = static_cast<U>(hi) - static_cast<U>(lo);
    U step = range / 2;
    if (!halve) {
      const double share = static_cast<double>(above + inside - rank) / static_cast<double>(inside);
      step = static_cast<U>(share * static_cast<double>(range));
      step = step < range ? step : range - 1;
    }
    const K mid = static_cast<K>(static_cast<U>(lo) + step);
    const int64_t over = dropped + count_greater(keys, n, mid);
    if (over == rank) {  // the least key over mid is the one: no need to close in on it
      lo = hi = least_greater(keys, n, mid);
      above = dropped + count_greater(keys, n, lo);
      inside = rank - above;
    } else if (over > rank) {
      inside = over - above;
      lo = static_cast<K>(mid + 1);
    } else {
      inside -= over - above;
      above = over;
      hi = mid;
    }
  }
  return {lo, above, inside};  // lo == hi
}

// ---- The passes --------------------------------------------------------------------------------

template <typename K, typename F>
inline void for_each_block(const TopkProblem& problem, const TopkSpan& span, F f) {
  alignas(64) K keys[kBlock];
  for (int64_t at = span.begin; at < span.end; at += kBlock) {
    const int64_t n = span.end - at < kBlock ? span.end - at : kBlock;
    const bool nan = make_keys(problem.score, problem.tensors[span.tensor], at, n, keys);
    f(keys, at, n, nan);
  }
}

template <typename K>
void filter(const TopkProblem& problem, TopkChunk& chunk, const TopkBracket& bracket,
            const TopkCandidates& out, int64_t& used) {
  K bounds[4];
  for (int i = 0; i < 4; ++i) bounds[i] = static_cast<K>(bracket.bounds[i]);
  const bool ends = bounds[0] != bounds[1] || bounds[2] != bounds[3];
  const TopkTensor& t = problem.tensors[chunk.span.tensor];
  int64_t above_top = 0, top = 0, inside = 0, bottom = 0;
  chunk.has_nan = false;
  chunk.first = used;
  for_each_block<K>(problem, chunk.span, [&](const K* keys, int64_t at, int64_t n, bool nan) {
    chunk.has_nan |= nan;
    for (int64_t i = 0; i < n; i += 64) {
      const uint64_t over = greater_bits(keys + i, bounds[1]);
      const uint64_t over_bottom = greater_bits(keys + i, bounds[2]);
      write_bits(over, n - i < 64 ? n - i : 64, t.mask + at + i);
      above_top += __builtin_popcountll(over);
      uint64_t in = over_bottom & ~over;
      const int found = __builtin_popcountll(in);
      inside += found;
      if (ends) {
        top += __builtin_popcountll(over & ~greater_bits(keys + i, bounds[0]));
        bottom += __builtin_popcountll(greater_bits(keys + i, bounds[3]) & ~over_bottom);
      }
      if (used + 64 > out.capacity) continue;
      const int64_t position = at - chunk.span.begin + i;
      int64_t slot = used;
      const auto append = [&] {
        const int bit = __builtin_ctzll(in | uint64_t{1} << 63);
        static_cast<K*>(out.keys)[slot] = keys[i + bit];
        out.positions[slot++] = static_cast<uint16_t>(position + bit);
        in &= in - 1;
      };
      // Mostly none to two of 64: two slots are written in any case, since branches that cannot be
      // foreseen would cost more.
      append();
      append();
      while (in != 0) append();
      used += found;
    }
  });
  chunk.above = above_top - top;
  chunk.top = top;
  chunk.inside = inside;
  chunk.bottom = bottom;
}

template <typename K>
void histogram(const TopkProblem& problem, const TopkSpan& span, int64_t lo, int64_t hi,
               int64_t (*bins)[kTopkBins + 1]) {
  for_each_block<K>(problem, span, [&](const K* keys, int64_t, int64_t n, bool) {
    add_to_bins(keys, n, static_cast<K>(lo), static_cast<K>(hi), bins);
  });
}

template <typename K>
void accept(const TopkProblem& problem, const TopkChunk& chunk, const TopkCandidates& candidates,
            int64_t key, int64_t& ties) {
  uint8_t* mask = problem.tensors[chunk.span.tensor].mask + chunk.span.begin;
  const K* keys = static_cast<const K*>(candidates.keys) + chunk.first;
  const uint16_t* positions = candidates.positions + chunk.first;
  for (int64_t i = 0; i < chunk.inside; ++i) {
    const bool tie = keys[i] == key && ties > 0;
    ties -= tie ? 1 : 0;
    mask[positions[i]] = keys[i] > key || tie ? 1 : 0;
  }
}

template <typename K>
void settle_ties(const TopkProblem& problem, const TopkSpan& span, K key, int64_t ties) {
  uint8_t* mask = problem.tensors[span.tensor].mask;
  for_each_block<K>(problem, span, [&](const K* keys, int64_t at, int64_t n, bool) {
    for (int64_t i = 0; i < n; i += 64) {
      const uint64_t equal = greater_bits(keys + i, static_cast<K>(key - 1)) &
                             ~greater_bits(keys + i, key);
      if (equal == 0) continue;
      uint64_t kept = equal;
      int64_t surplus = __builtin_popcountll(equal) - ties;
      for (; surplus > 0; --surplus) kept &= ~(uint64_t{1} << (63 - __builtin_clzll(kept)));
      ties -= __builtin_popcountll(kept);
      uint8_t is_equal[64], is_kept[64];
      write_bits(equal, 64, is_equal);
      write_bits(kept, 64, is_kept);
      uint8_t* m = mask + at + i;
      for (int64_t j = 0; j < (n - i < 64 ? n - i : 64); ++j) {
        m[j] = static_cast<uint8_t>((m[j] & ~is_equal[j]) | is_kept[j]);
      }
    }
  });
}

// Keys of `count` elements at the given offsets of one tensor.
template <typename T, typename S>
void gather(const void* from, const int64_t* offsets, int64_t count, T* out) {
  const S* p = static_cast<const S*>(from);
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(widen(p[offsets[i]]));
}

template <typename T>
void gather(DType dtype, const void* from, const int64_t* offsets, int64_t count, T* out) {
  switch (dtype) {
    case DType::f32:
      return gather<T, float>(from, offsets, count, out);
    case DType::f64:
      return gather<T, double>(from, offsets, count, out);
    case DType::bf16:
      return gather<T, BFloat16>(from, offsets, count, out);
    default:
      return gather<T, Float16>(from, offsets, count, out);
  }
}

template <typename T, typename K>
int64_t sample_keys(TopkScore score, const TopkTensor& t, const int64_t* offsets, int64_t count,
                    K* keys) {
  alignas(64) T a[kBlock], b[kBlock];
  gather(t.dtype, t.values, offsets, count, a);
  if (t.other != nullptr) gather(t.other_dtype, t.other, offsets, count, b);
  fuse_keys(score, a, t.other == nullptr ? a : b, count, keys);
  if (t.within == nullptr) return count;
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    keys[kept] = keys[i];
    kept += t.within[offsets[i]] != 0 ? 1 : 0;
  }
  return kept;
}

template <typename K>
int64_t sample(const TopkProblem& problem, const TopkChunk* chunks, int64_t n_chunks,
               int64_t elements, int64_t wanted, K* keys) {
  // Element i * step + (something below step): stratified, and no period of the data can hide.
  const int64_t step = elements / wanted > 0 ? elements / wanted : 1;
  int64_t offsets[kBlock], count = 0, found = 0, first = 0, i = 0;
  for (int64_t c = 0; c < n_chunks && i < wanted; ++c) {
    const TopkSpan& span = chunks[c].span;
    const TopkTensor& t = problem.tensors[span.tensor];
    const int64_t end = first + span.end - span.begin;
    while (i < wanted) {
      uint64_t hash = static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15u;
      hash = (hash ^ (hash >> 29)) * 0xbf58476d1ce4e5b9u;
      const int64_t at =
          i * step + static_cast<int64_t>((hash >> 33) % static_cast<uint64_t>(step));
      if (at < end) offsets[count++] = span.begin + at - first, ++i;
      const bool leave = at >= end || i == wanted;
      if (count == kBlock || (leave && count > 0)) {
        if constexpr (sizeof(K) == 8) {
          found += is_double(t)
                       ? sample_keys<double>(problem.score, t, offsets, count, keys + found)
                       : sample_keys<float>(problem.score, t, offsets, count, keys + found);
        } else {
          found += sample_keys<float>(problem.score, t, offsets, count, keys + found);
        }
        count = 0;
      }
      if (leave) break;
    }
    first = end;
  }
  return found;
}

constexpr int64_t round_up(int64_t n) { return (n + 63) / 64 * 64; }  // after padding

template <typename K>
TopkStatus direct(const TopkProblem& problem, const TopkSpan* spans, int64_t n_spans, int64_t k,
                  K* keys) {
  using Traits = KeyTraits<K>;
  int64_t total = 0;
  bool restricted = false;
  for (int64_t s = 0; s < n_spans; ++s) {
    const TopkTensor& t = problem.tensors[spans[s].tensor];
    restricted |= t.within != nullptr;
    for (int64_t at = spans[s].begin; at < spans[s].end; at += kBlock) {
      const int64_t n = spans[s].end - at < kBlock ? spans[s].end - at : kBlock;
      if (make_keys(problem.score, t, at, n, keys + total)) {
        return {TopkStatus::has_nan, s, 0};
      }
      total += n;  // the padding is overwritten by the next block
    }
  }
  pad(keys, total);
  const int64_t present = restricted ? count_greater(keys, total, Traits::lowest) : total;
  if (k > present) return {TopkStatus::too_few, 0, present};
  K bound = k == 0 ? Traits::highest : Traits::lowest;  // mask = key > bound, and some ties
  int64_t ties = 0;
  if (k > 0 && k < present) {
    const TopkThreshold t = select_key(keys, total, k, keys + round_up(total));
    const bool all = t.above + t.equal == k;
    bound = static_cast<K>(all ? t.key - 1 : t.key);
    ties = all ? 0 : k - t.above;
  }
  const K* key = keys;
  for (int64_t s = 0; s < n_spans; ++s) {
    const int64_t n = spans[s].end - spans[s].begin;
    uint8_t* mask = problem.tensors[spans[s].tensor].mask + spans[s].begin;
    for (int64_t i = 0; i < n; ++i) mask[i] = key[i] > bound ? 1 : 0;
    for (int64_t i = 0; i < n && ties > 0; ++i) {
      if (key[i] == bound) mask[i] = 1, --ties;
    }
    key += n;
  }
  return {TopkStatus::ok, 0, present};
}

template <TopkScore S, typename T>
void square_scores(const T* a, const T* b, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i) {
    const double score = fuse<S>(a[i], b[i]);
    out[i] = score * score;
  }
}

template <typename T>
void square_scores(TopkScore score, const TopkTensor& t, int64_t begin, int64_t n, double* out) {
  alignas(64) T buffer_a[kBlock], buffer_b[kBlock];
  const T* a = as_scores<T>(t.dtype, t.values, begin, n, buffer_a);
  const T* b = t.other == nullptr ? a : as_scores<T>(t.other_dtype, t.other, begin, n, buffer_b);
  switch (score) {
    case TopkScore::identity:
    case TopkScore::magnitude:
      return square_scores<TopkScore::identity>(a, a, n, out);
    case TopkScore::product:
    case TopkScore::saliency:
      return square_scores<TopkScore::product>(a, b, n, out);
    default:
      return square_scores<TopkScore::square>(a, a, n, out);
  }
}

// Apart from the squaring, and not inlined: a fused multiply-add would round differently where the
// squares of float64 scores are inexact.
__attribute__((noinline)) void add_lanes(const double* squares, int64_t n, double* lanes) {
  double sums[16];
  for (int j = 0; j < 16; ++j) sums[j] = lanes[j];
  for (int64_t i = 0; i < n; i += 16) {
    for (int j = 0; j < 16; ++j) sums[j] += squares[i + j];
  }
  for (int j = 0; j < 16; ++j) lanes[j] = sums[j];
}

}  // namespace

int64_t topk_count(const uint8_t* within, int64_t n) {
  int64_t total = 0;
  constexpr int64_t kRun = 1 << 16;  // counts of a run fit 32 bits: four times the lanes
  for (int64_t at = 0; at < n; at += kRun) {
    const int64_t end = n - at < kRun ? n : at + kRun;
    uint32_t count = 0;
    for (int64_t i = at; i < end; ++i) count += within[i] != 0 ? 1 : 0;
    total += count;
  }
  return total;
}

int64_t topk_sample(const TopkProblem& problem, const TopkChunk* chunks, int64_t n_chunks,
                    int64_t elements, int64_t wanted, void* keys) {
  return problem.wide ? sample(problem, chunks, n_chunks, elements, wanted,
                               static_cast<int64_t*>(keys))
                      : sample(problem, chunks, n_chunks, elements, wanted,
                               static_cast<int32_t*>(keys));
}

TopkThreshold topk_select(bool wide, void* keys, int64_t n, int64_t rank, void* scratch) {
  return wide ? select_key(static_cast<int64_t*>(keys), n, rank, static_cast<int64_t*>(scratch))
              : select_key(static_cast<int32_t*>(keys), n, rank, static_cast<int32_t*>(scratch));
}

void topk_filter(const TopkProblem& problem, TopkChunk* chunks, int64_t begin, int64_t end,
                 const TopkBracket& bracket, const TopkCandidates& candidates) {
  int64_t used = 0;
  for (int64_t c = begin; c < end; ++c) {
    problem.wide ? filter<int64_t>(problem, chunks[c], bracket, candidates, used)
                 : filter<int32_t>(problem, chunks[c], bracket, candidates, used);
  }
}

void topk_histogram(const TopkProblem& problem, const TopkChunk* chunks, int64_t begin,
                    int64_t end, int64_t lo, int64_t hi, int64_t* out) {
  int64_t bins[2][kTopkBins + 1] = {};
  for (int64_t c = begin; c < end; ++c) {
    problem.wide ? histogram<int64_t>(problem, chunks[c].span, lo, hi, bins)
                 : histogram<int32_t>(problem, chunks[c].span, lo, hi, bins);
  }
  for (int64_t b = 0; b < kTopkBins; ++b) out[b] += bins[0][b] + bins[1][b];
}

void topk_accept(const TopkProblem& problem, const TopkChunk* chunks, int64_t n_chunks,
                 const TopkCandidates& candidates, int64_t key, int64_t ties) {
  for (int64_t c = 0; c < n_chunks; ++c) {
    problem.wide ? accept<int64_t>(problem, chunks[c], candidates, key, ties)
                 : accept<int32_t>(problem, chunks[c], candidates, key, ties);
  }
}

void topk_settle_ties(const TopkProblem& problem, const TopkChunk& chunk, int64_t key,
                      int64_t ties) {
  problem.wide ? settle_ties<int64_t>(problem, chunk.span, key, ties)
               : settle_ties<int32_t>(problem, chunk.span, static_cast<int32_t>(key), ties);
}

int64_t topk_direct_scratch(bool wide, int64_t elements) {
  return (round_up(elements) + elements / 2 + 128) * (wide ? 8 : 4);
}

TopkStatus topk_direct(const TopkProblem& problem, const TopkSpan* spans, int64_t n_spans,
                       int64_t k, void* scratch) {
  return problem.wide ? direct(problem, spans, n_spans, k, static_cast<int64_t*>(scratch))
                      : direct(problem, spans, n_spans, k, static_cast<int32_t*>(scratch));
}

TopkStatus topk_rows(const TopkProblem& problem, int64_t tensor, int64_t cols, int64_t begin,
                     int64_t end, int64_t k, void* scratch) {
  for (int64_t r = begin; r < end; ++r) {
    const TopkSpan row{tensor, r * cols, (r + 1) * cols};
    TopkStatus status = topk_direct(problem, &row, 1, k, scratch);
    status.span = r;
    if (status.kind != TopkStatus::ok) return status;
  }
  return {TopkStatus::ok, 0, 0};
}

void topk_norms(const TopkProblem& problem, int64_t tensor, int64_t cols, int64_t begin,
                int64_t end, double* norms) {
  const TopkTensor& t = problem.tensors[tensor];
  alignas(64) double squares[kBlock];
  for (int64_t r = begin; r < end; ++r) {
    double lanes[16] = {};
    for (int64_t at = 0; at < cols; at += kBlock) {
      int64_t n = cols - at < kBlock ? cols - at : kBlock;
      is_double(t) ? square_scores<double>(problem.score, t, r * cols + at, n, squares)
                   : square_scores<float>(problem.score, t, r * cols + at, n, squares);
      for (; n % 16 != 0; ++n) squares[n] = 0.0;
      add_lanes(squares, n, lanes);
    }
    for (int half = 8; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    }
    norms[r] = __builtin_sqrt(lanes[0]);
  }
}

}  // namespace fastprune::FASTPRUNE_ISA
