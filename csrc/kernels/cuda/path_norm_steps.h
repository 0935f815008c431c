// What one warp does for a step of path_norm.h: run_unit(), for units [0, units_of(step)).
//
// Planes are cut into chunks of 32 words. A chunk's words are dealt to the lanes of a team, and a
// warp holds as many teams as fit: of planes of one word, 32 teams go through 32 contributions at a
// time; of large planes, one team goes through them one by one. Either stops as soon as the chunk
// holds all that can come, which is soon in all but the sparsest networks.
#pragma once

#include "kernels/cuda/path_norm_words.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

// Items are words of the row of the mask.
__device__ __forceinline__ bool gather(const ReachStep& s, int64_t unit, const Slice& slice) {
  const ReachGeometry& g = s.geometry;
  const int64_t words = words_of(s.to.bits), items = words_of(s.mask.bits), taps = g.taps();
  const Chunk at(unit, words);
  const int64_t first = divide(at.plane, g.rows / g.groups).quotient * g.depth;
  const auto bits = [&](int64_t item) { return mask_word(s.mask, at.plane, item); };
  const auto value = [&](int64_t item, int b) -> uint64_t {
    const Divided i = divide(64 * item + b, taps);
    const int64_t plane = first + i.quotient;
    if (s.states[plane] == kReachEmpty || !at.inside) return 0;
    const uint64_t cover = s.covers.small[i.rest * words + at.word];
    return s.states[plane] == kReachFull ? cover
                                         : from_large(g, i.rest, cover, plane_of(s.from, plane),
                                                      words_of(s.from.bits), at.word);
  };
  const uint64_t all = at.inside ? s.covers.all_small[at.word] : 0;
  const uint64_t got = at.inside ? plane_of(s.to, at.plane)[at.word] : 0;
  return at.put(s.to, unite(at.team, slice.begin(items), slice.end(items), got, all, bits, value));
}

// Items are rows of the plane's group, times words of the taps between it and them.
__device__ __forceinline__ bool spread(const ReachStep& s, int64_t unit, const Slice& slice) {
  const ReachGeometry& g = s.geometry;
  const int64_t words = words_of(s.to.bits), taps = g.taps(), parts = words_of(taps);
  const int64_t rows = g.rows / g.groups, items = rows * parts;
  const Chunk at(unit, words);
  const Divided place = divide(at.plane, g.depth);
  const int64_t first = place.quotient * rows, column = place.rest * taps;
  const auto bits = [&](int64_t item) -> uint64_t {
    const Divided i = divide(item, parts);
    if (s.states[first + i.quotient] == kReachEmpty) return 0;
    const uint64_t some = low_bits(taps - 64 * i.rest);
    if (s.mask.words == nullptr) return some;
    return some & word_at(plane_of(s.mask, first + i.quotient), words_of(s.mask.bits),
                          column + 64 * i.rest);
  };
  const auto value = [&](int64_t item, int b) -> uint64_t {
    const Divided i = divide(item, parts);
    const int64_t row = first + i.quotient, t = 64 * i.rest + b;
    if (!at.inside) return 0;
    return s.states[row] == kReachFull ? s.covers.large[t * words + at.word]
                                       : from_small(g, s.covers, t, plane_of(s.from, row),
                                                    words_of(s.from.bits), words, at.word);
  };
  const uint64_t all = at.inside ? s.covers.all_large[at.word] : 0;
  const uint64_t got = at.inside ? plane_of(s.to, at.plane)[at.word] : 0;
  return at.put(s.to, unite(at.team, slice.begin(items), slice.end(items), got, all, bits, value));
}

// A team per output of a token: does its row of the mask meet the token's inputs?
__device__ __forceinline__ bool linear(const ReachStep& s, int64_t unit) {
  const int64_t rows = s.to.bits, words = words_of(s.from.bits);
  const Team team(words);
  const Divided place = divide(unit, (rows + team.count - 1) / team.count);
  const int64_t token = place.quotient, row = place.rest * team.count + team.number;
  const uint64_t* in = plane_of(s.from, token);
  bool met = false;
  for (int64_t base = 0; base < words && !met; base += team.lanes) {
    const int64_t w = base + team.lane;
    const bool hit = row < rows && w < words && (mask_word(s.mask, row, w) & in[w]) != 0;
    const unsigned votes = __ballot_sync(kAllLanes, hit) >> (team.number * team.lanes);
    met = (votes & static_cast<unsigned>(low_bits(team.lanes))) != 0;
    if (team.count > 1) break;  // one round is all: teams of less than a warp span the words
  }
  // Rows of a warp lie in one word, since they are a power of two and start at a multiple of it.
  const uint64_t bits = warp_or(met ? uint64_t{1} << row % 64 : 0);
  const bool writes = team.number == 0 && team.lane == 0;
  return writes && bits != 0 && gain(plane_of(s.to, token) + row / 64, bits);
}

// Items are words of the token's outputs.
__device__ __forceinline__ bool linear_back(const ReachStep& s, int64_t unit, const Slice& slice) {
  const int64_t items = words_of(s.from.bits);
  const Chunk at(unit, words_of(s.to.bits));
  const auto bits = [&](int64_t item) { return plane_of(s.from, at.plane)[item]; };
  const auto value = [&](int64_t item, int b) -> uint64_t {
    return at.inside ? mask_word(s.mask, 64 * item + b, at.word) : 0;
  };
  const uint64_t all = at.inside ? low_bits(s.to.bits - 64 * at.word) : 0;
  const uint64_t got = at.inside ? plane_of(s.to, at.plane)[at.word] : 0;
  return at.put(s.to, unite(at.team, slice.begin(items), slice.end(items), got, all, bits, value));
}

// Items are tokens: of those at which the row's output matters, the inputs.
__device__ __forceinline__ bool linear_active(const ReachStep& s, int64_t unit,
                                              const Slice& slice) {
  const int64_t items = s.from.planes;
  const Chunk at(unit, words_of(s.to.bits));
  const auto bits = [&](int64_t item) -> uint64_t {
    return bit_of(plane_of(s.other, item), at.plane) ? 1 : 0;
  };
  const uint64_t all = at.inside ? mask_word(s.mask, at.plane, at.word) : 0;
  const auto value = [&](int64_t item, int) -> uint64_t {
    return at.inside ? all & plane_of(s.from, item)[at.word] : 0;
  };
  const uint64_t got = at.inside ? plane_of(s.to, at.plane)[at.word] : 0;
  return at.put(s.to, unite(at.team, slice.begin(items), slice.end(items), got, all, bits, value));
}

// A word of the mask per warp. Weights between planes that are full or empty are settled by their
// lanes; the others by a team each, over the words of the small plane.
__device__ __forceinline__ bool conv_active(const ReachStep& s, int64_t unit) {
  const ReachGeometry& g = s.geometry;
  const int64_t taps = g.taps(), words = words_of(s.other.bits);
  const Divided place = divide(unit, words_of(s.mask.bits));
  const int64_t row = place.quotient, word = place.rest;
  const uint64_t weights = mask_word(s.mask, row, word);
  const uint8_t state = s.more_states[row];
  if (weights == 0 || state == kReachEmpty) return false;
  const int64_t first = divide(row, g.rows / g.groups).quotient * g.depth;
  const int me = static_cast<int>(threadIdx.x & 31u);
  uint64_t active = 0, open = 0;
  for (int half = 0; half < 2; ++half) {
    const int b = 32 * half + me;
    const bool kept = (weights >> b & 1u) != 0;
    const Divided i = divide(64 * word + b, taps);
    const uint8_t other = kept ? s.states[first + i.quotient] : uint8_t{kReachEmpty};
    const bool both = state == kReachFull && other == kReachFull;
    const uint64_t on = __ballot_sync(kAllLanes, both && bit_of(s.covers.some, i.rest));
    const uint64_t unsettled = __ballot_sync(kAllLanes, other != kReachEmpty && !both);
    active |= on << (32 * half);
    open |= unsettled << (32 * half);
  }
  const Team team(words);
  uint64_t found = 0;
  // Bits are dealt to teams in turn.
  for (int base = 0; base < 64; base += team.count) {
    if ((open >> base & low_bits(team.count)) == 0) continue;
    const int b = base + team.number;
    const bool mine = (open >> b & 1u) != 0;
    const Divided i = divide(64 * word + b, taps);
    const int64_t plane = first + i.quotient;
    for (int64_t from = 0; from < words; from += team.lanes) {
      const int64_t w = from + team.lane;
      bool hit = false;
      if (mine && w < words) {
        uint64_t wanted = s.covers.small[i.rest * words + w];
        if (state != kReachFull) wanted &= plane_of(s.other, row)[w];
        if (s.states[plane] != kReachFull) {
          wanted = from_large(g, i.rest, wanted, plane_of(s.from, plane), words_of(s.from.bits), w);
        }
        hit = wanted != 0;
      }
      if (hit) found |= uint64_t{1} << b;
      if (team.count == 1 && __any_sync(kAllLanes, hit)) break;
    }
  }
  active |= warp_or(found);
  return me == 0 && gain(plane_of(s.to, row) + word, active);
}

__device__ __forceinline__ void states(const ReachStep& s, int64_t plane) {
  const int64_t words = words_of(s.from.bits);
  const int me = static_cast<int>(threadIdx.x & 31u);
  bool any = false, all = true;
  for (int64_t w = me; w < words; w += 32) {
    const uint64_t word = plane_of(s.from, plane)[w];
    any = any || word != 0;
    all = all && word == low_bits(s.from.bits - 64 * w);
  }
  any = __any_sync(kAllLanes, any) != 0;
  all = __all_sync(kAllLanes, all) != 0;
  if (me == 0) s.states[plane] = !any ? kReachEmpty : (all ? kReachFull : kReachPartial);
}

// 64 elements from `element` on, as another map holds them.
__device__ __forceinline__ uint64_t elements_at(const ReachMap& from, int64_t element, int64_t n) {
  const int64_t words = words_of(from.bits);
  uint64_t found = 0;
  for (int64_t done = 0; done < n;) {
    const Divided at = divide(element + done, from.bits);
    const int64_t here = min(n - done, from.bits - at.rest);
    found |= (word_at(from.words + at.quotient * words, words, at.rest) & low_bits(here)) << done;
    done += here;
  }
  return found;
}

// A lane per word: steps that move words or elements in order.
__device__ __forceinline__ bool move(const ReachStep& s, int64_t unit) {
  const int64_t at = 32 * unit + static_cast<int64_t>(threadIdx.x & 31u);
  if (at >= words_in(s.to)) return false;
  const Divided place = divide(at, words_of(s.to.bits));
  const int64_t n = min(int64_t{64}, s.to.bits - 64 * place.rest);
  switch (s.kind) {
    case ReachStepKind::fill:
      return gain(s.to.words + at, low_bits(n));
    case ReachStepKind::clear:
      s.to.words[at] = 0;
      return false;
    case ReachStepKind::store:
      s.to.words[at] = s.from.words[at];
      return false;
    case ReachStepKind::merge:
      return gain(s.to.words + at, s.from.words[at]);
    default: {
      const int64_t element = place.quotient * s.to.bits + 64 * place.rest;
      return gain(s.to.words + at, elements_at(s.from, element, n));
    }
  }
}

// A word of 64 elements with their labels: to the marks of labels, or from them.
__device__ __forceinline__ bool label(const ReachStep& s, int64_t unit) {
  const bool marks = s.kind == ReachStepKind::mark;
  const ReachMap &map = marks ? s.from : s.to, &labels = marks ? s.to : s.from;
  const Divided place = divide(unit, words_of(map.bits));
  const int me = static_cast<int>(threadIdx.x & 31u);
  uint64_t found = 0;
  for (int half = 0; half < 2; ++half) {
    const int64_t i = 64 * place.rest + 32 * half + me;
    const int64_t which = i < map.bits ? s.labels[place.quotient * map.bits + i] : -1;
    bool on = which >= 0 && which < labels.bits;
    if (marks) {
      on = on && (map.words[unit] >> (32 * half + me) & 1u) != 0;
      if (on) gain(labels.words + which / 64, uint64_t{1} << which % 64);
    } else {
      on = on && bit_of(labels.words, which);
      found |= uint64_t{__ballot_sync(kAllLanes, on)} << (32 * half);
    }
  }
  return !marks && me == 0 && gain(map.words + unit, found);  // marks are cleared: no news
}

// Warps' worth of work in a step.
__host__ __device__ inline int64_t units_of(const ReachStep& s) {
  switch (s.kind) {
    case ReachStepKind::states:
      return s.from.planes;
    case ReachStepKind::gather:
    case ReachStepKind::spread:
    case ReachStepKind::linear_back:
    case ReachStepKind::linear_active:
      return s.to.planes * chunks_of(words_of(s.to.bits));
    case ReachStepKind::linear: {
      const int rows = 32 / team_lanes(words_of(s.from.bits));
      return s.to.planes * ((s.to.bits + rows - 1) / rows);
    }
    case ReachStepKind::mark:
      return words_in(s.from);
    case ReachStepKind::take:
    case ReachStepKind::conv_active:
      return words_in(s.to);
    default:
      return chunks_of(words_in(s.to));
  }
}
// Items of a unit that several warps may share.
__host__ __device__ inline int64_t items_of(const ReachStep& s) {
  switch (s.kind) {
    case ReachStepKind::gather:
      return words_of(s.mask.bits);
    case ReachStepKind::spread:
      return s.geometry.rows / s.geometry.groups * words_of(s.geometry.taps());
    case ReachStepKind::linear_back:
      return words_of(s.from.bits);
    case ReachStepKind::linear_active:
      return s.from.planes;
    default:
      return 1;
  }
}

// Called by whole warps; whether this lane added a bit to a map.
__device__ __forceinline__ bool run_unit(const ReachStep& s, int64_t unit, const Slice& slice) {
  switch (s.kind) {
    case ReachStepKind::states:
      states(s, unit);
      return false;
    case ReachStepKind::gather:
      return gather(s, unit, slice);
    case ReachStepKind::spread:
      return spread(s, unit, slice);
    case ReachStepKind::linear:
      return linear(s, unit);
    case ReachStepKind::linear_back:
      return linear_back(s, unit, slice);
    case ReachStepKind::conv_active:
      return conv_active(s, unit);
    case ReachStepKind::linear_active:
      return linear_active(s, unit, slice);
    case ReachStepKind::mark:
    case ReachStepKind::take:
      return label(s, unit);
    default:
      return move(s, unit);
  }
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
