#include "kernels/cuda/global_topk_mask.h"

#include <vector>

#include "kernels/cuda/topk_state.h"
#include "kernels/cuda/topk_upload.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

__global__ void __launch_bounds__(kTopkThreads, 2) advance_kernel(const TopkPass p, int width) {
  advance(p, static_cast<int>(blockIdx.x), width, shared_memory<uint64_t>());
}

// Blocks whose registers fit a multiprocessor together.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <typename Key>
constexpr int kResident = 1;
#else
template <typename Key>
constexpr int kResident = sizeof(Key) == 4 ? kBlocksPerMultiprocessor : 1;
#endif

// ---- The passes ---------------------------------------------------------------------------------

template <typename Key>
__global__ void __launch_bounds__(kTopkThreads, kResident<Key>)
    first_digit_kernel(const TopkPass p) {
  constexpr int kShift = static_cast<int>(8 * sizeof(Key)) - kTopkDigit;
  uint32_t* bins = shared_memory<uint32_t>();
  clear_bins(bins);
  HeldDigit held;
  int problem = -1;
  for (Walk w(p, after_bins<TopkReading>()); w.here(p); ++w.tile) {
    if (w.problem != problem) {
      held.flush(bins);
      if (problem >= 0) flush_bins(bins, p.histograms + int64_t{problem} * kTopkDigitBins);
      problem = w.problem;
    }
    const auto keys = tile_keys<Key>(p, w.t, w.begin());
    if (keys.nan) tell(p.status, p.mark, w.t.source().index, kNanScore);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      uint32_t digit[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) digit[j] = static_cast<uint32_t>(keys.key[q][j] >> kShift);
      held.look_at(bins, digit[0], digit[1]);
      const uint32_t live = keys.live >> (4 * q) & 15u;
      if (live == 15u) {
#pragma unroll
        for (int j = 0; j < 4; ++j) held.add(bins, digit[j]);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if ((live >> j & 1u) != 0) held.add(bins, digit[j]);
        }
      }
    }
  }
  held.flush(bins);
  if (problem >= 0) flush_bins(bins, p.histograms + int64_t{problem} * kTopkDigitBins);
  end_pass(p, 8 * sizeof(Key), bins);
}

// Whether any problem is undecided: the same for all threads of the grid.
__device__ __forceinline__ bool any_open(const TopkPass& p) {
  bool open = false;
  for (int i = static_cast<int>(threadIdx.x % 32); i < p.problems; i += 32) {
    open |= p.states[i].done == 0;
  }
  return __any_sync(kAllLanes, open) != 0;
}

// Calls f(problem, state, slot) for this block's part of the listed candidates of undecided
// problems, or of decided ones, and between two problems g(problem left).
template <typename F, typename G>
__device__ __forceinline__ void for_listed(const TopkPass& p, bool done, F f, G g) {
  const uint64_t block = blockIdx.x, blocks = gridDim.x;
  const uint64_t all = p.problems == 1 ? p.found[0] : p.n_slots;
  const uint64_t begin = block * all / blocks, end = (block + 1) * all / blocks;
  int first = 0, past = p.problems;  // the first problem of this part: the last to start before it
  while (past - first > 1) {
    const int middle = (first + past) / 2;
    (p.ranges[middle].first_slot <= begin ? first : past) = middle;
  }
  for (int i = first; i < p.problems; ++i) {
    const TopkRange range = p.ranges[i];
    if (range.first_slot >= end) break;
    const TopkState s = p.states[i];
    if (s.mode != kListed || (s.done != 0) != done) continue;
    const uint64_t last = range.first_slot + p.found[i];
    const uint64_t from = range.first_slot > begin ? range.first_slot : begin;
    const uint64_t to = last < end ? last : end;
#pragma unroll 1
    for (uint64_t slot = from + threadIdx.x; slot < to; slot += kTopkThreads) f(i, s, slot);
    g(i);
  }
}

// Counts the next digit of the candidates, of the key or of the inverted position; they are listed,
// or read anew. A read for a digit of the key may list them.
template <typename Key, bool kPositions>
__global__ void __launch_bounds__(kTopkThreads, kResident<Key>)
    next_digit_kernel(const TopkPass p) {
  uint32_t* bins = shared_memory<uint32_t>();
  if (!any_open(p)) return;
  clear_bins(bins);
  HeldDigit held;
  uint32_t last = ~0u;
  const auto add = [&](uint32_t digit) {
    held.look_at(bins, digit, last);
    held.add(bins, digit);
    last = digit;
  };
  const auto close = [&](int problem) {
    held.flush(bins);
    flush_bins(bins, p.histograms + int64_t{problem} * kTopkDigitBins);
  };
  for_listed(
      p, false,
      [&](int, const TopkState& s, uint64_t slot) {
        const Key key = static_cast<const Key*>(p.keys)[slot];
        const uint32_t tile = p.tiles[slot], place = p.places[slot];
        if (compare(p, s, key, tile, place) != 0) return;
        add(kPositions ? position_digit(p, s.position_shift, tile, place)
                       : key_digit(p, s.key_shift, key));
      },
      close);

  Collector<Key> collector(p, reinterpret_cast<Stage<Key>*>(after_bins<TopkReading>() + 1));
  int problem = -1;
  Key prefix = 0;
  uint32_t shift = 0;
  bool counting = false, collecting = false;
  for (Walk w(p, after_bins<TopkReading>());; ++w.tile) {
    const bool here = w.here(p);
    if (!here || w.problem != problem) {
      if (counting) {
        close(problem);
        collector.flush(problem);
      }
      if (!here) break;
      problem = w.problem;
      const TopkState& s = p.states[problem];
      counting = s.done == 0 && s.mode != kListed;
      collecting = !kPositions && s.mode == kCollecting;
      prefix = static_cast<Key>(s.key_prefix);
      shift = s.key_shift;
    }
    if (!counting) {
      w.tile = p.ranges[problem].end_tile - 1;
      continue;
    }
    if constexpr (kPositions) {  // only those that share the prefix are left
      const TopkState& s = p.states[problem];
      const uint64_t high = inverted(p, w.tile, 0) >> s.position_shift;
      const uint64_t low = inverted(p, w.tile, kTile - 1) >> s.position_shift;
      if (high < s.position_prefix || low > s.position_prefix) continue;
    }
    const int64_t begin = w.begin();
    const auto keys = tile_keys<Key>(p, w.t, begin);
    uint32_t over = 0, equal = 0;
#pragma unroll
    for (int i = 0; i < 4 * kQuads; ++i) {
      const Key top = keys.key[i / 4][i % 4] >> shift;
      over |= static_cast<uint32_t>(top > prefix) << i;
      equal |= static_cast<uint32_t>(top == prefix) << i;
    }
    over &= keys.live;
    equal &= keys.live;
    if (collecting) collector.begin(problem, static_cast<uint32_t>(__popc(equal)));
#pragma unroll 1
    while (equal != 0) {  // few: not worth unrolling
      const int i = __ffs(static_cast<int>(equal)) - 1;
      equal &= equal - 1;
      const Key key = picked(keys, i);
      const uint32_t place = place_of(i);
      if constexpr (kPositions) {
        const TopkState& s = p.states[problem];
        if (compare(p, s, key, w.tile, place) != 0) continue;
        add(position_digit(p, s.position_shift, w.tile, place));
      } else {
        add(key_digit(p, shift, key));
      }
      if (collecting) collector.add(key, w.tile, place);
    }
    if (collecting) store_tile(p, w.t, begin, over);
  }
  end_pass(p, 8 * sizeof(Key), bins);
}

// Everything is decided: the mask of the listed candidates, or, where none were listed, of all.
template <typename Key>
__global__ void __launch_bounds__(kTopkThreads, kResident<Key>) settle_kernel(const TopkPass p) {
  for_listed(
      p, true,
      [&](int, const TopkState& s, uint64_t slot) {
        const uint32_t tile = p.tiles[slot], place = p.places[slot];
        if (compare(p, s, static_cast<const Key*>(p.keys)[slot], tile, place) < 0) return;
        const int source = source_of(p, tile);
        const TopkSource& t = p.sources[source];
        const int64_t at = (int64_t{tile} - t.first_tile) * kTile + place;
        if (!p.packed) {
          p.masks[source][at] = 1;
        } else if (at < t.numel / 32 * 32) {
          atomicOr(reinterpret_cast<uint32_t*>(p.masks[source]) + at / 32, 1u << (at % 32));
        }
      },
      [](int) {});
  // The last word of packed bits may not be there as a whole: its elements are looked at anew.
  for (int i = static_cast<int>(blockIdx.x); p.packed && i < p.n_sources;
       i += static_cast<int>(gridDim.x)) {
    const TopkSource& t = p.sources[i];
    const TopkState s = p.states[t.problem];
    if (threadIdx.x >= 32 || t.numel % 32 == 0 || s.mode != kListed) continue;
    const int64_t at = t.numel / 32 * 32 + threadIdx.x;
    const auto keys = load_keys<Key, 1>(p.keying, reading_of(p.sources, i), at, 0,
                                        at < t.numel ? at + 1 : t.numel, false);
    const bool kept =
        (keys.live & 1u) != 0 &&
        compare(p, s, keys.key[0][0], t.first_tile + static_cast<uint32_t>(at / kTile),
                static_cast<uint32_t>(at % kTile)) >= 0;
    const unsigned word = __ballot_sync(kAllLanes, kept);
    if (at < t.numel && at % 8 == 0) {
      p.masks[i][at / 8] = static_cast<uint8_t>(word >> threadIdx.x);
    }
  }
  int problem = -1;
  TopkState s{};
  for (Walk w(p, after_bins<TopkReading>()); w.here(p); ++w.tile) {
    if (w.problem != problem) {
      problem = w.problem;
      s = p.states[problem];
    }
    if (s.mode != kReading) {
      w.tile = p.ranges[problem].end_tile - 1;
      continue;
    }
    const int64_t begin = w.begin();
    const auto keys = tile_keys<Key>(p, w.t, begin);
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < 4 * kQuads; ++i) {
      const bool better = compare(p, s, keys.key[i / 4][i % 4], w.tile, place_of(i)) >= 0;
      kept |= static_cast<uint32_t>(better) << i;
    }
    store_tile(p, w.t, begin, kept & keys.live);
  }
}

// ---- The launches -------------------------------------------------------------------------------

int64_t tiles_of(const TopkSource& t) { return (t.numel + kTile - 1) / kTile; }

// How scratch memory is laid out, in 64-bit words: the table that is uploaded, what starts as 0,
// and the list of candidates.
struct Layout {
  std::vector<TopkRange> ranges;
  int64_t n_tiles = 0, n_slots = 0, table = 0;
  int64_t states, found, ticket, histograms, keys, tiles, places, end;

  explicit Layout(const TopkSelections& of) {
    std::vector<int64_t> elements(static_cast<size_t>(of.problems));
    ranges.resize(static_cast<size_t>(of.problems));
    for (int64_t i = 0; i < of.n_sources; ++i) {
      TopkRange& range = ranges[of.sources[i].problem];
      if (elements[of.sources[i].problem] == 0) {
        range.first_tile = static_cast<uint32_t>(n_tiles);
        range.index = of.by_tensor ? of.sources[i].index : 0;
      }
      elements[of.sources[i].problem] += of.sources[i].numel;
      n_tiles += tiles_of(of.sources[i]);
      range.end_tile = static_cast<uint32_t>(n_tiles);
    }
    for (int64_t p = 0; p < of.problems; ++p) {
      ranges[p].first_slot = static_cast<uint64_t>(n_slots);
      // A multiple of 4, so that the parts of the list are aligned.
      ranges[p].slots = static_cast<uint64_t>(elements[p] / kCandidateShare / 4 * 4 + 64);
      n_slots += static_cast<int64_t>(ranges[p].slots);
    }
    const int64_t lists = of.selections * of.problems;
    table = of.n_sources * words<TopkSource>() + of.selections * of.n_sources + lists +
            of.problems * words<TopkRange>();
    states = table;
    found = states + lists * words<TopkState>();
    ticket = found + lists;
    histograms = (ticket + 2) / 2 * 2;
    keys = histograms + of.problems * kTopkDigitBins;
    tiles = keys + n_slots * (of.scoring.wide ? 8 : 4) / 8;
    places = tiles + n_slots / 2;
    end = places + n_slots / 4;
  }
  template <typename T>
  static constexpr int64_t words() {
    return sizeof(T) / sizeof(uint64_t);
  }
};

template <typename Key>
cudaError_t run(const TopkSelections& of, const Layout& layout, TopkPass pass, TopkState* states,
                uint8_t* const* masks, const DeviceLimits& limits, cudaStream_t stream) {
  constexpr int kWidth = 8 * sizeof(Key);
  constexpr size_t kBinBytes = kTopkDigitBins * sizeof(uint32_t) + sizeof(TopkReading);
  constexpr size_t kStageBytes = kTopkThreads / 32 * sizeof(Stage<Key>);
  const int64_t most = int64_t{kBlocksPerMultiprocessor} * limits.multiprocessors;
  const dim3 grid(static_cast<unsigned>(layout.n_tiles < most ? layout.n_tiles : most));
  const dim3 block(kTopkThreads);
  Word* const found = pass.found;
  cudaError_t error = cudaSuccess;
  const auto go = [&](auto kernel, dim3 blocks, size_t shared, auto... arguments) {
    if (error == cudaSuccess) {
      error = launch(kernel, blocks, block, shared, stream, pass, arguments...);
    }
  };
  // The passes that count; a problem by itself advances in their last block.
  const auto count = [&](auto kernel, size_t shared) {
    go(kernel, grid, shared);
    if (pass.problems > 1) {
      go(advance_kernel, dim3(static_cast<unsigned>(pass.problems)), 20 * sizeof(uint64_t), kWidth);
    }
  };
  pass.states = states;
  pass.masks = masks;
  count(first_digit_kernel<Key>, kBinBytes);
  for (int64_t i = 0; i < of.selections; ++i) {
    pass.states = states + i * of.problems;
    pass.masks = masks + i * of.n_sources;
    pass.found = found + i * of.problems;
    pass.round = 1;
    pass.positions = false;
    for (int left = pass.key_bits - kTopkDigit; left > 0; left -= kTopkDigit) {
      count(next_digit_kernel<Key, false>, kBinBytes + kStageBytes);
    }
    pass.positions = true;
    for (int left = pass.position_bits; left > 0; left -= kTopkDigit) {
      count(next_digit_kernel<Key, true>, kBinBytes + kStageBytes);
    }
    go(settle_kernel<Key>, grid, kBinBytes);
  }
  return error;
}

}  // namespace

int64_t topk_select_scratch(const TopkSelections& of) {
  return Layout(of).end * static_cast<int64_t>(sizeof(uint64_t));
}

cudaError_t topk_select(const TopkSelections& of, void* scratch, const DeviceLimits& limits,
                        cudaStream_t stream) {
  const Layout layout(of);
  if (of.n_sources == 0 || layout.n_tiles >= INT64_C(0xffffffff) ||
      (of.problems > 1 && of.selections > 1)) {
    return cudaErrorInvalidValue;
  }
  std::vector<TopkSource> sources(of.sources, of.sources + of.n_sources);
  int64_t tile = 0;
  for (TopkSource& t : sources) {
    t.first_tile = static_cast<uint32_t>(tile);
    tile += tiles_of(t);
  }
  uint64_t* const base = static_cast<uint64_t*>(scratch);
  std::vector<uint64_t> table;
  TopkPass pass{};
  pass.keying = topk_keying(of.scoring);
  pass.sources = reinterpret_cast<TopkSource*>(base + append(table, sources.data(), of.n_sources));
  uint8_t* const* masks =
      reinterpret_cast<uint8_t**>(base + append(table, of.masks, of.selections * of.n_sources));
  pass.counts = base + append(table, of.counts, of.selections * of.problems);
  pass.ranges =
      reinterpret_cast<TopkRange*>(base + append(table, layout.ranges.data(), of.problems));
  pass.found = reinterpret_cast<Word*>(base + layout.found);
  pass.ticket = reinterpret_cast<uint32_t*>(base + layout.ticket);
  pass.histograms = reinterpret_cast<Word*>(base + layout.histograms);
  pass.keys = base + layout.keys;
  pass.tiles = reinterpret_cast<uint32_t*>(base + layout.tiles);
  pass.places = reinterpret_cast<uint16_t*>(base + layout.places);
  pass.status = reinterpret_cast<Word*>(of.scoring.status);
  pass.mark = of.scoring.mark;
  pass.n_tiles = static_cast<uint32_t>(layout.n_tiles);
  pass.n_slots = static_cast<uint64_t>(layout.n_slots);
  pass.n_sources = static_cast<int>(of.n_sources);
  pass.problems = static_cast<int>(of.problems);
  pass.selections = static_cast<int>(of.selections);
  pass.key_bits = topk_key_bits(of.scoring, of.sources, of.n_sources);
  while ((int64_t{1} << pass.position_bits) < layout.n_tiles * kTile) ++pass.position_bits;
  pass.packed = of.scoring.packed;
  const cudaError_t error = upload(table, base, layout.keys - layout.table,
                                   of.scoring.more_status ? nullptr : of.scoring.status, stream);
  if (error != cudaSuccess) return error;
  TopkState* const states = reinterpret_cast<TopkState*>(base + layout.states);
  return of.scoring.wide ? run<uint64_t>(of, layout, pass, states, masks, limits, stream)
                         : run<uint32_t>(of, layout, pass, states, masks, limits, stream);
}

cudaError_t topk_clear_status(int64_t* status, cudaStream_t stream) {
  return upload({}, nullptr, 0, status, stream);
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
