// global_topk_mask: the checks that every device entry shares.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cpu/global_topk_mask.h"
#include "ops/common.h"

namespace fastprune {

// row: as neuron, with a count for each row of each tensor, tensor after tensor.
enum class TopkScope : int { global, layer, neuron, filter, row };

// How scores are made, apart from the tensors.
struct TopkOptions {
  std::string scope, score;
  std::vector<double> scale;  // one per tensor, or none: 1
  int64_t seed = 0;           // of the noise
  bool packed = false;        // masks of bits, in flat uint8 tensors of ceil(numel / 8)
};

// A checked call: masks allocated but not written, pointers into both.
struct TopkCall {
  TopkScope scope;
  TopkScore score;
  bool lamp = false;  // scores are those of LAMP; `score` is then that of the order in a tensor
  bool scaled = false, packed = false;
  uint64_t seed = 0;
  std::vector<Tensor> held;   // what the pointers below point into
  std::vector<Tensor> masks;  // all tensors' for each selection
  std::vector<std::unique_ptr<TopkStrides>> strides;
  std::vector<TopkTensor> tensors;  // with the masks of the first selection
  std::vector<int64_t> rows;        // per tensor, for the scopes neuron, filter and row
  // Kept: one per selection, or one per tensor (a single selection) for the scopes layer and
  // neuron, or one per row.
  std::vector<int64_t> counts;

  TopkProblem problem(const std::vector<TopkTensor>& of) const {
    return {of.data(), score, false, scaled, packed, seed};
  }
  // The tensors with the masks of a selection.
  std::vector<TopkTensor> masked(size_t selection) const;
  int64_t cols(size_t i) const { return rows[i] == 0 ? 0 : tensors[i].numel / rows[i]; }
};

// Throws unless the arguments describe a selection; only the number of candidates inside `within`
// and the scores themselves are left to check. An empty `other` or `within` means not given.
TopkCall validate_global_topk_mask(const std::vector<Tensor>& values,
                                   const std::vector<Tensor>& other,
                                   const std::vector<Tensor>& within,
                                   const std::vector<int64_t>& counts, const TopkOptions& options);

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

// Scores in float64: keys of 64 bits.
inline bool is_wide(TopkScore score, const TopkTensor& t) {
  return score == TopkScore::noise || t.dtype == DType::f64 ||
         (t.other != nullptr && t.other_dtype == DType::f64);
}

inline std::string take_string(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

}  // namespace fastprune
