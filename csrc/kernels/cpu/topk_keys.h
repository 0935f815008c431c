// The integer keys of global_topk_mask: made from the scores a block at a time, compared 64 at a
// time, ranked in memory.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels/cpu/global_topk_mask.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/topk_factors.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastprune::FASTPRUNE_ISA {
namespace {

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

// The bits of signed scores become keys in their order. V is K, or a vector of it.
template <typename K, typename V>
inline V ordered(V key) {
  const V sign = key >> (8 * sizeof(K) - 1), magnitude = key & KeyTraits<K>::highest;
  key ^= sign & KeyTraits<K>::highest;
  key = key == -1 ? key + 1 : key;  // only -0 maps to -1
  const V highest = (key | KeyTraits<K>::highest) & KeyTraits<K>::highest;
  return magnitude > KeyTraits<K>::infinity ? highest : key;
}

// Turns the bits of n signed scores into keys, in place; returns the largest.
template <typename K>
K order_keys(K* keys, int64_t n) {
  Vec<K> most = broadcast(KeyTraits<K>::lowest);
  int64_t i = 0;
  for (; i + kLanes<K> <= n; i += kLanes<K>) {
    const Vec<K> v = ordered<K>(load(keys + i));
    store(keys + i, v);
    most = v > most ? v : most;
  }
  K largest = KeyTraits<K>::lowest;
  for (int j = 0; j < kLanes<K>; ++j) largest = most[j] > largest ? most[j] : largest;
  for (; i < n; ++i) {
    keys[i] = ordered<K>(keys[i]);
    largest = keys[i] > largest ? keys[i] : largest;
  }
  return largest;
}

// T is the type that scores are computed in; keys may be wider. Returns the largest key.
template <TopkScore S, typename T, typename K>
K fuse_keys(const T* a, const T* b, int64_t n, K* keys) {
  using Traits = KeyTraits<K>;
  K largest = Traits::lowest;
  for (int64_t i = 0; i < n; ++i) {
    const typename Traits::Score score = fuse<S>(a[i], b[i]);
    K key;
    std::memcpy(&key, &score, sizeof(K));
    if constexpr (!kSigned<S>) {
      key &= Traits::highest;
      largest = key > largest ? key : largest;
    }
    keys[i] = key;
  }
  return kSigned<S> ? order_keys(keys, n) : largest;
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
    case TopkScore::square:
      return fuse_keys<TopkScore::square>(a, a, n, keys);
    case TopkScore::noise:
      break;
  }
  return fuse_keys<TopkScore::magnitude>(a, a, n, keys);  // noise is not negative
}

// The score of a block, as it is ranked but for the sign of those that drop theirs.
template <typename T>
void fuse_scores(TopkScore score, const T* a, const T* b, int64_t n, T* out) {
  switch (score) {
    case TopkScore::product:
    case TopkScore::saliency:
      for (int64_t i = 0; i < n; ++i) out[i] = fuse<TopkScore::product>(a[i], b[i]);
      return;
    case TopkScore::square:
      for (int64_t i = 0; i < n; ++i) out[i] = fuse<TopkScore::square>(a[i], a[i]);
      return;
    default:
      std::memcpy(out, a, static_cast<size_t>(n) * sizeof(T));
  }
}

// Keys of n <= kBlock scores times `scale`, rounded to T once more.
template <typename T, typename K>
K scaled_keys(TopkScore score, const T* a, const T* b, T scale, int64_t n, K* keys) {
  alignas(64) T scores[kBlock];
  fuse_scores(score, a, b, n, scores);
  if (score == TopkScore::magnitude || score == TopkScore::saliency) {
    for (int64_t i = 0; i < n; ++i) scores[i] = std::fabs(scores[i]) * scale;
  } else {
    for (int64_t i = 0; i < n; ++i) scores[i] *= scale;
  }
  return fuse_keys<TopkScore::identity>(scores, scores, n, keys);
}

template <typename T, typename K>
K keys_through(const TopkProblem& problem, const TopkTensor& t, int64_t begin, int64_t n, K* keys) {
  alignas(64) T buffer_a[kBlock], buffer_b[kBlock];
  const T* a = first_factor(problem, t, begin, n, buffer_a);
  const T* b = second_factor(t, begin, n, a, buffer_b);
  return problem.scaled ? scaled_keys(problem.score, a, b, static_cast<T>(t.scale), n, keys)
                        : fuse_keys(problem.score, a, b, n, keys);
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
bool make_keys(const TopkProblem& problem, const TopkTensor& t, int64_t begin, int64_t n, K* keys) {
  using Traits = KeyTraits<K>;
  K largest;
  if constexpr (sizeof(K) == 8) {
    largest = is_double(problem, t) ? keys_through<double>(problem, t, begin, n, keys)
                                    : keys_through<float>(problem, t, begin, n, keys);
  } else {
    largest = keys_through<float>(problem, t, begin, n, keys);
  }
  for (int64_t i = n; i % 64 != 0; ++i) keys[i] = Traits::lowest;
  if (t.within == nullptr) return largest > Traits::infinity;
  restrict_keys(t.within + begin, n, keys);
  return largest > Traits::infinity && largest_key(keys, n) > Traits::infinity;
}

// The scores that keys stand for; -0 became +0. Keys of scores without a sign are not negative.
template <typename K, typename V>
inline V score_bits(V key) {
  return key ^ ((key >> (8 * sizeof(K) - 1)) & KeyTraits<K>::highest);
}

template <typename K>
inline double score_of(K key) {
  key = score_bits<K>(key);
  typename KeyTraits<K>::Score score;
  std::memcpy(&score, &key, sizeof(K));
  return score;
}

// ---- 64 keys at a time --------------------------------------------------------------------------

// Bit i of the result: keys[i] > bound.
inline uint64_t greater_bits(const int32_t* keys, int32_t bound) {
  uint64_t bits = 0;
#if defined(__AVX512F__)
  const __m512i limit = _mm512_set1_epi32(bound);
  __mmask16 part[4];
  for (int i = 0; i < 4; ++i) {
    part[i] = _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(keys + 16 * i), limit);
  }
  bits = _mm512_kunpackd(_mm512_kunpackw(part[3], part[2]), _mm512_kunpackw(part[1], part[0]));
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

// The mask of elements [at, at + n), n <= 64, of a tensor.
inline void put_mask(bool packed, uint64_t bits, int64_t at, int64_t n, uint8_t* mask) {
  if (packed && n == 64) {
    std::memcpy(mask + at / 8, &bits, 8);
  } else if (packed) {
    std::memcpy(mask + at / 8, &bits, static_cast<size_t>((n + 7) / 8));
  } else {
    write_bits(bits, n, mask + at);
  }
}

inline void put_mask(bool packed, bool kept, int64_t at, uint8_t* mask) {
  if (!packed) {
    mask[at] = kept ? 1 : 0;
    return;
  }
  const uint8_t bit = static_cast<uint8_t>(1u << (at % 8));
  mask[at / 8] = static_cast<uint8_t>((mask[at / 8] & ~bit) | (kept ? bit : 0));
}

template <typename K, typename F>
inline void for_each_block(const TopkProblem& problem, const TopkSpan& span, F f) {
  alignas(64) K keys[kBlock];
  for (int64_t at = span.begin; at < span.end; at += kBlock) {
    const int64_t n = span.end - at < kBlock ? span.end - at : kBlock;
    const bool nan = make_keys(problem, problem.tensors[span.tensor], at, n, keys);
    f(keys, at, n, nan);
  }
}

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

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
