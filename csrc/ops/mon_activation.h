// The nonlinearities of monotone operator networks by name.
#pragma once

#include <string>

#include "kernels/cpu/mon_activations.h"
#include "ops/common.h"

namespace fastprune {

inline MonActivation mon_activation_of(const std::string& name, const char* op) {
  if (name == "relu") return MonActivation::relu;
  if (name == "tanh") return MonActivation::tanh;
  if (name == "sigmoid") return MonActivation::sigmoid;
  if (name == "softplus") return MonActivation::softplus;
  STD_TORCH_CHECK(name == "identity", op,
                  ": activation: expected relu, tanh, sigmoid, softplus or identity, got ", name);
  return MonActivation::identity;
}

}  // namespace fastprune
