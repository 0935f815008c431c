// The product for few batch entries: the weight is kept as a bitmap and the values that it marks,
// and what is loaded as sparse is multiplied as dense.
//
// Sixteen rows of the weight are a group. A step of a group is its next column (its next two in
// bfloat16, whose multiplications come in pairs): one mask says which of these weights exist, and
// an expanding load spreads their values over a vector, with zeros where there is no weight. The
// zeros are multiplied: x must be finite for absent weights to stay absent.
#pragma once

#include "kernels/cpu/masked_linear.h"

namespace fastprune {

constexpr int64_t kBitmapRows = 16;     // of a group
constexpr int64_t kBitmapMaxBatch = 8;  // batch entries that are computed together

// How a batch is cut into parts of at most kBitmapMaxBatch entries, of about the same size.
struct BatchParts {
  int64_t batch, parts;
  explicit BatchParts(int64_t n) : batch(n), parts((n + kBitmapMaxBatch - 1) / kBitmapMaxBatch) {}
  int64_t begin(int64_t part) const { return batch * part / parts; }
  // Groups that are computed together: as many as have room for their sums in the registers.
  // Threads get these bundles, and a bundle's weights stay in L2 from one part to the next.
  int64_t bundle() const { return batch / parts <= 6 ? 4 : 3; }
};

struct BitmapView {
  int64_t rows, cols;
  DType dtype;  // f32, bf16 or f16
  // For every group and step: uint16_t, bit i for row i; in bfloat16 uint32_t, bits 2 i and 2 i + 1
  // for the two columns of row i.
  const void* masks;
  const int64_t* start;  // groups() + 1: the first value of each group
  const void* values;    // in the order of the masks' bits; 64 readable bytes follow the last

  int64_t groups() const { return (rows + kBitmapRows - 1) / kBitmapRows; }
  int64_t step_cols() const { return dtype == DType::bf16 ? 2 : 1; }
  int64_t steps() const { return (cols + step_cols() - 1) / step_cols(); }
  int64_t mask_bytes() const { return groups() * steps() * (dtype == DType::bf16 ? 4 : 2); }
};

// Of absolute values, as the bits of their dtype: the smallest that is not zero (all ones where
// there is none) and the largest; a NaN counts as larger than infinity.
struct Magnitudes {
  uint32_t smallest = ~uint32_t{0}, largest = 0;
  void merge(const Magnitudes& other) {
    smallest = other.smallest < smallest ? other.smallest : smallest;
    largest = other.largest > largest ? other.largest : largest;
  }
};

// avx512 knows f32 only, avx512_bf16 all three dtypes.
#if defined(__x86_64__)
FASTPRUNE_PER_AVX512(
    // Fills in masks and start for the pattern of a linear layer.
    void bitmap_index(const PatternView& forward, DType dtype, void* masks, int64_t* start);
    // Writes the values of the groups [begin, end) and reports their magnitudes (bf16 only).
    Magnitudes bitmap_values(const BitmapView& bitmap, const void* weight, void* values,
                             int64_t begin, int64_t end);
    Magnitudes magnitudes(DType dtype, const void* x, int64_t n);
    // Bytes of the packed activations, and packing them: x as in the args of the product.
    int64_t bitmap_x_bytes(const BitmapView& bitmap, int64_t batch);
    void bitmap_pack_x(const BitmapView& bitmap, const MaskedLinearArgs& args, void* packed);
    // The bundles [begin, end) of BatchParts::bundle() groups of y. The args' pattern and values
    // are not looked at.
    void bitmap_product(const BitmapView& bitmap, const MaskedLinearArgs& args, const void* packed,
                        int64_t begin, int64_t end);)
#endif

}  // namespace fastprune
