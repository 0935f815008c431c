// How a fully connected equilibrium is laid out on the CPU, and which way tests and benches insist
// on. Knows nothing of torch: one switch for the module.
#pragma once

namespace fastprune {

enum class MonForm {
  automatic,   // by the costs in kernels/cpu/mon_samples.cpp
  by_feature,  // samples in the lanes (kernels/cpu/mon_splitting.h)
  by_sample,   // features in the lanes (kernels/cpu/mon_samples.h), where the matrix allows it
};

// False for unknown names. For the whole process, for the calls that begin later.
bool set_mon_form(const char* name);
MonForm wanted_mon_form();

// What the last solve with a dense matrix took; "auto" before the first one.
void note_mon_form(MonForm form);
const char* last_mon_form();

}  // namespace fastprune
