// Eight lanes in AVX2, and with what AVX-512 does better where EBFT_AVX512 is 1; the same names as vec8_plain.h. Included inside a namespace (every_isa.h).

struct I8 {
  __m256i v;
};
struct F8 {
  __m256 v;
};

inline F8 set(float x) { return {_mm256_set1_ps(x)}; }
inline I8 seti(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline I8 lane_numbers() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }

inline F8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, F8 x) { _mm256_storeu_ps(p, x.v); }
inline F8 load_first(const float* p, int count) {  // others 0
  return {_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane_numbers().v))};
}

inline F8 operator+(F8 a, F8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F8 operator-(F8 a, F8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F8 operator*(F8 a, F8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F8 operator/(F8 a, F8 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F8 sqrt8(F8 a) { return {_mm256_sqrt_ps(a.v)}; }
inline F8 min8(F8 a, F8 b) { return {_mm256_min_ps(a.v, b.v)}; }

inline I8 bits_of(F8 a) { return {_mm256_castps_si256(a.v)}; }
inline F8 float_of(I8 a) { return {_mm256_castsi256_ps(a.v)}; }
inline I8 operator+(I8 a, I8 b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline I8 operator-(I8 a, I8 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline I8 operator&(I8 a, I8 b) { return {_mm256_and_si256(a.v, b.v)}; }
inline I8 operator|(I8 a, I8 b) { return {_mm256_or_si256(a.v, b.v)}; }
inline I8 operator^(I8 a, I8 b) { return {_mm256_xor_si256(a.v, b.v)}; }
template <int N> inline I8 shr(I8 a) { return {_mm256_srli_epi32(a.v, N)}; }
template <int N> inline I8 shl(I8 a) { return {_mm256_slli_epi32(a.v, N)}; }
inline I8 mulhi(I8 a, uint32_t b) {
  __m256i factor = _mm256_set1_epi32(int32_t(b));
  __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(a.v, factor), 32);
  __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), factor);
  return {_mm256_blend_epi32(even, odd, 0xAA)};
}
inline I8 mullo(I8 a, uint32_t b) { return {_mm256_mullo_epi32(a.v, _mm256_set1_epi32(int32_t(b)))}; }
inline I8 greater(I8 a, I8 b) { return {_mm256_cmpgt_epi32(a.v, b.v)}; }
inline I8 equal(I8 a, I8 b) { return {_mm256_cmpeq_epi32(a.v, b.v)}; }
inline I8 max8(I8 a, I8 b) { return {_mm256_max_epi32(a.v, b.v)}; }
inline I8 abs8(I8 a) { return {_mm256_abs_epi32(a.v)}; }
inline I8 round_to_int(F8 a) { return {_mm256_cvtps_epi32(a.v)}; }
inline F8 to_float(I8 a) { return {_mm256_cvtepi32_ps(a.v)}; }
// Where `mask` is ~0 take b, where it is 0 take a.
inline I8 select(I8 a, I8 b, I8 mask) { return {_mm256_blendv_epi8(a.v, b.v, mask.v)}; }

// By a byte of a mask: 0 in the lanes that it does not keep; the kept lanes together in front; and from there back to their places,
// others 0.
#if EBFT_AVX512
inline F8 zero_unless(F8 a, uint32_t keep) { return {_mm256_maskz_mov_ps(__mmask8(keep), a.v)}; }
inline F8 pack(F8 a, uint32_t keep) { return {_mm256_maskz_compress_ps(__mmask8(keep), a.v)}; }
inline F8 spread(F8 a, uint32_t keep) { return {_mm256_maskz_expand_ps(__mmask8(keep), a.v)}; }
#else
inline F8 zero_unless(F8 a, uint32_t keep) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int32_t(keep)), bit), bit);
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(kept))};
}
inline F8 permute(F8 a, const uint8_t* from) {
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  return {_mm256_permutevar8x32_ps(a.v, lanes)};
}
inline F8 pack(F8 a, uint32_t keep) { return permute(a, kLanes.compress[keep]); }
inline F8 spread(F8 a, uint32_t keep) { return zero_unless(permute(a, kLanes.expand[keep]), keep); }
#endif

inline I8 load_u16(const uint16_t* p) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_u16(uint16_t* p, I8 a) {
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(a.v, a.v), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline I8 load_i8(const uint8_t* p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
inline I8 load_u8(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_8(uint8_t* p, I8 a) {  // the low byte of each lane
  __m256i low = _mm256_shuffle_epi8(
      a.v, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1,
                            -1, -1, -1, -1, -1, -1, -1));
  __m256i together = _mm256_permutevar8x32_epi32(low, _mm256_setr_epi32(0, 4, 1, 1, 1, 1, 1, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(together));
}

// IEEE half <-> float, to nearest even.
inline F8 load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_half(uint16_t* p, F8 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
