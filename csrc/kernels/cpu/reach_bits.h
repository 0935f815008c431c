// Words of bits, and how a tap of a convolution moves a plane of them (path_norm.h). Unnamed: each
// translation unit, hence each ISA, keeps its own copy.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/cpu/reach_positions.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

inline void or_words(uint64_t* to, const uint64_t* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] |= from[i];
}
// to |= from; whether that makes it the same as `all`.
inline bool or_until(uint64_t* to, const uint64_t* from, const uint64_t* all, int64_t n) {
  uint64_t missing = 0;
  for (int64_t i = 0; i < n; ++i) {
    to[i] |= from[i];
    missing |= to[i] ^ all[i];
  }
  return missing == 0;
}
inline bool same_words(const uint64_t* a, const uint64_t* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}
inline bool any_word(const uint64_t* a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (a[i] != 0) return true;
  }
  return false;
}
inline bool meet_words(const uint64_t* a, const uint64_t* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if ((a[i] & b[i]) != 0) return true;
  }
  return false;
}

// Bit i is byte i != 0.
inline uint64_t bits_of_bytes(const uint8_t* bytes) {
#if defined(__AVX512BW__)
  const __m512i v = _mm512_loadu_si512(bytes);
  return _mm512_test_epi8_mask(v, v);
#else
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t eight;
    std::memcpy(&eight, bytes + 8 * i, 8);
    // Bytes are 0 or 1: the multiplication gathers their lowest bits in the topmost byte.
    bits |= (eight * 0x0102040810204080u >> 56) << (8 * i);
  }
  return bits;
#endif
}
inline void bytes_of_bits(uint64_t bits, uint8_t* bytes) {
#if defined(__AVX512BW__)
  _mm512_storeu_si512(bytes, _mm512_maskz_set1_epi8(bits, 1));
#else
  for (int i = 0; i < 64; ++i) bytes[i] = static_cast<uint8_t>(bits >> i & 1u);
#endif
}

// to |= n bits, from bit `at` of `to` on.
inline void or_bits(uint64_t* to, int64_t at, const uint64_t* bits, int64_t n) {
  const int64_t by = at % 64;
  to += at / 64;
  for (int64_t w = 0; w * 64 < n; ++w) {
    to[w] |= bits[w] << by;
    if (by != 0 && (bits[w] >> (64 - by)) != 0) to[w + 1] |= bits[w] >> (64 - by);
  }
}

// i / divisor for 0 <= i, divisor < 2^32 by a multiplication.
class Divider {
 public:
  explicit Divider(int64_t divisor)
      : one_(divisor == 1), reciprocal_(~uint64_t{0} / static_cast<uint64_t>(divisor) + 1) {}
  int64_t operator()(int64_t i) const {
    const unsigned __int128 product =
        static_cast<unsigned __int128>(static_cast<uint64_t>(i)) * reciprocal_;
    return one_ ? i : static_cast<int64_t>(product >> 64);
  }

 private:
  bool one_;
  uint64_t reciprocal_;
};

inline uint64_t lowest(uint64_t bits, int64_t n) {
  return n >= 64 ? bits : bits & ((uint64_t{1} << n) - 1);
}
// The even bits of a word, together; and back.
inline uint64_t compress_even(uint64_t x) {
  x &= 0x5555555555555555u;
  x = (x | x >> 1) & 0x3333333333333333u;
  x = (x | x >> 2) & 0x0f0f0f0f0f0f0f0fu;
  x = (x | x >> 4) & 0x00ff00ff00ff00ffu;
  x = (x | x >> 8) & 0x0000ffff0000ffffu;
  return (x | x >> 16) & 0x00000000ffffffffu;
}
inline uint64_t expand_even(uint64_t x) {
  x = (x | x << 16) & 0x0000ffff0000ffffu;
  x = (x | x << 8) & 0x00ff00ff00ff00ffu;
  x = (x | x << 4) & 0x0f0f0f0f0f0f0f0fu;
  x = (x | x << 2) & 0x3333333333333333u;
  return (x | x << 1) & 0x5555555555555555u;
}

inline void set_bit(uint64_t* plane, int64_t i) { plane[i / 64] |= uint64_t{1} << i % 64; }

// How the taps of a geometry move planes: in one shift where they can, otherwise row by row, at
// strides above 2 one position at a time.
class Joiner {
 public:
  explicit Joiner(const ReachGeometry& g)
      : g_(g),
        small_words_(words_of(g.small_bits())),
        large_words_(words_of(g.large_bits())),
        step_(g.stride[2]),
        flat_(taps_shift(g)) {}

  // Sets, in planes of zeros, the small positions that tap t joins to something, and what they are
  // joined to. rows: two rows of zeros, words_of(small[2]) and words_of(large[2]) words, that are
  // zeros again afterwards.
  void cover(int64_t t, uint64_t* small, uint64_t* large, uint64_t* rows) const {
    int64_t start[3], from[3], to[3];
    tap_start(g_, t, start);
    for (int i = 0; i < 3; ++i) {
      inside(start[i], g_.stride[i], g_.large[i], g_.small[i], &from[i], &to[i]);
    }
    uint64_t *small_row = rows, *large_row = rows + words_of(g_.small[2]);
    for (int64_t x = from[2]; x < to[2]; ++x) {
      set_bit(small_row, x);
      set_bit(large_row, start[2] + x * g_.stride[2]);
    }
    for (int64_t z = from[0]; z < to[0]; ++z) {
      const int64_t lz = z * g_.stride[0] + start[0];
      for (int64_t y = from[1]; y < to[1]; ++y) {
        const int64_t ly = y * g_.stride[1] + start[1];
        or_bits(small, (z * g_.small[1] + y) * g_.small[2], small_row, g_.small[2]);
        or_bits(large, (lz * g_.large[1] + ly) * g_.large[2], large_row, g_.large[2]);
      }
    }
    std::memset(rows, 0, static_cast<size_t>(words_of(g_.small[2]) + words_of(g_.large[2])) * 8);
  }

  // to |= the large plane as tap t, which moves it by `shift`, brings it to the small side.
  void gather(int64_t t, int64_t shift, const uint64_t* cover, const uint64_t* large,
              uint64_t* to) const {
    if (flat_) {
      const int64_t by = shift & 63, first = shift >> 6;
      // Where both words are inside, without questions; the rest with.
      const int64_t begin = first < 0 ? (-first < small_words_ ? -first : small_words_) : 0;
      int64_t end = large_words_ - 1 - first;
      end = end < begin ? begin : end > small_words_ ? small_words_ : end;
      for (int64_t w = 0; w < begin; ++w) {
        to[w] |= cover[w] & word_at(large, large_words_, 64 * w + shift);
      }
      const uint64_t* from = large + first;
      for (int64_t w = begin; w < end; ++w) {
        to[w] |= cover[w] & (from[w] >> by | from[w + 1] << 1 << (63 - by));
      }
      for (int64_t w = end; w < small_words_; ++w) {
        to[w] |= cover[w] & word_at(large, large_words_, 64 * w + shift);
      }
      return;
    }
    each_run(t, [&](int64_t s, int64_t l, int64_t n) {
      const uint64_t bits[1] = {large_bits(large, l, n)};
      or_bits(to, s, bits, n);
      return false;
    });
  }

  // to |= the small plane as tap t, which moves it by -shift, brings it to the large side.
  void spread(int64_t t, int64_t shift, const uint64_t* cover, const uint64_t* small,
              uint64_t* to) const {
    if (flat_) {
      const int64_t by = shift & 63, first = shift >> 6;
      uint64_t carried = 0;  // what of the word before belongs to this one
      for (int64_t w = 0; w < small_words_; ++w) {
        const uint64_t bits = cover[w] & small[w];
        // Bits that count stay inside the plane.
        if (w + first >= 0 && w + first < large_words_) to[w + first] |= bits << by | carried;
        carried = bits >> 1 >> (63 - by);
      }
      if (carried != 0) to[small_words_ + first] |= carried;
      return;
    }
    each_run(t, [&](int64_t s, int64_t l, int64_t n) {
      const uint64_t bits = lowest(word_at(small, small_words_, s), n);
      if (step_ <= 2) {
        const uint64_t spaced[1] = {step_ == 1 ? bits : expand_even(bits)};
        or_bits(to, l, spaced, step_ * (n - 1) + 1);
      } else if (bits != 0) {
        set_bit(to, l);
      }
      return false;
    });
  }

  // Whether tap t joins a set large position to a set small one (null: to any).
  bool meets(int64_t t, int64_t shift, const uint64_t* cover, const uint64_t* large,
             const uint64_t* small) const {
    if (flat_) {
      for (int64_t w = 0; w < small_words_; ++w) {
        const uint64_t wanted = small == nullptr ? cover[w] : cover[w] & small[w];
        if (wanted != 0 && (wanted & word_at(large, large_words_, 64 * w + shift)) != 0)
          return true;
      }
      return false;
    }
    return each_run(t, [&](int64_t s, int64_t l, int64_t n) {
      const uint64_t wanted = small == nullptr ? ~uint64_t{0} : word_at(small, small_words_, s);
      return (large_bits(large, l, n) & wanted) != 0;
    });
  }

 private:
  // The small coordinates in [*from, *to) that stay inside the large side.
  static void inside(int64_t start, int64_t stride, int64_t large, int64_t small, int64_t* from,
                     int64_t* to) {
    *from = start >= 0 ? 0 : (-start + stride - 1) / stride;
    const int64_t end = start >= large ? 0 : (large - 1 - start) / stride + 1;
    *to = end < small ? end : small;
  }
  // n bits of a large plane, from position l on, a stride apart.
  uint64_t large_bits(const uint64_t* large, int64_t l, int64_t n) const {
    const uint64_t word = word_at(large, large_words_, l);
    return lowest(step_ == 2 ? compress_even(word) : word, n);
  }
  // f(small position, large position, n) for the runs of neighbouring small positions that tap t
  // joins to large ones a stride apart, as many as a word holds, until it returns true.
  template <typename F>
  bool each_run(int64_t t, const F& f) const {
    int64_t start[3], from[3], to[3];
    tap_start(g_, t, start);
    for (int i = 0; i < 3; ++i) {
      inside(start[i], g_.stride[i], g_.large[i], g_.small[i], &from[i], &to[i]);
    }
    const int64_t most = step_ == 1 ? 64 : step_ == 2 ? 32 : 1;
    for (int64_t z = from[0]; z < to[0]; ++z) {
      const int64_t lz = z * g_.stride[0] + start[0];
      for (int64_t y = from[1]; y < to[1]; ++y) {
        const int64_t ly = y * g_.stride[1] + start[1];
        const int64_t s = (z * g_.small[1] + y) * g_.small[2];
        const int64_t l = (lz * g_.large[1] + ly) * g_.large[2] + start[2];
        for (int64_t x = from[2]; x < to[2]; x += most) {
          const int64_t n = to[2] - x < most ? to[2] - x : most;
          if (f(s + x, l + x * step_, n)) return true;
        }
      }
    }
    return false;
  }

  const ReachGeometry& g_;
  const int64_t small_words_, large_words_, step_;
  const bool flat_;
};

}  // namespace
}  // namespace fastprune::FASTPRUNE_ISA
