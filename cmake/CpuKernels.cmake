# Every CPU kernel is compiled once per ISA, each in a namespace of its own; isa.cpp chooses at run
# time. Kernels include no torch header and no standard container: an inline function shared between
# ISAs could be linked from the AVX-512 object into the baseline path.

set(FASTPRUNE_ISAS scalar)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  list(APPEND FASTPRUNE_ISAS avx2 avx512)
endif()
set(FASTPRUNE_FLAGS_scalar "")
set(FASTPRUNE_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt -mlzcnt)
set(FASTPRUNE_FLAGS_avx512 ${FASTPRUNE_FLAGS_avx2}
  -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)

set(FASTPRUNE_FLAGS_avx512_bf16 ${FASTPRUNE_FLAGS_avx512} -mavx512bf16 -mavx512vbmi2)

function(_fastprune_isa_library isa)
  add_library(fastprune_cpu_${isa} OBJECT ${ARGN})
  target_include_directories(fastprune_cpu_${isa} PRIVATE csrc)
  target_compile_definitions(fastprune_cpu_${isa} PRIVATE FASTPRUNE_ISA=${isa})
  # -ffp-contract=fast: a * b + c on vectors becomes one FMA where the ISA has it.
  target_compile_options(fastprune_cpu_${isa} PRIVATE
    -O3 -ffp-contract=fast -fno-math-errno ${FASTPRUNE_FLAGS_${isa}})
endfunction()

# Sources, and behind BF16 those that are compiled for avx512_bf16 too.
function(fastprune_cpu_kernels)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "" "BF16")
  set(objects "")
  foreach(isa IN LISTS FASTPRUNE_ISAS)
    _fastprune_isa_library(${isa} ${arg_UNPARSED_ARGUMENTS})
    list(APPEND objects fastprune_cpu_${isa})
  endforeach()
  if("avx512" IN_LIST FASTPRUNE_ISAS)
    _fastprune_isa_library(avx512_bf16 ${arg_BF16})
    list(APPEND objects fastprune_cpu_avx512_bf16)
  endif()
  set(FASTPRUNE_CPU_KERNELS ${objects} PARENT_SCOPE)
endfunction()
