// The Python module: build information and the choice of ISA. Tensors never cross it; importing it
// runs the static registrations of the torch ops that are linked in.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "kernels/cpu/isa.h"
#include "ops/cuda_form.h"
#include "ops/mon_form.h"
#include "ops/plan_registry.h"

#if defined(FASTPRUNE_EMULATION)
namespace fastprune::emulation {  // kernels/cuda/emulation.h, which only CUDA sources may include
void configure(uint64_t seed, int multiprocessors);
}
#endif

namespace py = pybind11;

namespace {

py::tuple split(const std::string& text) {
  py::list parts;
  for (size_t begin = 0; begin < text.size();) {
    size_t end = text.find(',', begin);
    if (end == std::string::npos) end = text.size();
    parts.append(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return py::tuple(parts);
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTPRUNE_VERSION;
  info["compiler"] =
#if defined(__clang__)
      "clang " __clang_version__;
#else
      "gcc " __VERSION__;
#endif
  info["built_with_torch"] = FASTPRUNE_BUILT_WITH_TORCH;
  info["cpu_isas"] = split(fastprune::built_isas());
  info["cpu_isa"] = fastprune::isa_name(fastprune::current_isa());
  info["cuda_version"] = FASTPRUNE_CUDA_VERSION;
  info["cuda_architectures"] = split(FASTPRUNE_CUDA_ARCHITECTURES);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
#if defined(FASTPRUNE_EMULATION)
  m.def("configure_emulation", &fastprune::emulation::configure, py::arg("seed") = 0,
        py::arg("multiprocessors") = 4);
#endif
  m.doc() = "fastprune's compiled part: build information and the choice of ISA.";
  m.def("build_info", &build_info);
  m.def("isa", [] { return std::string(fastprune::isa_name(fastprune::current_isa())); });
  m.def("release_plan", &fastprune::release_plan);
  m.def("plan_bytes", &fastprune::plan_bytes);
  m.def("set_cuda_form", [](const std::string& name) {
    if (!fastprune::set_cuda_form(name.c_str())) {
      throw py::value_error(
          "form: expected 'auto', 'deltas', 'bitmap', 'tensor_core', 'panel', 'dense' or "
          "'sampled', got '" +
          name + "'");
    }
  });
  m.def("last_mon_form", [] { return std::string(fastprune::last_mon_form()); });
  m.def("set_mon_form", [](const std::string& name) {
    if (!fastprune::set_mon_form(name.c_str())) {
      throw py::value_error("form: expected 'auto', 'by_feature' or 'by_sample', got '" + name +
                            "'");
    }
  });
  m.def("set_isa", [](const std::string& name) {
    if (!fastprune::set_isa(name.c_str())) {
      throw py::value_error("isa: expected one of " + std::string(fastprune::built_isas()) +
                            " that this machine can run (its best is " +
                            fastprune::isa_name(fastprune::best_isa()) + "), got '" + name + "'");
    }
  });
}
