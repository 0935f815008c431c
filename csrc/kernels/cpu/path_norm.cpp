#include "kernels/cpu/path_norm.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/cpu/reach_bits.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// Calls f(bit) for the set bits of a word, lowest first.
template <typename F>
inline void for_each_bit(uint64_t word, const F& f) {
  for (; word != 0; word &= word - 1) f(__builtin_ctzll(word));
}

// A row of the mask, or ones.
inline const uint64_t* mask_row(const uint64_t* mask, int64_t row, int64_t words,
                                const uint64_t* ones) {
  return mask == nullptr ? ones : mask + row * words;
}

void fill_ones(uint64_t* row, int64_t bits) {
  const int64_t words = words_of(bits);
  for (int64_t w = 0; w < words; ++w) row[w] = ~uint64_t{0};
  if (bits % 64 != 0) row[words - 1] = (uint64_t{1} << bits % 64) - 1;
}

// Clears the bits [begin, begin + n) of a row.
inline void clear_bits(uint64_t* row, int64_t begin, int64_t n) {
  for (int64_t i = begin; i < begin + n; ++i) row[i / 64] &= ~(uint64_t{1} << i % 64);
}

}  // namespace

void reach_pack(const uint8_t* mask, int64_t rows, int64_t cols, uint64_t* bits) {
  const int64_t words = words_of(cols);
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* from = mask + r * cols;
    uint64_t* to = bits + r * words;
    int64_t w = 0;
    for (; (w + 1) * 64 <= cols; ++w) to[w] = bits_of_bytes(from + 64 * w);
    if (w < words) {
      uint8_t rest[64] = {};
      std::memcpy(rest, from + 64 * w, static_cast<size_t>(cols - 64 * w));
      to[w] = bits_of_bytes(rest);
    }
  }
}

void reach_unpack(const uint64_t* bits, int64_t rows, int64_t cols, uint8_t* mask) {
  const int64_t words = words_of(cols);
  for (int64_t r = 0; r < rows; ++r) {
    const uint64_t* from = bits + r * words;
    uint8_t* to = mask + r * cols;
    int64_t w = 0;
    for (; (w + 1) * 64 <= cols; ++w) bytes_of_bits(from[w], to + 64 * w);
    if (w < words) {
      uint8_t rest[64];
      bytes_of_bits(from[w], rest);
      std::memcpy(to + 64 * w, rest, static_cast<size_t>(cols - 64 * w));
    }
  }
}

int64_t reach_count(const uint64_t* bits, int64_t words) {
  int64_t count = 0;
  for (int64_t w = 0; w < words; ++w) count += __builtin_popcountll(bits[w]);
  return count;
}

bool reach_merge(uint64_t* to, const uint64_t* from, int64_t words) {
  uint64_t fresh = 0;
  for (int64_t w = 0; w < words; ++w) {
    fresh |= from[w] & ~to[w];
    to[w] |= from[w];
  }
  return fresh != 0;
}

void reach_copy(const uint64_t* from, int64_t planes, int64_t bits, uint64_t* to, int64_t to_bits) {
  const int64_t words = words_of(bits), to_words = words_of(to_bits);
  int64_t at = 0;  // in the plane that `to` points to
  for (int64_t p = 0; p < planes; ++p) {
    for (int64_t w = 0; w < words; ++w) {
      uint64_t word = from[p * words + w];
      for (int64_t left = bits - 64 * w < 64 ? bits - 64 * w : 64; left > 0;) {
        const int64_t n = to_bits - at < left ? to_bits - at : left;
        const uint64_t some[1] = {n == 64 ? word : word & ((uint64_t{1} << n) - 1)};
        or_bits(to, at, some, n);
        word = n == 64 ? 0 : word >> n;
        left -= n;
        at += n;
        if (at == to_bits) {
          to += to_words;
          at = 0;
        }
      }
    }
  }
}

void reach_states(const uint64_t* map, int64_t planes, int64_t bits, uint8_t* states) {
  const int64_t words = words_of(bits);
  const uint64_t last = bits % 64 == 0 ? ~uint64_t{0} : (uint64_t{1} << bits % 64) - 1;
  for (int64_t p = 0; p < planes; ++p) {
    const uint64_t* plane = map + p * words;
    uint64_t any = 0, all = ~uint64_t{0};
    for (int64_t w = 0; w < words; ++w) {
      any |= plane[w];
      all &= w + 1 < words ? plane[w] : plane[w] | ~last;
    }
    states[p] = any == 0 ? kReachEmpty : (all == ~uint64_t{0} ? kReachFull : kReachPartial);
  }
}

void reach_taps(const ReachGeometry& g, const ReachTaps& taps, uint64_t* rows) {
  const Joiner join(g);
  const int64_t small_words = words_of(g.small_bits()), large_words = words_of(g.large_bits());
  std::memset(taps.small, 0, static_cast<size_t>(g.taps() * small_words) * 8);
  std::memset(taps.large, 0, static_cast<size_t>(g.taps() * large_words) * 8);
  std::memset(taps.all_small, 0, static_cast<size_t>(small_words) * 8);
  std::memset(taps.all_large, 0, static_cast<size_t>(large_words) * 8);
  for (int64_t t = 0; t < g.taps(); ++t) {
    uint64_t *small = taps.small + t * small_words, *large = taps.large + t * large_words;
    join.cover(t, small, large, rows);
    or_words(taps.all_small, small, small_words);
    or_words(taps.all_large, large, large_words);
  }
  for (int64_t t = 0; t < g.taps(); ++t) {
    taps.shift[t] = tap_shift(g, t);
    taps.joins[t] = any_word(taps.small + t * small_words, small_words);
  }
}

void reach_gather(const ReachGeometry& g, const ReachTaps& taps, const uint64_t* mask,
                  const uint64_t* large, const uint8_t* large_states, uint64_t* small,
                  uint64_t* scratch, int64_t begin, int64_t end) {
  const Joiner join(g);
  const int64_t words = words_of(g.cols()), n_taps = g.taps();
  const int64_t small_words = words_of(g.small_bits()), large_words = words_of(g.large_bits());
  if (mask == nullptr) fill_ones(scratch, g.cols());
  uint64_t* seen = scratch + words;  // taps that a full plane brought already
  const Divider by_taps(n_taps);
  for (int64_t o = begin; o < end; ++o) {
    const uint64_t* row = mask_row(mask, o, words, scratch);
    const int64_t first = o / (g.rows / g.groups) * g.depth;
    uint64_t* to = small + o * small_words;
    std::memset(to, 0, static_cast<size_t>(small_words) * 8);
    std::memset(seen, 0, static_cast<size_t>(words_of(n_taps)) * 8);
    bool saturated = false;
    for (int64_t c = first; mask == nullptr && c < first + g.depth && !saturated; ++c) {
      if (large_states[c] != kReachFull) continue;  // all taps of a full plane at once
      or_words(to, taps.all_small, small_words);
      saturated = true;
    }
    for (int64_t w = 0; w < words && !saturated; ++w) {
      for (uint64_t left = row[w]; left != 0 && !saturated; left &= left - 1) {
        const int64_t i = 64 * w + __builtin_ctzll(left), q = by_taps(i), t = i - q * n_taps;
        const int64_t c = first + q;
        if (large_states[c] == kReachEmpty) continue;
        if (large_states[c] == kReachFull) {
          if ((seen[t / 64] >> t % 64 & 1u) != 0) continue;
          seen[t / 64] |= uint64_t{1} << t % 64;
          saturated = or_until(to, taps.small + t * small_words, taps.all_small, small_words);
        } else {
          join.gather(t, taps.shift[t], taps.small + t * small_words, large + c * large_words, to);
          saturated = same_words(to, taps.all_small, small_words);
        }
      }
    }
  }
}

void reach_spread(const ReachGeometry& g, const ReachTaps& taps, const uint64_t* mask,
                  const uint64_t* small, const uint8_t* small_states, uint64_t* large,
                  uint64_t* scratch) {
  const Joiner join(g);
  const int64_t words = words_of(g.cols()), n_taps = g.taps();
  const int64_t small_words = words_of(g.small_bits()), large_words = words_of(g.large_bits());
  // Taps of planes that may still gain by a row, and the words in which there are any: of the rows,
  // the first few settle most.
  uint64_t *open = scratch, *at = scratch + words, *ones = scratch + 2 * words;
  fill_ones(ones, g.cols());
  const int64_t per_group = g.rows / g.groups;
  const Divider by_taps(n_taps);
  for (int64_t q = 0; q < g.groups; ++q) {
    std::memcpy(open, ones, static_cast<size_t>(words) * 8);
    int64_t n_open = words;
    for (int64_t w = 0; w < words; ++w) at[w] = static_cast<uint64_t>(w);
    for (int64_t o = q * per_group; o < (q + 1) * per_group && n_open > 0; ++o) {
      if (small_states[o] == kReachEmpty) continue;
      const bool full = small_states[o] == kReachFull;
      if (full && mask == nullptr) {  // all taps of all planes at once
        for (int64_t c = q * g.depth; c < (q + 1) * g.depth; ++c) {
          or_words(large + c * large_words, taps.all_large, large_words);
        }
        break;
      }
      const uint64_t* row = mask_row(mask, o, words, ones);
      int64_t kept = 0;
      for (int64_t k = 0; k < n_open; ++k) {
        const int64_t w = static_cast<int64_t>(at[k]);
        for (uint64_t left = row[w] & open[w]; left != 0; left &= (left - 1) & open[w]) {
          const int64_t i = 64 * w + __builtin_ctzll(left), c = by_taps(i), t = i - c * n_taps;
          uint64_t* to = large + (q * g.depth + c) * large_words;
          bool saturated = false;
          if (full) {
            open[w] &= ~(uint64_t{1} << i % 64);
            saturated = or_until(to, taps.large + t * large_words, taps.all_large, large_words);
          } else {
            join.spread(t, taps.shift[t], taps.small + t * small_words, small + o * small_words,
                        to);
            saturated = same_words(to, taps.all_large, large_words);
          }
          if (saturated) {
            clear_bits(open, c * n_taps, n_taps);
          }
        }
        at[kept] = at[k];
        kept += open[w] != 0;
      }
      n_open = kept;
    }
  }
}

int64_t reach_active(const ReachGeometry& g, const ReachTaps& taps, const uint64_t* mask,
                     const uint64_t* large, const uint8_t* large_states, const uint64_t* small,
                     const uint8_t* small_states, uint64_t* active, uint64_t* scratch) {
  const Joiner join(g);
  const int64_t words = words_of(g.cols()), n_taps = g.taps();
  const int64_t small_words = words_of(g.small_bits()), large_words = words_of(g.large_bits());
  uint64_t* ones = scratch + g.groups * words;
  fill_ones(ones, g.cols());
  // Weights that are active in a row whose plane is full.
  std::memset(scratch, 0, static_cast<size_t>(g.groups * words) * 8);
  for (int64_t c = 0; c < g.planes(); ++c) {
    if (large_states[c] == kReachEmpty) continue;
    uint64_t* live = scratch + c / g.depth * words;
    int64_t i = c % g.depth * n_taps;
    for (int64_t t = 0; t < n_taps; ++t, ++i) {
      const uint64_t* cover = taps.small + t * small_words;
      const bool any = large_states[c] == kReachFull
                           ? taps.joins[t] != 0
                           : join.meets(t, taps.shift[t], cover, large + c * large_words, nullptr);
      if (any) live[i / 64] |= uint64_t{1} << i % 64;
    }
  }
  int64_t count = 0;
  for (int64_t o = 0; o < g.rows; ++o) {
    if (small_states[o] == kReachEmpty) continue;
    const int64_t q = o / (g.rows / g.groups);
    const uint64_t *row = mask_row(mask, o, words, ones), *live = scratch + q * words;
    uint64_t* out = active == nullptr ? nullptr : active + o * words;
    if (small_states[o] == kReachFull) {
      for (int64_t w = 0; w < words; ++w) {
        const uint64_t on = row[w] & live[w];
        count += __builtin_popcountll(on);
        if (out != nullptr) out[w] |= on;
      }
      continue;
    }
    const uint64_t* at = small + o * small_words;
    for (int64_t w = 0; w < words; ++w) {
      for_each_bit(row[w] & live[w], [&](int b) {
        const int64_t i = 64 * w + b, c = q * g.depth + i / n_taps, t = i % n_taps;
        const uint64_t* cover = taps.small + t * small_words;
        const bool on = large_states[c] == kReachFull
                            ? meet_words(cover, at, small_words)
                            : join.meets(t, taps.shift[t], cover, large + c * large_words, at);
        count += on;
        if (on && out != nullptr) out[w] |= uint64_t{1} << b;
      });
    }
  }
  return count;
}

namespace {

// Whether all planes are the same: tokens usually are, and one stands for all.
bool all_alike(const uint64_t* map, int64_t planes, int64_t words) {
  for (int64_t p = 1; p < planes; ++p) {
    if (!same_words(map, map + p * words, words)) return false;
  }
  return true;
}

}  // namespace

void reach_linear(const uint64_t* mask, int64_t rows, int64_t cols, int64_t tokens,
                  const uint64_t* in, uint64_t* out) {
  const int64_t words = words_of(cols), out_words = words_of(rows);
  const int64_t kinds = tokens > 0 && all_alike(in, tokens, words) ? 1 : tokens;
  std::memset(out, 0, static_cast<size_t>(tokens * out_words) * 8);
  for (int64_t k = 0; k < kinds; ++k) {
    const uint64_t* from = in + k * words;
    if (mask == nullptr) {
      if (any_word(from, words)) fill_ones(out + k * out_words, rows);
      continue;
    }
    for (int64_t o = 0; o < rows; ++o) {
      if (meet_words(mask + o * words, from, words)) {
        out[k * out_words + o / 64] |= uint64_t{1} << o % 64;
      }
    }
  }
  for (int64_t k = kinds; k < tokens; ++k) {
    std::memcpy(out + k * out_words, out, static_cast<size_t>(out_words) * 8);
  }
}

void reach_linear_back(const uint64_t* mask, int64_t rows, int64_t cols, int64_t tokens,
                       const uint64_t* out, uint64_t* in) {
  const int64_t words = words_of(cols), out_words = words_of(rows);
  const int64_t kinds = tokens > 0 && all_alike(out, tokens, out_words) ? 1 : tokens;
  std::memset(in, 0, static_cast<size_t>(tokens * words) * 8);
  for (int64_t k = 0; k < kinds; ++k) {
    uint64_t* to = in + k * words;
    for (int64_t w = 0; w < out_words; ++w) {
      for_each_bit(out[k * out_words + w], [&](int b) {
        if (mask != nullptr) or_words(to, mask + (64 * w + b) * words, words);
      });
    }
    if (mask == nullptr && any_word(out + k * out_words, out_words)) fill_ones(to, cols);
  }
  for (int64_t k = kinds; k < tokens; ++k) {
    std::memcpy(in + k * words, in, static_cast<size_t>(words) * 8);
  }
}

int64_t reach_linear_active(const uint64_t* mask, int64_t rows, int64_t cols, int64_t tokens,
                            const uint64_t* in, const uint64_t* out, uint64_t* active,
                            uint64_t* scratch) {
  const int64_t words = words_of(cols), out_words = words_of(rows);
  const bool alike = tokens > 0 && all_alike(in, tokens, words);
  uint64_t* live = scratch;
  uint64_t* ones = scratch + words;
  fill_ones(ones, cols);
  int64_t count = 0;
  for (int64_t o = 0; o < rows; ++o) {
    // The inputs of all tokens at which the row's output matters.
    std::memset(live, 0, static_cast<size_t>(words) * 8);
    for (int64_t k = 0; k < tokens; ++k) {
      if ((out[k * out_words + o / 64] >> o % 64 & 1u) == 0) continue;
      or_words(live, in + k * words, words);
      if (alike) break;
    }
    const uint64_t* row = mask_row(mask, o, words, ones);
    for (int64_t w = 0; w < words; ++w) {
      const uint64_t on = row[w] & live[w];
      count += __builtin_popcountll(on);
      if (active != nullptr) active[o * words + w] |= on;
    }
  }
  return count;
}

}  // namespace fastprune::FASTPRUNE_ISA
