#include "ops/pattern.h"

#include <atomic>
#include <tuple>

namespace fastprune {
namespace {

constexpr int64_t kMaxBlockCols = 32767;  // an offset is a non-negative int16

void check_shape(const PatternShape& s, const char* op) {
  STD_TORCH_CHECK(s.groups >= 1 && s.rows >= 0 && s.rows % s.groups == 0, op,
                  ": groups: expected a positive divisor of the ", s.rows, " rows, got ", s.groups);
  STD_TORCH_CHECK(s.taps >= 1 && s.depth >= 0, op, ": taps: expected at least 1, got ", s.taps);
  for (int64_t block : {s.block_depth, s.transposed_block_depth}) {
    STD_TORCH_CHECK(block >= 1 && checked_product(block, s.taps, op) <= kMaxBlockCols, op,
                    ": block_depth: expected at least 1 and at most ", kMaxBlockCols / s.taps,
                    ", got ", block);
  }
  checked_product(s.rows, checked_product(s.depth, s.taps, op), op);
}

// The kernels see a bool mask; the packed pattern and its transpose come back.
std::tuple<Tensor, Tensor, Tensor, Tensor> pack_pattern(const Tensor& mask_in, int64_t groups,
                                                        int64_t taps, int64_t block_depth,
                                                        int64_t transposed_block_depth) {
  const char* op = "pack_pattern";
  check_cpu(mask_in, op, "mask");
  const PatternShape shape =
      validate_pack_pattern(mask_in, groups, taps, block_depth, transposed_block_depth);
  const Tensor mask = dense(mask_in);
  PatternView forward = view_of(shape, false), transposed = view_of(shape, true);
  const int64_t bounds = checked_product(forward.blocks(), forward.rows, op) + 1;
  const int64_t bounds_t = checked_product(transposed.blocks(), transposed.rows, op) + 1;
  Tensor row_ptr = torch::stable::new_empty(mask, {bounds}, ScalarType::Long);
  Tensor row_ptr_t = torch::stable::new_empty(mask, {bounds_t}, ScalarType::Long);
  const uint8_t* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  int64_t* bounds_data = static_cast<int64_t*>(row_ptr.mutable_data_ptr());
  int64_t* bounds_t_data = static_cast<int64_t*>(row_ptr_t.mutable_data_ptr());
  FASTPRUNE_PICK(count_entries)(forward, transposed, bits, bounds_data, bounds_t_data);
  const int64_t nnz = bounds_data[bounds - 1];
  Tensor offset = torch::stable::new_empty(mask, {nnz}, ScalarType::Short);
  Tensor offset_t = torch::stable::new_empty(mask, {nnz}, ScalarType::Short);
  const Scratch cursor(checked_product(bounds_t, 8, op));
  FASTPRUNE_PICK(write_entries)(
      forward, transposed, bits,
      PatternBuffers{bounds_data, static_cast<int16_t*>(offset.mutable_data_ptr())},
      PatternBuffers{bounds_t_data, static_cast<int16_t*>(offset_t.mutable_data_ptr())},
      cursor.as<int64_t>());
  return {row_ptr, offset, row_ptr_t, offset_t};
}

// The same elements in the same order in memory, without gaps: channels_last as well as contiguous.
bool same_dense_layout(const Tensor& a, const Tensor& b) {
  int64_t span = 1;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != 1 && a.stride(i) != b.stride(i)) return false;
    span += (a.size(i) - 1) * a.stride(i);
  }
  return a.numel() == 0 || span == a.numel();
}

Tensor apply_mask(const Tensor& values_in, const Tensor& mask_in) {
  const char* op = "apply_mask";
  check_cpu(values_in, op, "values");
  check_cpu(mask_in, op, "mask");
  check_dtype(mask_in, ScalarType::Bool, op, "mask");
  check_dim(mask_in, values_in.dim(), op, "mask");
  for (int64_t i = 0; i < values_in.dim(); ++i) {
    check_size(mask_in, i, values_in.size(i), op, "mask");
  }
  const DType dtype = dtype_of(values_in, op, "values");
  const bool as_is = same_dense_layout(values_in, mask_in);
  const Tensor values = as_is ? values_in : dense(values_in);
  const Tensor mask = as_is ? mask_in : dense(mask_in);
  Tensor out = torch::stable::empty_like(values);
  const void* from = values.const_data_ptr();
  const uint8_t* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  void* to = out.mutable_data_ptr();
  constexpr int64_t kChunk = 16384;
  const int64_t n = values.numel();
  for_each_range((n + kChunk - 1) / kChunk, 0, [&](int64_t begin, int64_t end, void*) {
    FASTPRUNE_PICK(apply_mask)
    (dtype, from, bits, to, begin * kChunk, end * kChunk < n ? end * kChunk : n);
  });
  return out;
}

}  // namespace

PatternView view_of(const PatternShape& s, bool transposed) {
  PatternView v{};
  v.groups = s.groups;
  v.taps = s.taps;
  v.rows = transposed ? s.groups * s.depth : s.rows;
  v.depth = transposed ? s.rows / s.groups : s.depth;
  v.block_depth = transposed ? s.transposed_block_depth : s.block_depth;
  return v;
}

PatternShape validate_pack_pattern(const Tensor& mask, int64_t groups, int64_t taps,
                                   int64_t block_depth, int64_t transposed_block_depth) {
  const char* op = "pack_pattern";
  check_dtype(mask, ScalarType::Bool, op, "mask");
  check_dim(mask, 2, op, "mask");
  STD_TORCH_CHECK(taps >= 1 && mask.size(1) % taps == 0, op,
                  ": taps: expected a positive divisor of the ", mask.size(1), " columns, got ",
                  taps);
  const PatternShape shape{mask.size(0), groups,      mask.size(1) / taps,
                           taps,         block_depth, transposed_block_depth};
  check_shape(shape, op);
  return shape;
}

PatternView validate_pattern(const Tensor& row_ptr, const Tensor& offset, const Tensor& first,
                             const PatternShape& shape, bool transposed, const char* op) {
  check_shape(shape, op);
  PatternView v = view_of(shape, transposed);
  const char* row_ptr_name = transposed ? "transposed_row_ptr" : "row_ptr";
  const char* offset_name = transposed ? "transposed_offset" : "offset";
  check_same_device(row_ptr, first, op, row_ptr_name, "the other arguments");
  check_same_device(offset, first, op, offset_name, "the other arguments");
  check_dtype(row_ptr, ScalarType::Long, op, row_ptr_name);
  check_dtype(offset, ScalarType::Short, op, offset_name);
  check_dim(row_ptr, 1, op, row_ptr_name);
  check_dim(offset, 1, op, offset_name);
  STD_TORCH_CHECK(row_ptr.is_contiguous() && offset.is_contiguous(), op, ": ", row_ptr_name,
                  ": expected contiguous index tensors");
  check_size(row_ptr, 0, checked_product(v.blocks(), v.rows, op) + 1, op, row_ptr_name);
  v.nnz = offset.numel();
  v.row_ptr = static_cast<const int64_t*>(row_ptr.const_data_ptr());
  v.offset = static_cast<const int16_t*>(offset.const_data_ptr());
  return v;
}

PatternView checked_pattern(const Tensor& row_ptr, const Tensor& offset, const PatternShape& shape,
                            bool transposed, const char* op) {
  check_cpu(row_ptr, op, transposed ? "transposed_row_ptr" : "row_ptr");
  const PatternView v = validate_pattern(row_ptr, offset, row_ptr, shape, transposed, op);
  STD_TORCH_CHECK(
      FASTPRUNE_PICK(pattern_is_valid)(v), op, ": ", transposed ? "transposed_row_ptr" : "row_ptr",
      ": expected bounds that start at 0, never decrease and end at the ", v.nnz, " entries of ",
      transposed ? "transposed_offset" : "offset", ", and offsets inside their block");
  return v;
}

Tensor forward_values(const PatternView& forward, const Tensor& weight, const char* op) {
  const DType dtype = dtype_of(weight, op, "weight");
  Tensor values = torch::stable::new_empty(weight, {forward.nnz}, accumulator_type(dtype));
  const void* from = weight.const_data_ptr();
  void* to = values.mutable_data_ptr();
  for_each_range(forward.rows, 0, [&](int64_t begin, int64_t end, void*) {
    FASTPRUNE_PICK(gather_values)(forward, dtype, from, to, begin, end);
  });
  return values;
}

Tensor transposed_values(const PatternView& forward, const PatternView& transposed,
                         const Tensor& weight, const char* op) {
  const DType dtype = dtype_of(weight, op, "weight");
  STD_TORCH_CHECK(forward.nnz == transposed.nnz, op, ": transposed_offset: expected the ",
                  forward.nnz, " entries of offset, got ", transposed.nnz);
  Tensor values = torch::stable::new_empty(weight, {transposed.nnz}, accumulator_type(dtype));
  const void* from = weight.const_data_ptr();
  void* to = values.mutable_data_ptr();
  std::atomic<bool> agree{true};
  for_each_range(transposed.groups * transposed.blocks(), transposed.rows * 16,
                 [&](int64_t begin, int64_t end, void* cursor) {
                   if (!FASTPRUNE_PICK(gather_transposed_values)(forward, transposed, dtype, from,
                                                                 to, static_cast<int64_t*>(cursor),
                                                                 true, begin, end)) {
                     agree = false;
                   }
                 });
  STD_TORCH_CHECK(agree.load(), op,
                  ": transposed_offset: expected the transpose of the pattern in offset");
  return values;
}

void scatter_to_dense(const PatternView& forward, DType dtype, const void* values,
                      Tensor& weight_grad) {
  void* to = weight_grad.mutable_data_ptr();
  // Ranges of whole windows of a group, where the rows of the pattern are sorted.
  const int64_t rows_per_group = forward.rows / forward.groups;
  const int64_t step = forward.row_at == nullptr ? 1
                       : forward.groups == 1     ? kRowWindow
                                                 : rows_per_group;
  for_each_range((forward.rows + step - 1) / (step < 1 ? 1 : step), 0,
                 [&](int64_t begin, int64_t end, void*) {
                   const int64_t last = end * step < forward.rows ? end * step : forward.rows;
                   FASTPRUNE_PICK(scatter_values)(forward, dtype, values, to, begin * step, last);
                 });
}

std::optional<Tensor> checked_bias(const std::optional<Tensor>& bias, int64_t rows, const Tensor& x,
                                   const char* op) {
  if (!bias.has_value()) return std::nullopt;
  check_same_device(*bias, x, op, "bias", "x");
  check_dim(*bias, 1, op, "bias");
  check_size(*bias, 0, rows, op, "bias");
  check_dtype(*bias, x.scalar_type(), op, "bias");
  return dense(torch::stable::to(*bias, accumulator_type(dtype_of(*bias, op, "bias"))));
}

std::vector<int64_t> Windows::balanced(int64_t parts) const {
  const auto entries = [&](size_t w) { return static_cast<double>(entries_end_[w]); };
  const size_t n = entries_end_.size();
  std::vector<int64_t> bounds{0};
  size_t w = 0;
  for (int64_t part = 1; part < parts; ++part) {
    const double wanted =
        n == 0 ? 0 : entries(n - 1) * static_cast<double>(part) / static_cast<double>(parts);
    while (w < n && entries(w) <= wanted) ++w;
    // The window that crosses the bound goes to the side where more of it lies.
    if (w < n && 2 * wanted > (w == 0 ? 0 : entries(w - 1)) + entries(w)) ++w;
    bounds.push_back(w == 0 ? 0 : row_end_[w - 1]);
  }
  bounds.push_back(n == 0 ? 0 : row_end_[n - 1]);
  return bounds;
}

Cuts cut_product(int64_t items, int64_t rows) {
  Cuts cuts{items, 1, rows, {}};
  const int64_t threads = thread_count();
  if (rows > 0 && items > 0 && items < threads) {
    // Every part packs the panel anew: no more parts than threads.
    const int64_t parts = (threads + items - 1) / items;
    cuts.parts = parts < rows ? parts : rows;
  }
  return cuts;
}

Cuts cut_rows(int64_t rows) {
  const int64_t threads = thread_count();
  return Cuts{rows == 0 ? 0 : 1, rows == 0 ? 1 : rows < threads ? rows : threads, rows, {}};
}

}  // namespace fastprune

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def(
      "pack_pattern(Tensor mask, int groups, int taps, int block_depth, "
      "int transposed_block_depth) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("apply_mask(Tensor values, Tensor mask) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("pack_pattern", TORCH_BOX(&fastprune::pack_pattern));
  m.impl("apply_mask", TORCH_BOX(&fastprune::apply_mask));
}
