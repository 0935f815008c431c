// A weight prepared for panels (ops/panel_weight.h), kept by a plan while it stays.
#pragma once

#include "ops/device_plan.h"
#include "ops/panel_weight.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// `match`: the forward pattern where the direction is the transposed one, which is compared with it
// whenever the weight is read. `weight`: dense, contiguous.
inline PanelWeight kept_panel(DevicePlan& plan, const FormKey& key, const PatternView& pattern,
                              const PatternView* match, const Tensor& weight, int64_t version,
                              const PanelLayout& layout, const CudaCall& call, const char* op) {
  PanelWeight made{pattern, weight, weight, weight};  // until structure() is asked for
  FormMaker maker;
  maker.structure = [&] {
    made = new_panel(pattern, key.dtype, layout, weight, op);
    return std::vector<Tensor>{made.bounds, made.order};
  };
  maker.values = [&] { return made.entries; };
  maker.fill = [&](const FormTensors& kept) {
    fill_panel(call, PanelWeight{pattern, *kept.values, kept.structure[0], kept.structure[1]},
               match != nullptr, match, weight, layout, op);
  };
  const FormTensors kept = plan.form(key, weight, version, call, op, maker);
  return PanelWeight{pattern, *kept.values, kept.structure[0], kept.structure[1]};
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
