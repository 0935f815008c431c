// global_topk_mask: the checks that every device entry shares.
#pragma once

#include <string>
#include <vector>

#include "kernels/cpu/global_topk_mask.h"
#include "ops/common.h"

namespace fastprune {

enum class TopkScope : int { global, layer, neuron, filter };

// A checked call: tensors contiguous, masks allocated but not written, pointers into both.
struct TopkCall {
  TopkScope scope;
  TopkScore score;
  std::vector<Tensor> held;  // what the pointers below point into
  std::vector<Tensor> masks;
  std::vector<TopkTensor> tensors;
  std::vector<int64_t> rows;    // per tensor, for the scopes neuron and filter
  std::vector<int64_t> counts;  // kept: one, or one per tensor for the scopes layer and neuron

  int64_t cols(size_t i) const { return rows[i] == 0 ? 0 : tensors[i].numel / rows[i]; }
};

// Throws unless the arguments describe a selection; only the number of candidates inside `within`
// and the scores themselves are left to check. An empty `other` or `within` means not given.
TopkCall validate_global_topk_mask(const std::vector<Tensor>& values,
                                   const std::vector<Tensor>& other,
                                   const std::vector<Tensor>& within,
                                   const std::vector<int64_t>& counts, const std::string& scope,
                                   const std::string& score);

}  // namespace fastprune
