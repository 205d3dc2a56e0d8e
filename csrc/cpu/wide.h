// As many float lanes as a vector has: 16 with AVX-512, otherwise the eight of vec8_*.h. Included inside a namespace (every_isa.h).

#if EBFT_AVX512
struct Wide {
  __m512 v;
};
inline Wide wide_zero() { return {_mm512_setzero_ps()}; }
inline Wide wide_load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Wide wide_set(float x) { return {_mm512_set1_ps(x)}; }
inline Wide wide_add(Wide a, Wide b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Wide multiply_add(Wide a, Wide b, Wide sum) { return {_mm512_fmadd_ps(a.v, b.v, sum.v)}; }
inline void wide_store(float* p, Wide a) { _mm512_storeu_ps(p, a.v); }
#else
using Wide = F8;
inline Wide wide_zero() { return set(0); }
inline Wide wide_load(const float* p) { return load(p); }
inline Wide wide_set(float x) { return set(x); }
inline Wide wide_add(Wide a, Wide b) { return a + b; }
#if EBFT_AVX2
inline Wide multiply_add(Wide a, Wide b, Wide sum) { return {_mm256_fmadd_ps(a.v, b.v, sum.v)}; }
#else
inline Wide multiply_add(Wide a, Wide b, Wide sum) { return a * b + sum; }
#endif
inline void wide_store(float* p, Wide a) { store(p, a); }
#endif

inline constexpr int kLanesWide = int(sizeof(Wide) / sizeof(float));

inline float sum_of(Wide a) {
  float v[kLanesWide];
  wide_store(v, a);
  for (int half = kLanesWide / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}
