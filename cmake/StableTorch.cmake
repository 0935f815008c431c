# LibTorch stable ABI: the headers of whatever torch the build environment holds (2.11 or newer),
# restricted to what 2.11 offers, so that one binary serves every torch from 2.11 on.

execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
    "import torch, os; print(os.path.dirname(torch.__file__)); print(torch.__version__)"
  OUTPUT_VARIABLE _torch RESULT_VARIABLE _failed OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_VARIABLE _why)
if(_failed)
  message(FATAL_ERROR "fastprune builds against torch 2.11 or newer, and ${Python_EXECUTABLE} "
    "cannot import torch: install torch first, or let pip build in isolation.\n${_why}")
endif()
string(REPLACE "\n" ";" _torch "${_torch}")
list(GET _torch 0 _torch_dir)
list(GET _torch 1 FASTPRUNE_TORCH_VERSION)
if(FASTPRUNE_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "fastprune needs torch 2.11 or newer to build; found ${FASTPRUNE_TORCH_VERSION}.")
endif()

add_library(fastprune_stable_torch_headers INTERFACE)
add_library(fastprune::stable_torch_headers ALIAS fastprune_stable_torch_headers)
target_include_directories(fastprune_stable_torch_headers SYSTEM INTERFACE "${_torch_dir}/include")
target_compile_definitions(fastprune_stable_torch_headers INTERFACE
  TORCH_TARGET_VERSION=0x020b000000000000)

add_library(fastprune_stable_torch_libraries INTERFACE)
add_library(fastprune::stable_torch_libraries ALIAS fastprune_stable_torch_libraries)
# --no-as-needed: the weak CUDA stream symbol alone would not keep libtorch in the list. No rpath:
# torch is imported first, and the loader then finds its libraries by name.
target_link_options(fastprune_stable_torch_libraries INTERFACE
  "LINKER:--no-as-needed" "-L${_torch_dir}/lib" -ltorch -ltorch_cpu "LINKER:--as-needed")
