#include "ops/cuda_form.h"

#include <atomic>
#include <cstring>

namespace fastprune {
namespace {

std::atomic<CudaForm> wanted{CudaForm::automatic};

constexpr struct {
  const char* name;
  CudaForm form;
} kNames[] = {{"auto", CudaForm::automatic}, {"deltas", CudaForm::deltas},
              {"bitmap", CudaForm::bitmap},  {"tensor_core", CudaForm::tensor_core},
              {"panel", CudaForm::panel},    {"dense", CudaForm::dense},
              {"sampled", CudaForm::sampled}};

}  // namespace

bool set_cuda_form(const char* name) {
  for (const auto& known : kNames) {
    if (std::strcmp(known.name, name) != 0) continue;
    wanted = known.form;
    return true;
  }
  return false;
}

CudaForm wanted_cuda_form() { return wanted; }

}  // namespace fastprune
