# CUDA is optional: with nvcc the kernels compile and link in (no GPU needed), without it the build
# is CPU only. cudart is linked statically, so that the same binary loads under a CPU-only torch.

set(FASTPRUNE_CUDA_KERNELS "")
set(FASTPRUNE_CUDA_ARCHITECTURES "")
set(FASTPRUNE_CUDA_VERSION "")
set(_arch_flags
  -gencode=arch=compute_80,code=sm_80
  -gencode=arch=compute_90,code=sm_90
  -gencode=arch=compute_90a,code=sm_90a
  -gencode=arch=compute_90,code=compute_90)

if(FASTPRUNE_CUDA)
  include(CheckLanguage)
  # CMake's own compiler check would pick an architecture that the toolkit may have dropped.
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(CMAKE_CUDA_STANDARD 17)
    set(FASTPRUNE_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
    set(FASTPRUNE_CUDA_ARCHITECTURES "sm_80,sm_90,sm_90a,compute_90")
  endif()
endif()

function(fastprune_cuda_kernels)
  if(NOT FASTPRUNE_CUDA_VERSION)
    return()
  endif()
  add_library(fastprune_cuda OBJECT ${ARGN})
  target_include_directories(fastprune_cuda PRIVATE csrc)
  set_target_properties(fastprune_cuda PROPERTIES
    CUDA_ARCHITECTURES OFF CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
  target_compile_options(fastprune_cuda PRIVATE ${_arch_flags} -Werror=all-warnings -lineinfo)
  find_package(CUDAToolkit REQUIRED)
  set(FASTPRUNE_CUDA_KERNELS fastprune_cuda CUDA::cudart_static PARENT_SCOPE)
endfunction()
