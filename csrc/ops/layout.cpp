// Activations stored with the batch innermost, and the elementwise op that inference puts in the
// place of a BatchNorm that could not be folded.
#include "ops/layout.h"

#include "kernels/cpu/layout.h"

namespace fastprune {

bool is_batch_last(const Tensor& t) {
  if (t.dim() != 4 || t.size(0) < 2 || t.stride(0) != 1) return false;
  int64_t stride = t.size(0);
  for (int64_t i : {3, 2, 1}) {
    if (t.size(i) != 1 && t.stride(i) != stride) return false;
    stride *= t.size(i);
  }
  return stride > t.size(0);  // with one value per image the two layouts are the same
}

Tensor new_activations(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w,
                       bool batch_last) {
  const int64_t sizes[4] = {n, c, h, w};
  const int64_t contiguous[4] = {c * h * w, h * w, w, 1}, last[4] = {1, h * w * n, w * n, n};
  Tensor made = empty_strided(like, sizes, batch_last ? last : contiguous, 4);
  advise_huge_pages(made);
  return made;
}

namespace {

constexpr int64_t kColumns = 256;    // of a transposition, for one thread at a time
constexpr int64_t kElements = 8192;  // of an elementwise op

}  // namespace

Tensor copy_in_layout(const Tensor& x, bool batch_last, const char* op) {
  const DType dtype = dtype_of(x, op, "x");
  const bool from_last = is_batch_last(x);
  Tensor y = new_activations(x, x.size(0), x.size(1), x.size(2), x.size(3), batch_last);
  if (from_last == batch_last) return torch::stable::copy_(y, x);
  const Tensor source = from_last ? x : dense(x);
  const int64_t n = x.size(0), rest = x.size(1) * x.size(2) * x.size(3);
  const int64_t rows = batch_last ? n : rest, cols = batch_last ? rest : n;
  const void* from = source.const_data_ptr();
  void* to = y.mutable_data_ptr();
  for_each_range((cols + kColumns - 1) / kColumns, 0, [&](int64_t begin, int64_t end, void*) {
    FASTPRUNE_PICK(transpose_matrix)
    (dtype, from, rows, cols, to, begin * kColumns, end * kColumns < cols ? end * kColumns : cols);
  });
  return y;
}

namespace {

Tensor convert_layout(const Tensor& x, bool batch_last) {
  const char* op = "convert_layout";
  check_cpu(x, op, "x");
  check_dim(x, 4, op, "x");
  return copy_in_layout(x, batch_last, op);
}

Tensor channel_affine(const Tensor& x_in, const Tensor& scale, const Tensor& shift, bool relu) {
  const char* op = "channel_affine";
  check_cpu(x_in, op, "x");
  check_dim(x_in, 4, op, "x");
  const DType dtype = dtype_of(x_in, op, "x");
  for (const Tensor* t : {&scale, &shift}) {
    const char* name = t == &scale ? "scale" : "shift";
    check_cpu(*t, op, name);
    check_dim(*t, 1, op, name);
    check_size(*t, 0, x_in.size(1), op, name);
    check_dtype(*t, accumulator_type(dtype), op, name);
  }
  const bool last = is_batch_last(x_in);
  const Tensor x = last ? x_in : dense(x_in);
  const Tensor scales = dense(scale), shifts = dense(shift);
  Tensor y = new_activations(x, x.size(0), x.size(1), x.size(2), x.size(3), last);
  const int64_t pixels = x.size(2) * x.size(3), channels = x.size(1);
  const AffineArgs args{dtype,
                        channels,
                        last ? pixels * x.size(0) : pixels,
                        scales.const_data_ptr(),
                        shifts.const_data_ptr(),
                        relu,
                        x.const_data_ptr(),
                        y.mutable_data_ptr()};
  const int64_t planes = last ? channels : channels * x.size(0);
  const int64_t step = args.inner == 0 ? planes + 1 : kElements / args.inner + 1;
  for_each_range((planes + step - 1) / step, 0, [&](int64_t begin, int64_t end, void*) {
    FASTPRUNE_PICK(affine)(args, begin * step, end * step < planes ? end * step : planes);
  });
  return y;
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def("convert_layout(Tensor x, bool batch_last) -> Tensor");
  m.def("channel_affine(Tensor x, Tensor scale, Tensor shift, bool relu) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("convert_layout", TORCH_BOX(&fastprune::convert_layout));
  m.impl("channel_affine", TORCH_BOX(&fastprune::channel_affine));
}
