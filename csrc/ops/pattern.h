// Packed patterns as tensors, checked at every call, and the values that a product reads.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/pattern.h"
#include "ops/common.h"

namespace fastprune {

// A weight's shape as the kernels see it, and how its two patterns are blocked.
struct PatternShape {
  int64_t rows, groups, depth, taps;
  int64_t block_depth, transposed_block_depth;
};

// What can be checked of a mask or of a pattern's tensors without reading them, on any device.
PatternShape validate_pack_pattern(const Tensor& mask, int64_t groups, int64_t taps,
                                   int64_t block_depth, int64_t transposed_block_depth);
PatternView view_of(const PatternShape& shape, bool transposed);
PatternView validate_pattern(const Tensor& row_ptr, const Tensor& offset, const Tensor& first,
                             const PatternShape& shape, bool transposed, const char* op);

// On the CPU, every bound and offset too.
PatternView checked_pattern(const Tensor& row_ptr, const Tensor& offset, const PatternShape& shape,
                            bool transposed, const char* op);

// The weight's values at the pattern's entries, in the accumulator type.
Tensor forward_values(const PatternView& forward, const Tensor& weight, const char* op);
Tensor transposed_values(const PatternView& forward, const PatternView& transposed,
                         const Tensor& weight, const char* op);
// The dense gradient, `weight_sizes` shaped, from the values at the entries: zero elsewhere.
void scatter_to_dense(const PatternView& forward, DType dtype, const void* values,
                      Tensor& weight_grad);

// The bias against x and the number of rows.
void check_bias(const std::optional<Tensor>& bias, int64_t rows, const Tensor& x, const char* op);
// Bias in the accumulator type, or nothing; checked.
std::optional<Tensor> checked_bias(const std::optional<Tensor>& bias, int64_t rows, const Tensor& x,
                                   const char* op);

// The windows of sorted rows (kRowWindow), in order, and the entries that they hold.
class Windows {
 public:
  // The window that ends at `row`; `entries` of the windows up to its end.
  void push_back(int64_t row, int64_t entries) {
    row_end_.push_back(row);
    entries_end_.push_back(entries);
  }
  const std::vector<int64_t>& row_end() const { return row_end_; }
  // First rows of `parts` parts of about the same number of entries, cut at windows, and the end.
  std::vector<int64_t> balanced(int64_t parts) const;

 private:
  std::vector<int64_t> row_end_, entries_end_;
};

// How a product is cut over threads: ranges of items, or where items alone leave threads idle,
// every item's rows in `parts`. The cuts never change a result.
struct Cuts {
  int64_t items, parts, rows;
  std::vector<int64_t> bounds;  // first rows of the parts, and the end; empty: even parts
  int64_t row_begin(int64_t part) const {
    return bounds.empty() ? rows * part / parts : bounds[static_cast<size_t>(part)];
  }
  int64_t rows_per_part() const {  // of the longest one
    int64_t longest = 0;
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t here = row_begin(p + 1) - row_begin(p);
      longest = here > longest ? here : longest;
    }
    return longest;
  }
};
Cuts cut_product(int64_t items, int64_t rows);
// One part per thread, for weight gradients: a part walks all items itself, in order.
Cuts cut_rows(int64_t rows);

// The cuts [begin, end) one after the other.
template <typename F>
void walk_cuts(const Cuts& cuts, int64_t begin, int64_t end, void* memory, const F& f) {
  if (cuts.parts == 1) {
    f(begin, end, int64_t{0}, cuts.rows, memory);
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    const int64_t item = i / cuts.parts, part = i % cuts.parts;
    if (cuts.row_begin(part) == cuts.row_begin(part + 1)) continue;
    f(item, item + 1, cuts.row_begin(part), cuts.row_begin(part + 1), memory);
  }
}

// Calls f(item_begin, item_end, row_begin, row_end, scratch) for every cut, on torch's threads.
template <typename F>
void for_each_cut(const Cuts& cuts, int64_t scratch_bytes, const F& f) {
  for_each_range(
      cuts.items * cuts.parts, scratch_bytes,
      [&](int64_t begin, int64_t end, void* memory) { walk_cuts(cuts, begin, end, memory, f); });
}

}  // namespace fastprune
