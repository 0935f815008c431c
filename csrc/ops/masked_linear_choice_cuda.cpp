#include "ops/masked_linear_choice_cuda.h"

namespace fastprune {
namespace {

enum class Kind { half, tf32, strict, f64 };  // half: bfloat16 and float16

// The first rule that holds decides: batches to `batch`, densities to `density`.
struct Rule {
  Kind kind;
  int64_t batch;
  double density;
  CudaForm form;
};

constexpr int64_t kAnyBatch = int64_t{1} << 62;

// By analysis (bytes, instructions, shared memory and matrix rate of an H200: kernels/README.md);
// not yet measured on a GPU. half: deltas are 3 d bytes per weight, up to d = 0.5 less than the
// 4 d - 2 d^2 + 0.07 of tiles, but the activations that they gather for each entry cost them more
// with the batch: equal at d = 0.2 for a batch of 8, while 16 rows take as long to stage as tiles
// take for all of it. Tiles beat dense at most by 1.5 at d = 0.4 and by 1.3 at 0.5. From a batch of
// 64 on shared memory, the matrix rate of fragments that warps load, and partial sums (about 4 us
// of dense's 31 at 8192 x 8192) stand against dense.
constexpr Rule kRules[] = {
    {Kind::half, 2, 0.45, CudaForm::deltas},
    {Kind::half, 4, 0.30, CudaForm::deltas},
    {Kind::half, 8, 0.18, CudaForm::deltas},
    {Kind::half, 8, 0.45, CudaForm::bitmap},
    {Kind::half, 16, 0.03, CudaForm::deltas},
    {Kind::half, 32, 0.45, CudaForm::tensor_core},
    {Kind::half, 64, 0.25, CudaForm::tensor_core},
    {Kind::half, kAnyBatch, 0.04, CudaForm::panel},
    {Kind::tf32, 4, 0.60, CudaForm::deltas},
    {Kind::tf32, 8, 0.40, CudaForm::deltas},
    {Kind::tf32, 64, 0.60, CudaForm::tensor_core},
    {Kind::tf32, kAnyBatch, 0.04, CudaForm::panel},
    {Kind::strict, 4, 0.60, CudaForm::deltas},
    {Kind::strict, 8, 0.40, CudaForm::deltas},
    {Kind::strict, kAnyBatch, 0.33, CudaForm::panel},
    {Kind::f64, kAnyBatch, 0.10, CudaForm::panel},
};

constexpr int64_t kDeltasBatch = 32, kBitmapBatch = 8, kTensorCoreBatch = 128;
constexpr int64_t kTilesCols = int64_t{1} << 28;  // values of a strip are counted in 32 bits

// Weight gradients. By analysis, not yet measured on a GPU: against 50 TFLOP/s of strict float32
// the sampled one breaks even at a density of about 0.26 (kernels/README.md); its batch is padded
// to slices of 64, and its launches cost a product of 2^30 terms (43 us when dense) a fifth.
constexpr double kSampledDensity = 0.17, kSampledProducts = 1073741824.0;
constexpr int64_t kSampledBatch = 64;
// Units are counted in 32 bits, and so are rows times slices.
constexpr int64_t kSampledEntries = int64_t{1} << 30, kSampledRows = int64_t{1} << 24;

Kind kind_of(const CudaProduct& p) {
  if (p.dtype == DType::f64) return Kind::f64;
  if (p.dtype == DType::f32) return p.tf32 ? Kind::tf32 : Kind::strict;
  return Kind::half;
}

}  // namespace

bool cuda_form_serves(CudaForm form, const CudaProduct& p) {
  const Kind kind = kind_of(p);
  const bool tensor_cores = kind == Kind::half || kind == Kind::tf32;
  switch (form) {
    case CudaForm::automatic:
    case CudaForm::sampled:
      return false;
    case CudaForm::deltas:
      return kind != Kind::f64 && p.batch <= kDeltasBatch && p.nnz > 0;
    case CudaForm::bitmap:
      return tensor_cores && p.batch <= kBitmapBatch && p.cols < kTilesCols && p.nnz > 0;
    case CudaForm::tensor_core:
      return tensor_cores && p.batch <= kTensorCoreBatch && p.cols < kTilesCols && p.nnz > 0;
    case CudaForm::panel:
      return p.nnz > 0;
    default:
      return true;
  }
}

CudaForm choose_cuda_form(const CudaProduct& p) {
  const CudaForm wanted = wanted_cuda_form();
  if (cuda_form_serves(wanted, p)) return wanted;
  const double density =
      static_cast<double>(p.nnz) / static_cast<double>(p.rows) / static_cast<double>(p.cols);
  for (const Rule& rule : kRules) {
    if (rule.kind == kind_of(p) && p.batch <= rule.batch && density <= rule.density &&
        cuda_form_serves(rule.form, p)) {
      return rule.form;
    }
  }
  return CudaForm::dense;
}

bool sample_weight_grad(const CudaProduct& p) {
  if (p.dtype != DType::f32 || p.nnz > kSampledEntries || p.rows > kSampledRows) return false;
  const CudaForm wanted = wanted_cuda_form();
  if (wanted == CudaForm::sampled) return true;
  if (wanted == CudaForm::dense || p.tf32 || p.batch < kSampledBatch) return false;
  const double weights = static_cast<double>(p.rows) * static_cast<double>(p.cols);
  return weights * static_cast<double>(p.batch) >= kSampledProducts &&
         static_cast<double>(p.nnz) <= kSampledDensity * weights;
}

}  // namespace fastprune
