#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace ebft {
namespace {

Isa detect() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("EBFT_CPU");
  if (wanted && std::strcmp(wanted, "plain") == 0) return Isa::kPlain;
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt")))
    return Isa::kPlain;
  if (wanted && std::strcmp(wanted, "avx2") == 0) return Isa::kAvx2;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2");
  return wide ? Isa::kAvx512 : Isa::kAvx2;
#else
  return Isa::kPlain;
#endif
}

#define EBFT_COUNT(name, ...)                                                  \
  __VA_ARGS__ int64_t name(const uint32_t* words, int64_t count) {             \
    int64_t total = 0;                                                         \
    for (int64_t i = 0; i < count; ++i) total += __builtin_popcount(words[i]); \
    return total;                                                              \
  }
EBFT_COUNT(count_plain)
#if defined(__x86_64__)
EBFT_COUNT(count_popcnt, __attribute__((target("popcnt"))))
#endif

}  // namespace

Isa isa() {
  static const Isa best = detect();
  return best;
}

bool has_bfloat16_dots() {
#if defined(__x86_64__)
  static const bool yes = isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
  return yes;
#else
  return false;
#endif
}

int64_t count_bits(const uint32_t* words, int64_t count) {
#if defined(__x86_64__)
  if (isa() != Isa::kPlain) return count_popcnt(words, count);
#endif
  return count_plain(words, count);
}

}  // namespace ebft
