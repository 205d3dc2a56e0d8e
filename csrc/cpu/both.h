// Includes the file named by EBFT_KERNELS twice: compiled plainly, and for AVX2. No include guard on purpose.

#define EBFT_AVX2 0
namespace ebft::plain {
#include "cpu/vec8_plain.h"
#include EBFT_KERNELS
}  // namespace ebft::plain
#undef EBFT_AVX2

#if defined(__x86_64__)
#define EBFT_HAS_AVX2_KERNELS 1
#define EBFT_AVX2 1
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
#endif
