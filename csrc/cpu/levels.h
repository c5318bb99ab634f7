// The instruction sets that kernels are compiled for, and which of them this machine runs. CMake asks as well, before it
// builds (cmake/best_isa.cpp).
#pragma once

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fusednorm::cpu {

#if defined(__x86_64__)
// x86-64's levels (System V psABI), best first.
constexpr const char* kLevels[] = {"v4", "v3", "v2"};

inline bool runs_here(const char* name) {
  const auto is = [&](const char* level) { return std::strcmp(name, level) == 0; };
  unsigned a, b, c = 0, d;
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("popcnt")) return false;
  if (is("v2")) return true;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
    return false;
  if (is("v3")) return true;
  return is("v4") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
constexpr const char* kLevels[] = {"baseline"};

inline bool runs_here(const char*) { return true; }
#endif

// Of this machine, whether there are kernels for it or not; the last one where it runs none.
inline const char* best_level() {
  const char* best = nullptr;
  for (const char* level : kLevels) {
    best = level;
    if (runs_here(level)) break;
  }
  return best;
}

}  // namespace fusednorm::cpu
