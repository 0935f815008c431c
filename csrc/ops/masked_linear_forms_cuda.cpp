#include "ops/masked_linear_forms_cuda.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

using Structure = std::vector<Tensor>;

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

Tensor new_words(const Tensor& like, int64_t n, ScalarType type) {
  return torch::stable::new_empty(like, {n}, type);
}

// f(the mask in the source's order), where the order is the transposed one, over bits for this call
// alone.
template <typename F>
void with_mask(const LinearSource& s, const F& f) {
  if (s.transposed) {
    const TransposedBits transposed = transposed_bits(s.plan, s.call, s.op);
    f(transposed.bits);
  } else {
    f(s.plan.bits());
  }
}

// Running sums of counts that write() fills in.
template <typename F>
Tensor bounds_of(const LinearSource& s, int64_t n, const F& write) {
  const Tensor counts = new_words(s.weight, n, ScalarType::Int);
  Tensor sums = new_words(s.weight, n + 1, ScalarType::Long);
  check_launch(write(data<uint32_t>(counts)), s.op);
  check_launch(exclusive_sums(data<uint32_t>(counts), n, data<int64_t>(sums), s.call.stream()),
               s.op);
  return sums;
}

// structure: codes, segment bounds, group bounds.
DeltasView deltas_view(const LinearSource& s, const Structure& structure) {
  return DeltasView{s.rows(),
                    s.cols(),
                    data<const uint8_t>(structure[0]),
                    data<const int64_t>(structure[1]),
                    data<const int32_t>(structure[2]),
                    structure[2].numel() - 1};
}

Structure deltas_structure(const LinearSource& s) {
  const int64_t groups = deltas_groups(s.rows(), s.call.limits());
  const int64_t segments = (s.cols() + kSegmentCols - 1) / kSegmentCols;
  const int64_t units = deltas_units(s.rows(), s.cols(), s.plan.nnz());
  Tensor codes = new_words(s.weight, units * kUnit, ScalarType::Byte);
  Tensor bound = new_words(s.weight, groups + 1, ScalarType::Int);
  Structure structure;
  with_mask(s, [&](const BitMatrix& mask) {
    Tensor segment = bounds_of(s, checked_product(s.rows(), segments, s.op), [&](uint32_t* counts) {
      return deltas_count(mask, counts, s.call.stream());
    });
    structure = {codes, segment, bound};
    check_launch(deltas_codes(mask, deltas_view(s, structure), data<uint8_t>(codes),
                              data<int32_t>(bound), s.call.stream()),
                 s.op);
  });
  return structure;
}

// structure: heads, first pieces.
TilesView tiles_shape(const LinearSource& s) {
  return TilesView{s.rows(), s.cols(), s.dtype == DType::f32 ? 1 : 2, nullptr, nullptr};
}

TilesView tiles_view(const LinearSource& s, const Structure& structure) {
  TilesView view = tiles_shape(s);
  view.heads = data<const uint32_t>(structure[0]);
  view.start = data<const int64_t>(structure[1]);
  return view;
}

Structure tiles_structure(const LinearSource& s) {
  const TilesView shape = tiles_shape(s);
  const int64_t n = checked_product(shape.bands(), shape.groups(), s.op);
  Tensor heads = new_words(s.weight, checked_product(n, kHeadWords, s.op), ScalarType::Int);
  return {heads, bounds_of(s, n, [&](uint32_t* pieces) {
            return tiles_heads(shape, s.plan.bits(), s.transposed, data<uint32_t>(heads), pieces,
                               s.call.stream());
          })};
}

}  // namespace

DeltasWeight deltas_weight(const LinearSource& s) {
  const FormMaker maker{
      [&] { return deltas_structure(s); },
      [&] {
        const int64_t units = deltas_units(s.rows(), s.cols(), s.plan.nnz());
        return new_words(s.weight, units * kUnit, s.weight.scalar_type());
      },
      [&](const FormTensors& t) {
        check_launch(deltas_values(deltas_view(s, t.structure), s.dtype, s.weight.const_data_ptr(),
                                   s.row_stride(), s.col_stride(), t.values->mutable_data_ptr(),
                                   s.call.limits(), s.call.stream()),
                     s.op);
      }};
  FormTensors tensors = s.plan.form(FormKey{CudaForm::deltas, s.transposed, s.dtype}, s.weight,
                                    s.version, s.call, s.op, maker);
  const DeltasView view = deltas_view(s, tensors.structure);
  return {std::move(tensors), view};
}

TilesWeight tiles_weight(const LinearSource& s) {
  const FormMaker maker{
      [&] { return tiles_structure(s); },
      [&] {
        return new_words(s.weight, tiles_value_bytes(tiles_shape(s), s.plan.nnz()),
                         ScalarType::Byte);
      },
      [&](const FormTensors& t) {
        check_launch(tiles_values(tiles_view(s, t.structure), s.dtype, s.plan.bits(), s.transposed,
                                  s.weight.const_data_ptr(), t.values->mutable_data_ptr(),
                                  s.call.limits(), s.call.stream()),
                     s.op);
      }};
  FormTensors tensors = s.plan.form(FormKey{CudaForm::tensor_core, s.transposed, s.dtype}, s.weight,
                                    s.version, s.call, s.op, maker);
  const TilesView view = tiles_view(s, tensors.structure);
  return {std::move(tensors), view};
}

Tensor masked_weight(const LinearSource& s) {
  const FormMaker maker{
      [] { return Structure{}; },
      [&] { return torch::stable::new_empty(s.weight, {s.plan.bits().rows, s.plan.bits().cols}); },
      [&](const FormTensors& t) {
        check_launch(keep_masked(s.plan.bits(), s.dtype, s.weight.const_data_ptr(),
                                 t.values->mutable_data_ptr(), s.call.limits(), s.call.stream()),
                     s.op);
      }};
  return *s.plan
              .form(FormKey{CudaForm::dense, false, s.dtype}, s.weight, s.version, s.call, s.op,
                    maker)
              .values;
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
