# CUDA is optional: with nvcc the kernels compile and link in (no GPU needed), without it the build
# is CPU only. cudart is linked statically, so that the same binary loads under a CPU-only torch.
#
# FASTPRUNE_EMULATION compiles the same sources a second time, for the host: the tests of machines
# without a GPU run them (csrc/kernels/cuda/emulation.h). Not in wheels.

# It switches stacks in assembly.
if(FASTPRUNE_EMULATION AND NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(FASTPRUNE_EMULATION OFF)
endif()

set(FASTPRUNE_CUDA_OBJECTS "")
set(FASTPRUNE_CUDA_ARCHITECTURES "")
set(FASTPRUNE_CUDA_VERSION "")
set(FASTPRUNE_CUDA_ARCHS "sm_80;sm_90;sm_90a;compute_90" CACHE STRING
  "Targets inside the binary: sm_N machine code, compute_N PTX")
set(_arch_flags "")
foreach(target IN LISTS FASTPRUNE_CUDA_ARCHS)
  if(NOT target MATCHES "^(sm|compute)_([0-9]+[af]?)$")
    message(FATAL_ERROR "FASTPRUNE_CUDA_ARCHS: expected sm_N or compute_N, got ${target}")
  endif()
  list(APPEND _arch_flags "-gencode=arch=compute_${CMAKE_MATCH_2},code=${target}")
endforeach()

if(FASTPRUNE_CUDA)
  include(CheckLanguage)
  # CMake's own compiler check would pick an architecture that the toolkit may have dropped.
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(CMAKE_CUDA_STANDARD 17)
    set(FASTPRUNE_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
    list(JOIN FASTPRUNE_CUDA_ARCHS "," FASTPRUNE_CUDA_ARCHITECTURES)
  endif()
endif()

# KERNELS: .cu files. OPS: the torch sides of their ops.
function(fastprune_cuda)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "" "KERNELS;OPS")
  set(objects "")
  if(FASTPRUNE_CUDA_VERSION)
    find_package(CUDAToolkit REQUIRED)
    add_library(fastprune_cuda_kernels OBJECT ${arg_KERNELS})
    target_include_directories(fastprune_cuda_kernels PRIVATE csrc)
    set_target_properties(fastprune_cuda_kernels PROPERTIES
      CUDA_ARCHITECTURES OFF CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
    # A kernel that spills registers to memory does not build.
    target_compile_options(fastprune_cuda_kernels PRIVATE ${_arch_flags} -Werror=all-warnings
      -Xptxas=-warn-spills,-Werror -lineinfo)
    add_library(fastprune_cuda_ops OBJECT ${arg_OPS})
    target_include_directories(fastprune_cuda_ops PRIVATE csrc)
    target_include_directories(fastprune_cuda_ops SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
    target_link_libraries(fastprune_cuda_ops PRIVATE fastprune::stable_torch_headers)
    list(APPEND objects fastprune_cuda_kernels fastprune_cuda_ops CUDA::cudart_static)
  endif()
  if(FASTPRUNE_EMULATION)
    # CMake compiles .cu as CUDA where that is enabled: each kernel gets a .cpp that includes it.
    set(kernels "")
    foreach(kernel IN LISTS arg_KERNELS)
      get_filename_component(stem ${kernel} NAME_WE)
      set(wrapper ${CMAKE_CURRENT_BINARY_DIR}/emulated/${stem}.cpp)
      file(CONFIGURE OUTPUT ${wrapper} CONTENT "#include \"${CMAKE_SOURCE_DIR}/${kernel}\"\n")
      list(APPEND kernels ${wrapper})
    endforeach()
    add_library(fastprune_emulated OBJECT ${kernels} ${arg_OPS} csrc/kernels/cuda/emulation.cpp)
    target_include_directories(fastprune_emulated PRIVATE csrc)
    target_compile_definitions(fastprune_emulated PRIVATE FASTPRUNE_EMULATED)
    target_compile_options(fastprune_emulated PRIVATE -O2 -ffp-contract=off -Wno-unused-parameter
      -Wno-unknown-pragmas)
    target_link_libraries(fastprune_emulated PRIVATE fastprune::stable_torch_headers)
    list(APPEND objects fastprune_emulated)
  endif()
  set(FASTPRUNE_CUDA_OBJECTS ${objects} PARENT_SCOPE)
endfunction()
