// Eight lanes in plain C++; the same names as vec8_avx2.h. Included inside a namespace (every_isa.h).

struct I8 {
  int32_t v[8];
};
struct F8 {
  float v[8];
};

#define EBFT_EACH for (int i = 0; i < 8; ++i)

inline F8 set(float x) { F8 r; EBFT_EACH r.v[i] = x; return r; }
inline I8 seti(int32_t x) { I8 r; EBFT_EACH r.v[i] = x; return r; }
inline I8 lane_numbers() { I8 r; EBFT_EACH r.v[i] = i; return r; }

inline F8 load(const float* p) { F8 r; memcpy(r.v, p, 32); return r; }
inline void store(float* p, F8 x) { memcpy(p, x.v, 32); }
inline F8 load_first(const float* p, int count) { F8 r; EBFT_EACH r.v[i] = i < count ? p[i] : 0; return r; }  // others 0

inline F8 operator+(F8 a, F8 b) { EBFT_EACH a.v[i] += b.v[i]; return a; }
inline F8 operator-(F8 a, F8 b) { EBFT_EACH a.v[i] -= b.v[i]; return a; }
inline F8 operator*(F8 a, F8 b) { EBFT_EACH a.v[i] *= b.v[i]; return a; }
inline F8 operator/(F8 a, F8 b) { EBFT_EACH a.v[i] /= b.v[i]; return a; }
inline F8 sqrt8(F8 a) { EBFT_EACH a.v[i] = __builtin_sqrtf(a.v[i]); return a; }
inline F8 min8(F8 a, F8 b) { EBFT_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }

inline I8 bits_of(F8 a) { I8 r; memcpy(r.v, a.v, 32); return r; }
inline F8 float_of(I8 a) { F8 r; memcpy(r.v, a.v, 32); return r; }
inline I8 operator+(I8 a, I8 b) { EBFT_EACH a.v[i] = int32_t(uint32_t(a.v[i]) + uint32_t(b.v[i])); return a; }
inline I8 operator-(I8 a, I8 b) { EBFT_EACH a.v[i] = int32_t(uint32_t(a.v[i]) - uint32_t(b.v[i])); return a; }
inline I8 operator&(I8 a, I8 b) { EBFT_EACH a.v[i] &= b.v[i]; return a; }
inline I8 operator|(I8 a, I8 b) { EBFT_EACH a.v[i] |= b.v[i]; return a; }
inline I8 operator^(I8 a, I8 b) { EBFT_EACH a.v[i] ^= b.v[i]; return a; }
template <int N> inline I8 shr(I8 a) { EBFT_EACH a.v[i] = int32_t(uint32_t(a.v[i]) >> N); return a; }
template <int N> inline I8 shl(I8 a) { EBFT_EACH a.v[i] = int32_t(uint32_t(a.v[i]) << N); return a; }
inline I8 mulhi(I8 a, uint32_t b) {
  EBFT_EACH a.v[i] = int32_t((uint64_t(uint32_t(a.v[i])) * b) >> 32);
  return a;
}
inline I8 mullo(I8 a, uint32_t b) { EBFT_EACH a.v[i] = int32_t(uint32_t(a.v[i]) * b); return a; }
inline I8 greater(I8 a, I8 b) { EBFT_EACH a.v[i] = a.v[i] > b.v[i] ? -1 : 0; return a; }
inline I8 equal(I8 a, I8 b) { EBFT_EACH a.v[i] = a.v[i] == b.v[i] ? -1 : 0; return a; }
inline I8 max8(I8 a, I8 b) { EBFT_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
inline I8 abs8(I8 a) { EBFT_EACH a.v[i] = a.v[i] < 0 ? -a.v[i] : a.v[i]; return a; }
inline I8 round_to_int(F8 a) { I8 r; EBFT_EACH r.v[i] = int32_t(__builtin_rintf(a.v[i])); return r; }
inline F8 to_float(I8 a) { F8 r; EBFT_EACH r.v[i] = float(a.v[i]); return r; }
// Where `mask` is ~0 take b, where it is 0 take a.
inline I8 select(I8 a, I8 b, I8 mask) { EBFT_EACH a.v[i] = (a.v[i] & ~mask.v[i]) | (b.v[i] & mask.v[i]); return a; }

// By a byte of a mask: 0 in the lanes that it does not keep; the kept lanes together in front; and from there back to their places,
// others 0.
inline F8 zero_unless(F8 a, uint32_t keep) { EBFT_EACH if (!(keep >> i & 1)) a.v[i] = 0; return a; }
inline F8 pack(F8 a, uint32_t keep) { F8 r = {}; int n = 0; EBFT_EACH if (keep >> i & 1) r.v[n++] = a.v[i]; return r; }
inline F8 spread(F8 a, uint32_t keep) { F8 r; int n = 0; EBFT_EACH r.v[i] = keep >> i & 1 ? a.v[n++] : 0; return r; }

inline I8 load_u16(const uint16_t* p) { I8 r; EBFT_EACH r.v[i] = p[i]; return r; }
inline void store_u16(uint16_t* p, I8 a) { EBFT_EACH p[i] = uint16_t(a.v[i]); }
inline I8 load_i8(const uint8_t* p) { I8 r; EBFT_EACH r.v[i] = int8_t(p[i]); return r; }
inline I8 load_u8(const uint8_t* p) { I8 r; EBFT_EACH r.v[i] = p[i]; return r; }
inline void store_8(uint8_t* p, I8 a) { EBFT_EACH p[i] = uint8_t(a.v[i]); }

// IEEE half <-> float, to nearest even.
inline F8 load_half(const uint16_t* p) {
  F8 r;
  EBFT_EACH {
    uint32_t sign = uint32_t(p[i] & 0x8000) << 16, exponent = p[i] >> 10 & 31, mantissa = p[i] & 1023, bits;
    if (exponent == 31) {
      bits = sign | 0x7F800000 | mantissa << 13;
    } else if (exponent) {
      bits = sign | (exponent + 112) << 23 | mantissa << 13;
    } else {
      float tiny = float(mantissa) * 0x1p-24f;
      memcpy(&bits, &tiny, 4);
      bits |= sign;
    }
    memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
inline void store_half(uint16_t* p, F8 a) {
  EBFT_EACH {
    uint32_t bits, sign;
    memcpy(&bits, &a.v[i], 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7FFFFFFF;
    uint32_t half;
    if (bits > 0x7F800000) {
      half = 0x7E00;
    } else if (bits >= 0x477FF000) {  // rounds to 65536 or more
      half = 0x7C00;
    } else if (bits >= 0x38800000) {
      half = (bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13;
    } else {  // below the least normal half: the sum rounds to a multiple of 2^-24
      float magnitude, sum;
      memcpy(&magnitude, &bits, 4);
      sum = magnitude + 0.5f;
      memcpy(&half, &sum, 4);
      half -= 0x3F000000;
    }
    p[i] = uint16_t(sign | half);
  }
}

#undef EBFT_EACH
