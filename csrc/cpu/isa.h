// Which instruction set a kernel is compiled for, and which one runs.
//
// Every kernel file is compiled twice, from one source, into the namespaces `plain` and `avx2`:
//
//     #define EBFT_KERNELS "cpu/adamw_kernel.h"
//     #include "cpu/both.h"
//
// and calls the one that `has_avx2()` says can run. Kernel files include no torch header and no standard template, so
// that nothing compiled for AVX2 is ever shared with code that must run without it.
#pragma once

namespace ebft {

// True where the CPU has AVX2, FMA, BMI2 and F16C and EBFT_CPU=plain does not forbid them. Read once.
bool has_avx2();

}  // namespace ebft
