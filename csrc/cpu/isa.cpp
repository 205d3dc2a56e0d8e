#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace ebft {

bool has_avx2() {
  static const bool yes = [] {
    const char* wanted = std::getenv("EBFT_CPU");
    if (wanted && std::strcmp(wanted, "plain") == 0) return false;
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2");
#else
    return false;
#endif
  }();
  return yes;
}

}  // namespace ebft
