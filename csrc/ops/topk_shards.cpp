// The local passes of a selection over many ranks: each op does one rank's part of one step, and
// python/fastprune/distributed adds up the counts. Private: the driver has checked what a user
// gave.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <tuple>
#include <vector>

#include "kernels/cpu/global_topk_mask.h"
#include "ops/common.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "global_topk_mask";

// Columns of a chunk table, an int64 tensor with one row per chunk.
enum Column : int { tensor, begin, end, above, top, inside, bottom, first, columns };

// What of a call the kernels read. The tensors must be contiguous: masks are written in place.
struct Pieces {
  std::vector<TopkTensor> tensors;
  TopkProblem problem;
  int64_t elements = 0;

  std::vector<TopkChunk> chunks() const {
    std::vector<TopkChunk> result;
    for (size_t i = 0; i < tensors.size(); ++i) {
      const int64_t numel = tensors[i].numel;
      for (int64_t at = 0; at < numel; at += kTopkChunk) {
        TopkChunk c{};
        c.span = {static_cast<int64_t>(i), at, std::min(at + kTopkChunk, numel)};
        result.push_back(c);
      }
    }
    return result;
  }
};

const void* contiguous_data(const Tensor& t, const char* name) {
  check_cpu(t, kOp, name);
  STD_TORCH_CHECK(t.is_contiguous(), kOp, ": ", name, ": expected contiguous tensors");
  return t.const_data_ptr();
}

void check_companions(const std::vector<Tensor>& values, const std::vector<Tensor>& tensors,
                      const char* name) {
  STD_TORCH_CHECK(tensors.empty() || tensors.size() == values.size(), kOp, ": ", name,
                  ": expected ", values.size(), " tensors, got ", tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    STD_TORCH_CHECK(tensors[i].numel() == values[i].numel(), kOp, ": ", name, "[", i,
                    "]: expected ", values[i].numel(), " elements, got ", tensors[i].numel());
  }
}

Pieces pieces_of(const std::vector<Tensor>& values, const std::vector<Tensor>& other,
                 const std::vector<Tensor>& within, const std::vector<Tensor>& masks,
                 const std::vector<double>& scale, int64_t score, bool wide) {
  STD_TORCH_CHECK(score >= 0 && score <= static_cast<int64_t>(TopkScore::square), kOp,
                  ": score: unknown kind ", score);
  const TopkScore kind = static_cast<TopkScore>(score);
  const bool two = kind == TopkScore::product || kind == TopkScore::saliency;
  STD_TORCH_CHECK(values.empty() || other.empty() != two, kOp,
                  ": other: expected second factors for a score of two, and for no other");
  check_companions(values, other, "other");
  check_companions(values, within, "within");
  check_companions(values, masks, "masks");
  STD_TORCH_CHECK(scale.empty() || scale.size() == values.size(), kOp, ": scale: expected ",
                  values.size(), " factors, got ", scale.size());
  Pieces pieces;
  bool scaled = false;
  for (size_t i = 0; i < values.size(); ++i) {
    TopkTensor t{};
    t.numel = values[i].numel();
    if (!scale.empty()) t.scale = scale[i];
    scaled |= t.scale != 1.0;
    t.dtype = dtype_of(values[i], kOp, "values");
    t.values = contiguous_data(values[i], "values");
    if (two) {
      t.other_dtype = dtype_of(other[i], kOp, "other");
      t.other = contiguous_data(other[i], "other");
    }
    STD_TORCH_CHECK(wide || (t.dtype != DType::f64 && (!two || t.other_dtype != DType::f64)), kOp,
                    ": wide: float64 factors need 64-bit keys");
    if (!within.empty()) {
      check_dtype(within[i], ScalarType::Bool, kOp, "within");
      t.within = static_cast<const uint8_t*>(contiguous_data(within[i], "within"));
    }
    if (!masks.empty()) {
      check_dtype(masks[i], ScalarType::Bool, kOp, "masks");
      contiguous_data(masks[i], "masks");
      t.mask = static_cast<uint8_t*>(masks[i].mutable_data_ptr());
    }
    STD_TORCH_CHECK(!__builtin_add_overflow(pieces.elements, t.numel, &pieces.elements), kOp,
                    ": values: the number of elements does not fit 64 bits");
    pieces.tensors.push_back(t);
  }
  pieces.problem = TopkProblem{pieces.tensors.data(), kind, wide, scaled};
  return pieces;
}

// New CPU tensors are made from this one: an op may be called without any.
Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t shape[2] = {1, 1}, strides[2] = {1, 1};
  std::copy(sizes.begin(), sizes.end(), shape);
  if (sizes.size() == 2) strides[0] = shape[1];
  AtenTensorHandle made = nullptr;
  const int32_t code = dtype == ScalarType::Int      ? aoti_torch_dtype_int32()
                       : dtype == ScalarType::Short  ? aoti_torch_dtype_int16()
                       : dtype == ScalarType::Double ? aoti_torch_dtype_float64()
                                                     : aoti_torch_dtype_int64();
  STD_TORCH_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), shape, strides, code,
                                           aoti_torch_device_type_cpu(), 0, &made) == 0,
                  kOp, ": a buffer could not be allocated");
  return Tensor(made);
}

template <typename T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

ScalarType key_type(bool wide) { return wide ? ScalarType::Long : ScalarType::Int; }

template <typename F>
int64_t for_each_worker(const std::vector<TopkChunk>& chunks, const F& f) {
  const int64_t n = static_cast<int64_t>(chunks.size()), workers = std::min(n, thread_count());
  for_each_range(workers, 0, [&](int64_t low, int64_t high, void*) {
    for (int64_t w = low; w < high; ++w) f(w, n * w / workers, n * (w + 1) / workers);
  });
  return workers;
}

// Keys of about `wanted` elements, those outside `within` left out.
Tensor sample_cpu(const std::vector<Tensor>& values, const std::vector<Tensor>& other,
                  const std::vector<Tensor>& within, const std::vector<double>& scale,
                  int64_t score, bool wide, int64_t wanted) {
  const Pieces p = pieces_of(values, other, within, {}, scale, score, wide);
  const std::vector<TopkChunk> chunks = p.chunks();
  wanted = std::max<int64_t>(0, std::min(wanted, p.elements));
  const int64_t key_bytes = wide ? 8 : 4;
  const Scratch keys(checked_product(wanted + 64, key_bytes, kOp));
  int64_t found = 0;
  if (wanted > 0) {
    found =
        FASTPRUNE_PICK(topk_sample)(p.problem, chunks.data(), static_cast<int64_t>(chunks.size()),
                                    p.elements, wanted, keys.as<void>());
  }
  Tensor result = empty_cpu({found}, key_type(wide));
  if (found > 0) std::memcpy(result.mutable_data_ptr(), keys.as<void>(), found * key_bytes);
  return result;
}

// Writes the masks as if bounds[1] were the threshold; returns the chunk table and the keys and
// positions of the elements inside the bracket, as many as there are.
std::tuple<Tensor, Tensor, Tensor> filter_cpu(
    const std::vector<Tensor>& values, const std::vector<Tensor>& other,
    const std::vector<Tensor>& within, const std::vector<double>& scale, int64_t score, bool wide,
    const std::vector<Tensor>& masks, const std::vector<int64_t>& bounds, int64_t capacity) {
  const Pieces p = pieces_of(values, other, within, masks, scale, score, wide);
  STD_TORCH_CHECK(bounds.size() == 4 && capacity >= 0, kOp, ": bounds: expected four keys");
  const TopkBracket bracket{{bounds[0], bounds[1], bounds[2], bounds[3]}};
  std::vector<TopkChunk> chunks = p.chunks();
  const int64_t workers = std::min<int64_t>(static_cast<int64_t>(chunks.size()), thread_count());
  const int64_t key_bytes = wide ? 8 : 4;
  for (const Tensor& mask : masks) advise_huge_pages(mask);  // written here for the first time
  capacity = std::min(capacity, p.elements) + 64;
  std::vector<int64_t> first_chunk(static_cast<size_t>(workers) + 1), found(workers);
  // Any worker may meet all of them; pages that none touches are never backed by memory. Where the
  // candidates crowd on this rank, the pass is made once more, with room for what it has counted.
  for (;;) {
    const int64_t slots = checked_product(workers, capacity, kOp);
    const Scratch keys(checked_product(slots, key_bytes, kOp));
    const Scratch positions(checked_product(slots, 2, kOp));
    for_each_worker(chunks, [&](int64_t w, int64_t low, int64_t high) {
      first_chunk[w + 1] = high;
      FASTPRUNE_PICK(topk_filter)
      (p.problem, chunks.data(), low, high, bracket,
       {keys.as<char>() + w * capacity * key_bytes, positions.as<uint16_t>() + w * capacity,
        capacity});
    });
    int64_t used = 0, most = 0;
    for (int64_t w = 0; w < workers; ++w) {
      found[w] = 0;
      for (int64_t c = first_chunk[w]; c < first_chunk[w + 1]; ++c) {
        found[w] += chunks[c].inside;
        chunks[c].first += used;
        STD_TORCH_CHECK(!chunks[c].has_nan, kOp, ": values[", chunks[c].span.tensor,
                        "]: a candidate's score is NaN");
      }
      used += found[w];
      most = std::max(most, found[w]);
    }
    if (most + 64 > capacity && most > 0) {
      capacity = most + 64;
      continue;
    }
    Tensor kept_keys = empty_cpu({used}, key_type(wide));
    Tensor kept_positions = empty_cpu({used}, ScalarType::Short);
    int64_t at = 0;
    for (int64_t w = 0; w < workers; ++w) {
      if (found[w] == 0) continue;
      std::memcpy(data_of<char>(kept_keys) + at * key_bytes,
                  keys.as<char>() + w * capacity * key_bytes, found[w] * key_bytes);
      std::memcpy(data_of<uint16_t>(kept_positions) + at, positions.as<uint16_t>() + w * capacity,
                  found[w] * 2);
      at += found[w];
    }
    const int64_t n = static_cast<int64_t>(chunks.size());
    Tensor table = empty_cpu({n, columns}, ScalarType::Long);
    for (int64_t i = 0; i < n; ++i) {
      const TopkChunk& c = chunks[i];
      const int64_t row[columns] = {c.span.tensor, c.span.begin, c.span.end, c.above,
                                    c.top,         c.inside,     c.bottom,   c.first};
      std::copy_n(row, columns, data_of<int64_t>(table) + i * columns);
    }
    return {table, kept_keys, kept_positions};
  }
}

// Counts the keys in [lo, hi], in bins of 2^topk_shift(lo, hi).
Tensor histogram_cpu(const std::vector<Tensor>& values, const std::vector<Tensor>& other,
                     const std::vector<Tensor>& within, const std::vector<double>& scale,
                     int64_t score, bool wide, int64_t lo, int64_t hi) {
  const Pieces p = pieces_of(values, other, within, {}, scale, score, wide);
  STD_TORCH_CHECK(lo <= hi && lo >= topk_lowest_key(wide) && hi <= topk_highest_key(wide), kOp,
                  ": lo, hi: expected a range of keys, got ", lo, " to ", hi);
  const std::vector<TopkChunk> chunks = p.chunks();
  Tensor result = empty_cpu({kTopkBins}, ScalarType::Long);
  int64_t* bins = data_of<int64_t>(result);
  std::fill_n(bins, kTopkBins, 0);
  std::mutex mutex;
  for_each_worker(chunks, [&](int64_t, int64_t low, int64_t high) {
    std::vector<int64_t> part(kTopkBins);
    FASTPRUNE_PICK(topk_histogram)(p.problem, chunks.data(), low, high, lo, hi, part.data());
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t b = 0; b < kTopkBins; ++b) bins[b] += part[b];
  });
  return result;
}

template <typename K, typename U>
void add_bins(const Tensor& keys, int64_t lo, int64_t hi, int64_t* bins) {
  const K* key = static_cast<const K*>(keys.const_data_ptr());
  const int64_t n = keys.numel();
  const U first = static_cast<U>(lo), range = static_cast<U>(hi) - first;
  const int shift = topk_shift(lo, hi);
  for (int64_t i = 0; i < n; ++i) {
    const U offset = static_cast<U>(key[i]) - first;
    if (offset <= range) ++bins[offset >> shift];
  }
}

// The same of keys in memory.
Tensor bins_cpu(const Tensor& keys, int64_t lo, int64_t hi) {
  contiguous_data(keys, "keys");
  const bool wide = keys.scalar_type() == ScalarType::Long;
  if (!wide) check_dtype(keys, ScalarType::Int, kOp, "keys");
  STD_TORCH_CHECK(lo <= hi && lo >= topk_lowest_key(wide) && hi <= topk_highest_key(wide), kOp,
                  ": lo, hi: expected a range of keys, got ", lo, " to ", hi);
  Tensor result = empty_cpu({kTopkBins}, ScalarType::Long);
  std::fill_n(data_of<int64_t>(result), kTopkBins, 0);
  wide ? add_bins<int64_t, uint64_t>(keys, lo, hi, data_of<int64_t>(result))
       : add_bins<int32_t, uint32_t>(keys, lo, hi, data_of<int64_t>(result));
  return result;
}

// The rows of a chunk table as it came from filter_cpu, for tensors of the same sizes.
std::vector<TopkChunk> chunks_of(const Tensor& table, const Pieces& p, int64_t candidates) {
  check_dtype(table, ScalarType::Long, kOp, "chunks");
  contiguous_data(table, "chunks");
  std::vector<TopkChunk> chunks = p.chunks();
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == columns &&
                      table.size(0) == static_cast<int64_t>(chunks.size()),
                  kOp, ": chunks: expected the table of these tensors");
  const int64_t* row = static_cast<const int64_t*>(table.const_data_ptr());
  for (TopkChunk& c : chunks) {
    c.above = row[above], c.top = row[top], c.inside = row[inside], c.bottom = row[bottom];
    c.first = row[first];
    STD_TORCH_CHECK(row[tensor] == c.span.tensor && row[begin] == c.span.begin &&
                        row[end] == c.span.end && c.inside >= 0 && c.first >= 0 &&
                        (candidates < 0 || c.inside <= candidates - c.first),
                    kOp, ": chunks: expected the table of these tensors");
    row += columns;
  }
  return chunks;
}

void accept_cpu(const std::vector<Tensor>& values, const std::vector<Tensor>& other,
                const std::vector<Tensor>& within, const std::vector<double>& scale, int64_t score,
                bool wide, const std::vector<Tensor>& masks, const Tensor& table,
                const Tensor& keys, const Tensor& positions, int64_t key, int64_t ties) {
  const Pieces p = pieces_of(values, other, within, masks, scale, score, wide);
  check_dtype(keys, key_type(wide), kOp, "keys");
  check_dtype(positions, ScalarType::Short, kOp, "positions");
  contiguous_data(keys, "keys");
  contiguous_data(positions, "positions");
  STD_TORCH_CHECK(keys.numel() == positions.numel() && masks.size() == values.size(), kOp,
                  ": keys: expected one for each position");
  const std::vector<TopkChunk> chunks = chunks_of(table, p, keys.numel());
  const uint16_t* at = static_cast<const uint16_t*>(positions.const_data_ptr());
  for (const TopkChunk& c : chunks) {
    for (int64_t i = c.first; i < c.first + c.inside; ++i) {
      STD_TORCH_CHECK(at[i] < c.span.end - c.span.begin, kOp, ": positions: outside the chunk");
    }
  }
  FASTPRUNE_PICK(topk_accept)
  (p.problem, chunks.data(), static_cast<int64_t>(chunks.size()),
   {data_of<void>(keys), data_of<uint16_t>(positions), keys.numel()}, key, ties);
}

// mask = 1 for the first `ties` of the elements with this key, all of them members of one class,
// whose masks are alike so far.
void settle_cpu(const std::vector<Tensor>& values, const std::vector<Tensor>& other,
                const std::vector<Tensor>& within, const std::vector<double>& scale, int64_t score,
                bool wide, const std::vector<Tensor>& masks, const Tensor& table, bool of_top,
                int64_t key, int64_t ties) {
  const Pieces p = pieces_of(values, other, within, masks, scale, score, wide);
  STD_TORCH_CHECK(masks.size() == values.size(), kOp, ": masks: expected one for each of values");
  const std::vector<TopkChunk> chunks = chunks_of(table, p, -1);
  std::vector<std::pair<const TopkChunk*, int64_t>> work;
  for (const TopkChunk& c : chunks) {
    const int64_t members = of_top ? c.top : c.bottom, share = std::min(members, ties);
    ties -= share;
    if (share != (of_top ? members : 0)) work.emplace_back(&c, share);
  }
  for_each_range(static_cast<int64_t>(work.size()), 0, [&](int64_t low, int64_t high, void*) {
    for (int64_t i = low; i < high; ++i) {
      FASTPRUNE_PICK(topk_settle_ties)(p.problem, *work[i].first, key, work[i].second);
    }
  });
}

// Where a tensor lies among all: row-major over sizes[], with a stride for each dimension.
struct Box {
  const int64_t* row;  // base, then (size, stride) of each dimension, the last with stride 1
  int64_t dims;

  // The global index of a local one, and how many more elements follow it one by one.
  int64_t index(int64_t local, int64_t& run) const {
    int64_t at = row[0];
    const int64_t last = row[2 * dims - 1];
    run = last - local % last;
    for (int64_t d = dims - 1; d >= 0; --d) {
      at += local % row[1 + 2 * d] * row[2 + 2 * d];
      local /= row[1 + 2 * d];
    }
    return at;
  }
};

// Of the elements with this key, all of them members of one class: how many have a global index
// in each bin of 2^shift from lo on. Chunks that lie in one bin are not read.
Tensor tie_bins_cpu(const std::vector<Tensor>& values, const std::vector<Tensor>& other,
                    const std::vector<Tensor>& within, const std::vector<double>& scale,
                    int64_t score, bool wide, const std::vector<Tensor>& masks, const Tensor& table,
                    bool of_top, int64_t key, const Tensor& boxes, int64_t lo, int64_t shift) {
  const Pieces p = pieces_of(values, other, within, masks, scale, score, wide);
  STD_TORCH_CHECK(masks.size() == values.size(), kOp, ": masks: expected one for each of values");
  std::vector<TopkChunk> chunks = chunks_of(table, p, -1);
  check_dtype(boxes, ScalarType::Long, kOp, "boxes");
  contiguous_data(boxes, "boxes");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(0) == static_cast<int64_t>(values.size()) &&
                      boxes.size(1) >= 3 && boxes.size(1) % 2 == 1 && shift >= 0 && shift < 63,
                  kOp, ": boxes: expected a base, sizes and strides for each tensor");
  const int64_t dims = boxes.size(1) / 2;
  const int64_t* rows = static_cast<const int64_t*>(boxes.const_data_ptr());
  for (size_t i = 0; i < values.size(); ++i) {
    int64_t numel = 1;
    for (int64_t d = 0; d < dims; ++d) {
      numel =
          checked_product(numel, rows[static_cast<int64_t>(i) * boxes.size(1) + 1 + 2 * d], kOp);
    }
    STD_TORCH_CHECK(numel == p.tensors[i].numel, kOp, ": boxes: expected the tensors' sizes");
  }
  Tensor result = empty_cpu({kTopkBins}, ScalarType::Long);
  int64_t* bins = data_of<int64_t>(result);
  std::fill_n(bins, kTopkBins, 0);
  std::mutex mutex;
  // Below the first bin, or past the last: -1 or kTopkBins.
  const auto bin_of = [&](int64_t index) {
    return index < lo ? int64_t{-1} : std::min<int64_t>((index - lo) >> shift, kTopkBins);
  };
  for_each_worker(chunks, [&](int64_t, int64_t low, int64_t high) {
    std::vector<int64_t> part(kTopkBins + 2);  // both outsides are counted too, and dropped
    std::vector<uint16_t> positions(kTopkChunk + 128);
    std::vector<int64_t> keys(kTopkChunk + 128);
    std::vector<uint8_t> saved(kTopkChunk);
    for (int64_t c = low; c < high; ++c) {
      const TopkSpan span = chunks[c].span;
      const int64_t members = of_top ? chunks[c].top : chunks[c].bottom;
      if (members == 0) continue;
      const Box box{rows + span.tensor * boxes.size(1), dims};
      int64_t run = 0;
      const int64_t from = bin_of(box.index(span.begin, run));
      if (from == bin_of(box.index(span.end - 1, run))) {
        part[from + 1] += members;
        continue;
      }
      // The filter tells their positions; the mask it writes is put back.
      uint8_t* mask = p.tensors[span.tensor].mask + span.begin;
      std::memcpy(saved.data(), mask, static_cast<size_t>(span.end - span.begin));
      FASTPRUNE_PICK(topk_filter)
      (p.problem, chunks.data(), c, c + 1, TopkBracket{{key, key, key - 1, key - 1}},
       {keys.data(), positions.data(), static_cast<int64_t>(positions.size())});
      std::memcpy(mask, saved.data(), static_cast<size_t>(span.end - span.begin));
      const int64_t found = chunks[c].inside;
      int64_t index = 0, run_begin = 0, run_end = 0;  // of the run in which the last one lay
      for (int64_t i = 0; i < found; ++i) {
        const int64_t local = span.begin + positions[i];
        if (local >= run_end) {
          index = box.index(local, run);
          run_begin = local;
          run_end = local + run;
        }
        ++part[bin_of(index + local - run_begin) + 1];
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t b = 0; b < kTopkBins; ++b) bins[b] += part[b + 1];
  });
  return result;
}

// The l2 norms of rows of scores, in float64, in the order of additions that the kernel fixes.
Tensor norms_cpu(const Tensor& values, const std::vector<Tensor>& other,
                 const std::vector<double>& scale, int64_t score, int64_t rows) {
  const bool wide = true;  // not used
  const Pieces p = pieces_of({values}, other, {}, {}, scale, score, wide);
  STD_TORCH_CHECK(rows >= 0 && (rows == 0 ? p.elements == 0 : p.elements % rows == 0), kOp,
                  ": rows: expected a divisor of ", p.elements, ", got ", rows);
  const int64_t cols = rows == 0 ? 0 : p.elements / rows;
  Tensor norms = empty_cpu({rows}, ScalarType::Double);
  for_each_range(rows, 0, [&](int64_t low, int64_t high, void*) {
    FASTPRUNE_PICK(topk_norms)(p.problem, 0, cols, low, high, data_of<double>(norms));
  });
  return norms;
}

}  // namespace
}  // namespace fastprune

// What all passes over the factors take first.
#define FASTPRUNE_PIECES \
  "Tensor[] values, Tensor[] other, Tensor[] within, float[] scale, int score, bool wide"

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def("topk_shard_sample(" FASTPRUNE_PIECES ", int wanted) -> Tensor");
  m.def("topk_shard_filter(" FASTPRUNE_PIECES
        ", Tensor(a!)[] masks, int[] bounds, int capacity) -> (Tensor, Tensor, Tensor)");
  m.def("topk_shard_histogram(" FASTPRUNE_PIECES ", int lo, int hi) -> Tensor");
  m.def("topk_shard_accept(" FASTPRUNE_PIECES
        ", Tensor(a!)[] masks, Tensor chunks, Tensor keys, Tensor positions, int key, int ties)"
        " -> ()");
  m.def("topk_shard_settle(" FASTPRUNE_PIECES
        ", Tensor(a!)[] masks, Tensor chunks, bool of_top, int key, int ties) -> ()");
  m.def("topk_shard_tie_bins(" FASTPRUNE_PIECES
        ", Tensor(a!)[] masks, Tensor chunks, bool of_top, int key, Tensor boxes, int lo,"
        " int shift) -> Tensor");
  m.def("topk_shard_bins(Tensor keys, int lo, int hi) -> Tensor");
  m.def(
      "topk_shard_norms(Tensor values, Tensor[] other, float[] scale, int score, int rows)"
      " -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("topk_shard_sample", TORCH_BOX(&fastprune::sample_cpu));
  m.impl("topk_shard_filter", TORCH_BOX(&fastprune::filter_cpu));
  m.impl("topk_shard_histogram", TORCH_BOX(&fastprune::histogram_cpu));
  m.impl("topk_shard_accept", TORCH_BOX(&fastprune::accept_cpu));
  m.impl("topk_shard_settle", TORCH_BOX(&fastprune::settle_cpu));
  m.impl("topk_shard_tie_bins", TORCH_BOX(&fastprune::tie_bins_cpu));
  m.impl("topk_shard_bins", TORCH_BOX(&fastprune::bins_cpu));
  m.impl("topk_shard_norms", TORCH_BOX(&fastprune::norms_cpu));
}
