// Includes the file named by EBFT_KERNELS once for every instruction set (isa.h). No include guard on purpose.

#define EBFT_AVX2 0
#define EBFT_AVX512 0
namespace ebft::plain {
#include "cpu/vec8_plain.h"
#include EBFT_KERNELS
}  // namespace ebft::plain
#undef EBFT_AVX2
#undef EBFT_AVX512

#if defined(__x86_64__)
#define EBFT_AVX2 1
#define EBFT_AVX512 0
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,f16c,popcnt,lzcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,popcnt,lzcnt")
#endif
namespace ebft::avx2 {
#include "cpu/vec8_avx2.h"
#include EBFT_KERNELS
}  // namespace ebft::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef EBFT_AVX2
#undef EBFT_AVX512

#define EBFT_AVX2 1
#define EBFT_AVX512 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,f16c,popcnt,lzcnt,avx512f,avx512vl,avx512bw,avx512dq,avx512vbmi2,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,popcnt,lzcnt,avx512f,avx512vl,avx512bw,avx512dq,avx512vbmi2,avx512bf16")
#endif
namespace ebft::avx512 {
#include "cpu/vec8_avx2.h"
#include EBFT_KERNELS
}  // namespace ebft::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef EBFT_AVX2
#undef EBFT_AVX512
#endif
