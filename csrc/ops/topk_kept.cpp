// What masks keep: counts, least scores and sums of scores.
#include <cmath>

#include "ops/global_topk_mask.h"
#include "ops/topk_selection.h"

namespace fastprune {
namespace {

constexpr const char* kOp = kTopkOp;

// Per tensor: kept elements, the least of their scores and the sum of their scores, as float64.
Tensor topk_kept_cpu(const std::vector<Tensor>& values, const std::vector<Tensor>& other,
                     const std::vector<Tensor>& masks, StringHandle score,
                     const std::vector<double>& scale, int64_t seed) {
  const bool packed = !masks.empty() && masks[0].scalar_type() == ScalarType::Byte;
  const std::vector<int64_t> none{0};
  TopkCall call = validate_global_topk_mask(values, other, {}, none,
                                            {"global", take_string(score), scale, seed, packed});
  check_cpu(values[0], kOp, "values[0]");
  STD_TORCH_CHECK(!call.lamp, kOp, ": score: expected another than 'lamp'");
  STD_TORCH_CHECK(masks.size() == values.size(), kOp, ": masks: expected ", values.size(),
                  " tensors, one for each of values, got ", masks.size());
  for (size_t i = 0; i < masks.size(); ++i) {
    STD_TORCH_CHECK(masks[i].scalar_type() == call.masks[i].scalar_type() &&
                        masks[i].is_contiguous() && same_shape(masks[i], call.masks[i]),
                    kOp, ": masks[", i, "]: expected a contiguous mask of values[", i, "]");
  }
  call.masks = masks;
  const std::vector<TopkTensor> tensors = call.masked(0);
  TopkProblem problem = call.problem(tensors);
  std::vector<TopkSpan> spans;
  for (size_t i = 0; i < tensors.size(); ++i) {
    problem.wide |= is_wide(call.score, tensors[i]);
    for (int64_t at = 0; at < tensors[i].numel; at += kTopkChunk) {
      spans.push_back({static_cast<int64_t>(i), at, std::min(at + kTopkChunk, tensors[i].numel)});
    }
  }
  std::vector<TopkKept> parts(spans.size());
  for_each_range(static_cast<int64_t>(spans.size()), 0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t s = begin; s < end; ++s) parts[s] = FASTPRUNE_PICK(topk_kept)(problem, spans[s]);
  });
  const int64_t sizes[] = {static_cast<int64_t>(tensors.size()), 3};
  Tensor result = torch::stable::new_empty(values[0], {sizes, 2}, ScalarType::Double);
  double* out = static_cast<double*>(result.mutable_data_ptr());
  for (size_t i = 0; i < tensors.size(); ++i) {
    out[3 * i] = 0.0, out[3 * i + 1] = INFINITY, out[3 * i + 2] = 0.0;
  }
  for (size_t s = 0; s < spans.size(); ++s) {
    double* of = out + 3 * spans[s].tensor;
    of[0] += static_cast<double>(parts[s].count);
    of[1] = std::min(of[1], parts[s].least);
    of[2] += parts[s].sum;
  }
  return result;
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def(
      "topk_kept(Tensor[] values, Tensor[] other, Tensor[] masks, str score, float[] scale=[], "
      "int seed=0) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("topk_kept", TORCH_BOX(&fastprune::topk_kept_cpu));
}
