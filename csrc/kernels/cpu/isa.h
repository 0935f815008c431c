// Which CPU variant of a kernel runs: found once at run time, capped by FASTPRUNE_ISA.
#pragma once

namespace fastprune {

// avx512_bf16: AVX-512 with BF16 and VBMI2. Only kernels that gain from those are compiled for it;
// the others run as they do under avx512.
enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

const char* isa_name(Isa isa);

// The best ISA that this build holds and this processor and operating system can run.
Isa best_isa();

// The ISA in use: best_isa(), or less where the environment variable FASTPRUNE_ISA or
// set_isa() caps it.
Isa current_isa();

// Caps the ISA for the whole process (tests and benchmarks). False, and no change, when the name
// is unknown or the machine cannot run it.
bool set_isa(const char* name);

// The ISAs inside this build, comma separated.
const char* built_isas();

}  // namespace fastprune

// Declares one function per ISA: FASTPRUNE_PER_ISA(void f(int a);) gives scalar::f, avx2::f, ...
#if defined(__x86_64__)
#define FASTPRUNE_PER_ISA(...) \
  namespace scalar {           \
  __VA_ARGS__                  \
  }                            \
  namespace avx2 {             \
  __VA_ARGS__                  \
  }                            \
  namespace avx512 {           \
  __VA_ARGS__                  \
  }
// The variant of f for the ISA in use.
#define FASTPRUNE_PICK(f)                                                             \
  (::fastprune::current_isa() >= ::fastprune::Isa::avx512                             \
       ? ::fastprune::avx512::f                                                       \
       : (::fastprune::current_isa() == ::fastprune::Isa::avx2 ? ::fastprune::avx2::f \
                                                               : ::fastprune::scalar::f))
// The same for kernels that need AVX-512 at least; there are none elsewhere.
#define FASTPRUNE_PER_AVX512(...) \
  namespace avx512 {              \
  __VA_ARGS__                     \
  }                               \
  namespace avx512_bf16 {         \
  __VA_ARGS__                     \
  }
#define FASTPRUNE_PICK_AVX512(f)                                                             \
  (::fastprune::current_isa() == ::fastprune::Isa::avx512_bf16 ? ::fastprune::avx512_bf16::f \
                                                               : ::fastprune::avx512::f)
#else
#define FASTPRUNE_PER_ISA(...) \
  namespace scalar {           \
  __VA_ARGS__                  \
  }
#define FASTPRUNE_PICK(f) (::fastprune::scalar::f)
#endif
