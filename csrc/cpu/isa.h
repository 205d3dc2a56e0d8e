// Which instruction set a kernel is compiled for, and which one runs.
//
// Every kernel file is compiled several times, from one source, into the namespaces `plain`, `avx2` and `avx512`:
//
//     #define EBFT_KERNELS "cpu/adamw_kernel.h"
//     #include "cpu/every_isa.h"
//
// and EBFT_CALL(kernel, arguments) calls the one that isa() says can run. Kernel files include no torch header and no standard
// template, so that nothing compiled for a newer instruction set is ever shared with code that must run without it.
#pragma once

#include <cstdint>

namespace ebft {

enum class Isa { kPlain, kAvx2, kAvx512 };

// The best that this processor has (AVX2 with FMA, BMI2 and F16C; AVX-512 with VL, BW, DQ and VBMI2), no better than EBFT_CPU (plain,
// avx2, avx512) allows. Read once.
Isa isa();

// Products of pairs of bfloat16 (AVX512-BF16).
bool has_bfloat16_dots();

// Set bits of `count` mask words, by the processor's own instruction where there is one.
int64_t count_bits(const uint32_t* words, int64_t count);

}  // namespace ebft

#if defined(__x86_64__)
#define EBFT_CALL(kernel, ...)                                      \
  (isa() == Isa::kAvx512 ? avx512::kernel(__VA_ARGS__)              \
                         : isa() == Isa::kAvx2 ? avx2::kernel(__VA_ARGS__) : plain::kernel(__VA_ARGS__))
#else
#define EBFT_CALL(kernel, ...) plain::kernel(__VA_ARGS__)
#endif
