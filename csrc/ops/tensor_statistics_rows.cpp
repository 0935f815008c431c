// Power means of every row of many tensors, in one read: what an index of each neuron is made of.
//
// A row's result is a function of its elements alone, and the same to the bit as that of a tensor
// of the same elements.

#include <atomic>
#include <tuple>

#include "ops/tensor_statistics.h"

namespace fastprune {
namespace {

std::tuple<Tensor, Tensor> row_power_means_cpu(const std::vector<Tensor>& tensors,
                                               const std::vector<Tensor>& within,
                                               const std::vector<double>& p) {
  const StatisticsCall call = validate_tensor_statistics(tensors, within, p);
  check_cpu(tensors[0], kStatisticsOp, "tensors[0]");
  const int64_t n = static_cast<int64_t>(tensors.size()), n_powers = static_cast<int64_t>(p.size());
  std::vector<int64_t> first{0};  // row of each tensor
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(tensors[i].dim() > 0, kStatisticsOp, ": tensors[", i,
                    "]: expected at least 1 dimension, got a scalar");
    int64_t next = 0;
    STD_TORCH_CHECK(!__builtin_add_overflow(first.back(), tensors[i].size(0), &next), kStatisticsOp,
                    ": tensors: the number of rows does not fit 64 bits");
    first.push_back(next);
  }
  const Tensor counts = torch::stable::new_empty(tensors[0], {first.back()}, ScalarType::Long);
  const Tensor means =
      torch::stable::new_empty(tensors[0], {first.back(), n_powers}, ScalarType::Double);
  int64_t* const count = static_cast<int64_t*>(counts.mutable_data_ptr());
  double* const mean = static_cast<double*>(means.mutable_data_ptr());
  std::atomic<int64_t> bad{n};  // first tensor with a NaN
  for_each_range(first.back(), 0, [&](int64_t begin, int64_t end, void*) {
    std::vector<ScaledSum> sums(p.size()), chunk(p.size());
    int64_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t r = begin; r < end; ++r) {
      while (r >= first[i + 1]) ++i;
      const StatisticsTensor& t = call.tensors[i];
      const int64_t cols = t.numel / (first[i + 1] - first[i]), start = (r - first[i]) * cols;
      StatisticsPart row = nothing_found();
      sums.assign(p.size(), ScaledSum{});
      for (int64_t at = 0; at < cols && !row.has_nan; at += kStatisticsChunk) {
        StatisticsPart part;
        FASTPRUNE_PICK(statistics_chunk)
        (t, start + at, start + std::min(at + kStatisticsChunk, cols), p.data(), n_powers, &part,
         chunk.data());
        accumulate(row, part);
        for (int64_t j = 0; j < n_powers; ++j) accumulate(sums[j], chunk[j]);
      }
      if (row.has_nan) {
        int64_t known = bad.load();
        while (i < known && !bad.compare_exchange_weak(known, i)) {
        }
        return;
      }
      count[r] = row.count;
      for (int64_t j = 0; j < n_powers; ++j) {
        const double m = sums[j].hi + sums[j].lo;
        const bool regular = m > 0.0 && std::isfinite(m);
        mean[r * n_powers + j] =
            regular ? root(m / static_cast<double>(row.count), sums[j].exponent, p[j]) : m;
      }
    }
  });
  STD_TORCH_CHECK(bad.load() == n, kStatisticsOp, ": tensors[", bad.load(), "]: an element is NaN");
  return {counts, means};
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def("row_power_means(Tensor[] tensors, Tensor[] within, float[] p) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("row_power_means", TORCH_BOX(&fastprune::row_power_means_cpu));
}
