#include "ops/tensor_statistics.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

namespace fastprune {
namespace {

constexpr const char* kOp = kStatisticsOp;
constexpr double kSmallestP = 0x1p-20, kLargestP = 0x1p20;

}  // namespace

StatisticsCall validate_tensor_statistics(const std::vector<Tensor>& tensors,
                                          const std::vector<Tensor>& within,
                                          const std::vector<double>& p) {
  STD_TORCH_CHECK(!tensors.empty(), kOp, ": tensors: expected at least one tensor, got none");
  STD_TORCH_CHECK(within.empty() || within.size() == tensors.size(), kOp, ": within: expected ",
                  tensors.size(), " tensors, one for each of tensors, got ", within.size());
  for (double x : p) {
    STD_TORCH_CHECK(x >= kSmallestP && x <= kLargestP, kOp,
                    ": p: expected exponents from 2^-20 to 2^20, got ", x);
  }
  StatisticsCall call{};
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::string name = "tensors[" + std::to_string(i) + "]";
    const auto hold = [&](const Tensor& t) {
      call.held.push_back(dense(t));
      return call.held.back().const_data_ptr();
    };
    STD_TORCH_CHECK(tensors[i].device() == tensors[0].device(), kOp, ": ", name,
                    ": expected the device of tensors[0]");
    StatisticsTensor t{nullptr, nullptr, tensors[i].numel(),
                       dtype_of(tensors[i], kOp, name.c_str())};
    STD_TORCH_CHECK(!__builtin_add_overflow(call.elements, t.numel, &call.elements), kOp,
                    ": tensors: the number of elements does not fit 64 bits");
    if (!within.empty()) {
      const std::string other = "within[" + std::to_string(i) + "]";
      const auto a = within[i].sizes(), b = tensors[i].sizes();
      check_dtype(within[i], ScalarType::Bool, kOp, other.c_str());
      STD_TORCH_CHECK(a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()), kOp, ": ",
                      other, ": expected the shape of ", name);
      STD_TORCH_CHECK(within[i].device() == tensors[i].device(), kOp, ": ", other,
                      ": expected the device of ", name);
      t.within = static_cast<const uint8_t*>(hold(within[i]));
    }
    t.values = hold(tensors[i]);
    call.tensors.push_back(t);
  }
  return call;
}

namespace {

// Row i of the results: statistics of tensor i, or of all of them.
struct Results {
  int64_t* counts;  // rows x (count, nonzero)
  double* moments;  // rows x (sum, min, max)
  double* powers;   // (sum, norm, mean) x rows x n_powers
  int64_t rows, n_powers;

  void write(int64_t row, const StatisticsPart& part, const double* p, const ScaledSum* sums) {
    counts[2 * row] = part.count;
    counts[2 * row + 1] = part.nonzero;
    moments[3 * row] = scale_by(part.sum.hi + part.sum.lo, part.sum.exponent);
    moments[3 * row + 1] = part.min + 0.0;  // -0 is 0
    moments[3 * row + 2] = part.max + 0.0;
    for (int64_t i = 0; i < n_powers; ++i) {
      const double m = sums[i].hi + sums[i].lo;
      const int64_t at = row * n_powers + i, plane = rows * n_powers;
      const bool regular = m > 0.0 && std::isfinite(m);
      powers[at] = scale_by(m, sums[i].exponent);
      powers[at + plane] = regular ? root(m, sums[i].exponent, p[i]) : m;
      powers[at + 2 * plane] =
          regular ? root(m / static_cast<double>(part.count), sums[i].exponent, p[i]) : m;
    }
  }
};

Tensor make(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> tensor_statistics_cpu(const std::vector<Tensor>& tensors,
                                                                 const std::vector<Tensor>& within,
                                                                 const std::vector<double>& p,
                                                                 bool gini) {
  const StatisticsCall call = validate_tensor_statistics(tensors, within, p);
  check_cpu(tensors[0], kOp, "tensors[0]");
  const int64_t n = static_cast<int64_t>(call.tensors.size()), n_powers = p.size();

  std::vector<int64_t> first{0};  // chunk of each tensor
  for (const StatisticsTensor& t : call.tensors) {
    first.push_back(first.back() + (t.numel + kStatisticsChunk - 1) / kStatisticsChunk);
  }
  std::vector<StatisticsPart> parts(static_cast<size_t>(first.back()));
  std::vector<ScaledSum> sums(parts.size() * p.size());
  for_each_range(first.back(), 0, [&](int64_t begin, int64_t end, void*) {
    int64_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t c = begin; c < end; ++c) {
      while (c >= first[i + 1]) ++i;
      const int64_t at = (c - first[i]) * kStatisticsChunk;
      const int64_t stop = std::min(at + kStatisticsChunk, call.tensors[i].numel);
      FASTPRUNE_PICK(statistics_chunk)
      (call.tensors[i], at, stop, p.data(), n_powers, &parts[c], sums.data() + c * n_powers);
    }
  });

  const Tensor counts = make(tensors[0], {n + 1, 2}, ScalarType::Long);
  const Tensor moments = make(tensors[0], {n + 1, 3}, ScalarType::Double);
  const Tensor powers = make(tensors[0], {3, n + 1, n_powers}, ScalarType::Double);
  const Tensor indices = make(tensors[0], {gini ? n + 1 : 0}, ScalarType::Double);
  Results results{static_cast<int64_t*>(counts.mutable_data_ptr()),
                  static_cast<double*>(moments.mutable_data_ptr()),
                  static_cast<double*>(powers.mutable_data_ptr()), n + 1, n_powers};
  double* const index = static_cast<double*>(indices.mutable_data_ptr());
  StatisticsPart whole = nothing_found();
  std::vector<ScaledSum> whole_sums(p.size());
  for (int64_t i = 0; i < n; ++i) {
    StatisticsPart part = nothing_found();
    std::vector<ScaledSum> part_sums(p.size());
    for (int64_t c = first[i]; c < first[i + 1]; ++c) {
      accumulate(part, parts[c]);
      for (int64_t j = 0; j < n_powers; ++j) accumulate(part_sums[j], sums[c * n_powers + j]);
    }
    STD_TORCH_CHECK(!part.has_nan, kOp, ": tensors[", i, "]: an element is NaN");
    accumulate(whole, part);
    for (int64_t j = 0; j < n_powers; ++j) accumulate(whole_sums[j], part_sums[j]);
    results.write(i, part, p.data(), part_sums.data());
    if (gini) index[i] = gini_index(&call.tensors[i], 1, part);
  }
  results.write(n, whole, p.data(), whole_sums.data());
  if (gini) index[n] = n == 1 ? index[0] : gini_index(call.tensors.data(), n, whole);
  return {counts, moments, powers, indices};
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def(
      "tensor_statistics(Tensor[] tensors, Tensor[] within, float[] p, bool gini) -> (Tensor, "
      "Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("tensor_statistics", TORCH_BOX(&fastprune::tensor_statistics_cpu));
}
