#include "ops/masked_linear_choice.h"

#include <mutex>

namespace fastprune {

#if defined(__x86_64__)

namespace {

constexpr int64_t kScanned = 1 << 16;  // elements of x that one thread looks at in one go

// The bitmap's time does not depend on the density: it expands all weights, once for every part of
// the batch, and multiplies them by every entry. That of the other products hardly depends on a
// batch that fits one tile. Milliseconds for 4096 x 4096 weights (Zen 5); what counts is where they
// cross. For few rows, packing x is what takes the time.
bool bitmap_pays(const PatternView& p, DType dtype, int64_t batch) {
  if (batch > 2 * kBitmapMaxBatch || p.rows < 4 * kBitmapRows) return false;
  const double density =
      static_cast<double>(p.nnz) / static_cast<double>(p.rows) / static_cast<double>(p.depth);
  const double parts = batch > kBitmapMaxBatch ? 2 : 1, n = static_cast<double>(batch);
  return dtype == DType::bf16 ? 0.2 * parts + 0.045 * n < 0.06 + 3.3 * density
                              : 0.5 * parts + 0.08 * n < 0.1 + 7 * density;
}

// Groups of eight leave much of a short row to zeros: half tiles are then better off in float32.
constexpr int64_t kPairsLeastEntries = 24;  // of a row in a block, on average
bool pairs_pay(const PatternView& p, bool transposed, int64_t batch) {
  const int64_t cols = transposed ? p.rows : p.depth, rows = transposed ? p.depth : p.rows;
  const int64_t blocks = (cols + pairs_width(p) - 1) / pairs_width(p);
  return batch > kPairsTile / 2 || p.nnz >= kPairsLeastEntries * rows * blocks;
}

uint32_t infinity_bits(DType dtype) {
  return dtype == DType::f32 ? 0x7f800000u : dtype == DType::bf16 ? 0x7f80u : 0x7c00u;
}

// vdpbf16ps takes subnormal inputs for zeros and gives zeros for subnormal sums. With the smallest
// exponents of x and weight, every product and hence every sum is a multiple of 2^(ex + ew - 14);
// if that is no subnormal, nothing was flushed.
bool never_subnormal(uint32_t smallest_x, uint32_t smallest_weight) {
  constexpr int64_t kBias = 127, kLeast = -126;
  const int64_t ex = smallest_x >> 7, ew = smallest_weight >> 7;  // biased; 0: subnormal
  return ex > 0 && ew > 0 && (ex - kBias) + (ew - kBias) - 14 >= kLeast;
}

Magnitudes scan(const MaskedLinearArgs& a, int64_t n) {
  Magnitudes found;
  std::mutex mutex;
  const char* x = static_cast<const char*>(a.x);
  const int64_t size = a.dtype == DType::f32 ? 4 : 2;
  for_each_range((n + kScanned - 1) / kScanned, 0, [&](int64_t begin, int64_t end, void*) {
    const int64_t first = begin * kScanned, last = end * kScanned < n ? end * kScanned : n;
    const Magnitudes here =
        FASTPRUNE_PICK_AVX512(magnitudes)(a.dtype, x + first * size, last - first);
    const std::lock_guard<std::mutex> lock(mutex);
    found.merge(here);
  });
  return found;
}

void multiply_by_bitmap(const BitmapView& w, const MaskedLinearArgs& args) {
  const Scratch packed(FASTPRUNE_PICK_AVX512(bitmap_x_bytes)(w, args.batch));
  FASTPRUNE_PICK_AVX512(bitmap_pack_x)(w, args, packed.as<void>());
  const int64_t bundle = BatchParts(args.batch).bundle();
  for_each_range((w.groups() + bundle - 1) / bundle, 0, [&](int64_t begin, int64_t end, void*) {
    FASTPRUNE_PICK_AVX512(bitmap_product)(w, args, packed.as<void>(), begin, end);
  });
}

void multiply_by_pairs(const PairsWeight& w, const MaskedLinearArgs& args) {
  Cuts cuts = cut_product((args.batch + kPairsTile - 1) / kPairsTile, w.view.rows);
  if (cuts.parts > 1) cuts.bounds = w.windows.balanced(cuts.parts);
  const int64_t scratch = avx512_bf16::pairs_scratch(w.view, cuts.rows_per_part());
  for_each_cut(cuts, scratch,
               [&](int64_t begin, int64_t end, int64_t row_begin, int64_t row_end, void* memory) {
                 for (int64_t i = begin; i < end; ++i) {
                   avx512_bf16::pairs_product(w.view, args, i, row_begin, row_end, memory);
                 }
               });
}

}  // namespace

bool multiply_by_form(const LinearWeight& weight, bool transposed, const MaskedLinearArgs& args) {
  if (weight.plan == nullptr || weight.dense == nullptr) return false;
  const PatternView& p = weight.plan->forward();
  if (p.nnz == 0 || args.batch == 0) return false;
  const Isa isa = current_isa();
  const DType dtype = args.dtype;
  const bool all_dtypes = isa == Isa::avx512_bf16 && dtype != DType::f64;
  const bool known = all_dtypes || (isa == Isa::avx512 && dtype == DType::f32);
  const bool small = known && !transposed && bitmap_pays(p, dtype, args.batch);
  const bool pairs = all_dtypes && dtype == DType::bf16 && pairs_pay(p, transposed, args.batch);
  if (!small && !pairs) return false;
  const Magnitudes x = scan(args, args.batch * (transposed ? p.rows : p.depth));
  const bool exact = dtype != DType::bf16;
  // The bitmap multiplies absent weights too, by zero: not what 0 * inf would allow.
  if (small && x.largest < infinity_bits(dtype)) {
    const auto form = weight.plan->bitmap(*weight.dense, weight.version, "masked_linear");
    if (!exact && !never_subnormal(x.smallest, form->magnitudes.smallest)) return false;
    multiply_by_bitmap(form->view, args);
    return true;
  }
  if (!pairs) return false;
  const auto form = weight.plan->pairs(transposed, *weight.dense, weight.version, "masked_linear");
  if (!never_subnormal(x.smallest, form->smallest)) return false;
  multiply_by_pairs(*form, args);
  return true;
}

#else

bool multiply_by_form(const LinearWeight&, bool, const MaskedLinearArgs&) { return false; }

#endif

}  // namespace fastprune
