// The forms of a linear weight besides values in the pattern's order: what the products for small
// batches (kernels/cpu/masked_linear_bitmap.h) and for bfloat16 (masked_linear_pairs.h) read.
#pragma once

#include "kernels/cpu/masked_linear_bitmap.h"
#include "kernels/cpu/masked_linear_pairs.h"
#include "ops/pattern.h"

namespace fastprune {

struct BitmapWeight {
  BitmapView view{};
  Shared masks, start, values;
  Magnitudes magnitudes;  // of the values, bfloat16 only
  int64_t value_bytes() const;
  bool same_values(const BitmapWeight& other) const;
};

// Columns of a block of pairs, for the pattern of a linear weight.
int64_t pairs_width(const PatternView& forward);

struct PairsWeight {
  PairsView view{};
  Windows windows;
  Shared group_ptr, row_at, entries;
  uint32_t smallest = 0;  // absolute value that is not zero, as bits
  int64_t entry_bytes() const;
  bool same_values(const PairsWeight& other) const;
};

// What a plan keeps of the forms. Their parts of the pattern stay when values are forgotten; values
// are never written where a call may still read them. Not locked: the plan's mutex is held.
class LinearForms {
 public:
  // What is kept; null where nothing is.
  std::shared_ptr<const BitmapWeight> bitmap() const { return bitmap_; }
  std::shared_ptr<const PairsWeight> pairs(bool transposed) const { return pairs_[transposed]; }
  // New values, read from the weight.
  std::shared_ptr<const BitmapWeight> read_bitmap(const PatternView& forward, DType dtype,
                                                  const void* weight);
  std::shared_ptr<const PairsWeight> read_pairs(const PatternView& forward, bool transposed,
                                                const void* weight);
  void keep(std::shared_ptr<const BitmapWeight> form) { bitmap_ = std::move(form); }
  void keep(bool transposed, std::shared_ptr<const PairsWeight> form);
  void forget_values();
  int64_t bytes() const;

 private:
  std::shared_ptr<const BitmapWeight> bitmap_;
  std::shared_ptr<const PairsWeight> pairs_[2];  // forward, transposed
  // The same without values, or with outdated ones (offsets and values of pairs share memory).
  std::shared_ptr<const BitmapWeight> bitmap_index_;
  std::shared_ptr<const PairsWeight> pairs_index_[2];
};

}  // namespace fastprune
