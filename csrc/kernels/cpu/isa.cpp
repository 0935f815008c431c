#include "kernels/cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace fastprune {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "scalar";
  }
}

Isa best_isa() {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2");
  return bf16 ? Isa::avx512_bf16 : avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::scalar;
#else
  return Isa::scalar;
#endif
}

namespace {

bool parse(const char* name, Isa* isa) {
  for (Isa candidate : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
    if (std::strcmp(name, isa_name(candidate)) == 0) {
      *isa = candidate;
      return true;
    }
  }
  return false;
}

Isa initial_isa() {
  const Isa best = best_isa();
  Isa cap = best;
  const char* wanted = std::getenv("FASTPRUNE_ISA");
  if (wanted != nullptr && parse(wanted, &cap) && cap < best) return cap;
  return best;
}

std::atomic<int>& slot() {
  static std::atomic<int> isa{static_cast<int>(initial_isa())};
  return isa;
}

}  // namespace

Isa current_isa() { return static_cast<Isa>(slot().load(std::memory_order_relaxed)); }

bool set_isa(const char* name) {
  Isa isa;
  if (!parse(name, &isa) || isa > best_isa()) return false;
  slot().store(static_cast<int>(isa), std::memory_order_relaxed);
  return true;
}

const char* built_isas() {
#if defined(__x86_64__)
  return "scalar,avx2,avx512,avx512_bf16";
#else
  return "scalar";
#endif
}

}  // namespace fastprune
