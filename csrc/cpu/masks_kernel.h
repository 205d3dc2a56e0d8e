// Masks as bits: pack, unpack, choose the best of a row or of every M, check. One row at a time. Included by every_isa.h.

// --- bytes of 0 and 1 <-> bits ----------------------------------------------------------------------------------------

inline uint32_t pack32(const uint8_t* bytes) {
#if EBFT_AVX2
  __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  return uint32_t(_mm256_movemask_epi8(_mm256_cmpgt_epi8(v, _mm256_setzero_si256())));
#else
  uint32_t word = 0;
  for (int part = 0; part < 4; ++part) {
    uint64_t octet;
    memcpy(&octet, bytes + 8 * part, 8);
    word |= uint32_t(octet * 0x0102040810204080ull >> 56) << (8 * part);  // byte i's bit to bit i
  }
  return word;
#endif
}

inline void unpack32(uint32_t word, uint8_t* bytes) {
#if EBFT_AVX2
  __m256i spread = _mm256_shuffle_epi8(
      _mm256_set1_epi32(int32_t(word)),
      _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3));
  __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201ull));
  __m256i kept = _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), _mm256_set1_epi8(1));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), kept);
#else
  for (int part = 0; part < 4; ++part) {
    uint64_t octet = word >> (8 * part) & 0xFF;
    octet = (octet * 0x8040201008040201ull & 0x8080808080808080ull) >> 7;  // bit 7 - i of each byte ...
    octet = __builtin_bswap64(octet);                                      // ... to byte i
    memcpy(bytes + 8 * part, &octet, 8);
  }
#endif
}

void pack_row(const uint8_t* mask, uint32_t* words, int64_t width) {
  int64_t whole = width / 32;
  for (int64_t j = 0; j < whole; ++j) words[j] = pack32(mask + 32 * j);
  if (width % 32) {
    uint8_t tail[32] = {};
    memcpy(tail, mask + 32 * whole, size_t(width % 32));
    words[whole] = pack32(tail);
  }
}

void unpack_row(const uint32_t* words, uint8_t* mask, int64_t width) {
  int64_t whole = width / 32;
  for (int64_t j = 0; j < whole; ++j) unpack32(words[j], mask + 32 * j);
  if (width % 32) {
    uint8_t tail[32];
    unpack32(words[whole], tail);
    memcpy(mask + 32 * whole, tail, size_t(width % 32));
  }
}

// --- zeros where pruned -----------------------------------------------------------------------------------------------
// Of values seen as integers of their size. Memory is written only where a pruned place holds something, and words that keep
// all are not even looked up: as a rule nothing is to be done, and then a weight is read once and stays clean in the caches.

template <typename Bits>
inline void zero_places(Bits* values, uint32_t word, int count) {
  for (int i = 0; i < count; ++i)
    if (!(word >> i & 1) && values[i]) values[i] = 0;
}

inline void zero_word(uint32_t* values, uint32_t word) {
#if EBFT_AVX2
  const __m256i all = _mm256_set1_epi32(int32_t(word));
  __m256i value[4], kept[4], filled = _mm256_setzero_si256();
  for (int part = 0; part < 4; ++part) {
    const __m256i bit = _mm256_sllv_epi32(_mm256_set1_epi32(1 << (8 * part)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    value[part] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values) + part);
    kept[part] = _mm256_cmpeq_epi32(_mm256_and_si256(all, bit), bit);
    filled = _mm256_or_si256(filled, _mm256_andnot_si256(kept[part], value[part]));
  }
  if (_mm256_testz_si256(filled, filled)) return;
  for (int part = 0; part < 4; ++part)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values) + part, _mm256_and_si256(kept[part], value[part]));
#else
  zero_places(values, word, 32);
#endif
}

inline void zero_word(uint16_t* values, uint32_t word) {
#if EBFT_AVX2
  const __m256i bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  __m256i value[2], kept[2], filled = _mm256_setzero_si256();
  for (int half = 0; half < 2; ++half) {
    value[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values) + half);
    kept[half] = _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(int16_t(word >> (16 * half))), bit), bit);
    filled = _mm256_or_si256(filled, _mm256_andnot_si256(kept[half], value[half]));
  }
  if (_mm256_testz_si256(filled, filled)) return;
  for (int half = 0; half < 2; ++half)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values) + half, _mm256_and_si256(kept[half], value[half]));
#else
  zero_places(values, word, 32);
#endif
}

template <typename Bits>
inline void zero_row(Bits* values, const uint32_t* words, int64_t width) {
  const int64_t whole = width / 32;
  for (int64_t j = 0; j < whole; ++j)
    if (~words[j]) zero_word(values + 32 * j, words[j]);
  if (width % 32) zero_places(values + 32 * whole, words[whole], int(width % 32));
}

void zero_row_of_4(uint32_t* values, const uint32_t* words, int64_t width) { zero_row(values, words, width); }
void zero_row_of_2(uint16_t* values, const uint32_t* words, int64_t width) { zero_row(values, words, width); }

// --- scores as integers in the same order -----------------------------------------------------------------------------
// NaN is the highest, -0 equals +0.

inline int32_t key_of(uint32_t bits) {
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFFFFFF;
  if (bits == 0x80000000) return 0;
  return int32_t(bits) >= 0 ? int32_t(bits) : int32_t(bits ^ 0x7FFFFFFF);
}

void keys_of_float(const float* scores, int32_t* keys, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    uint32_t bits;
    memcpy(&bits, scores + i, 4);
    keys[i] = key_of(bits);
  }
}

void keys_of_bfloat16(const uint16_t* scores, int32_t* keys, int64_t width) {
  for (int64_t i = 0; i < width; ++i) keys[i] = key_of(uint32_t(scores[i]) << 16);
}

void keys_of_half(const uint16_t* scores, int32_t* keys, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {  // the order of half bits is that of float bits with as many exponents
    uint32_t bits = scores[i], size = bits & 0x7FFF;
    keys[i] = size > 0x7C00 ? 0x7FFFFFFF : bits & 0x8000 ? -int32_t(size) : int32_t(size);
  }
}

// --- the best of a row ------------------------------------------------------------------------------------------------

// Bits for the k highest keys, of equal ones those further left. Radix selection: three passes over digits of the keys.
void topk_row(const int32_t* keys, uint32_t* words, int64_t width, int64_t k) {
  uint32_t threshold = 0;  // digits found so far of the k-th highest key, offset to be unsigned
  int64_t left = k;        // how many of those that share these digits are still to be kept
  const int shifts[3] = {21, 10, 0}, sizes[3] = {2048, 2048, 1024};
  uint32_t known = 0;  // mask of the digits found
  for (int pass = 0; pass < 3 && k > 0; ++pass) {
    int32_t histogram[2048] = {};
    for (int64_t i = 0; i < width; ++i) {
      uint32_t key = uint32_t(keys[i]) ^ 0x80000000u;
      if ((key & known) == threshold) ++histogram[key >> shifts[pass] & uint32_t(sizes[pass] - 1)];
    }
    int digit = sizes[pass] - 1;
    while (histogram[digit] < left) left -= histogram[digit--];
    threshold |= uint32_t(digit) << shifts[pass];
    known |= uint32_t(sizes[pass] - 1) << shifts[pass];
  }
  for (int64_t j = 0; j < (width + 31) / 32; ++j) {
    uint32_t word = 0;
    for (int64_t i = 32 * j; i < width && i < 32 * j + 32; ++i) {
      uint32_t key = uint32_t(keys[i]) ^ 0x80000000u;
      bool keep = k > 0 && (key > threshold || (key == threshold && left > 0));
      if (keep && key == threshold) --left;
      word |= uint32_t(keep) << (i & 31);
    }
    words[j] = word;
  }
}

// --- N of every M -----------------------------------------------------------------------------------------------------

// Four keys: how many of the others come before each, and so the n that are kept.
inline uint32_t best_of_4(const int32_t* k, int n) {
  int r0 = (k[1] > k[0]) + (k[2] > k[0]) + (k[3] > k[0]);
  int r1 = (k[0] >= k[1]) + (k[2] > k[1]) + (k[3] > k[1]);
  int r2 = (k[0] >= k[2]) + (k[1] >= k[2]) + (k[3] > k[2]);
  int r3 = (k[0] >= k[3]) + (k[1] >= k[3]) + (k[2] >= k[3]);
  return uint32_t(r0 < n) | uint32_t(r1 < n) << 1 | uint32_t(r2 < n) << 2 | uint32_t(r3 < n) << 3;
}

#if EBFT_AVX2
// Two groups of four: each key against the three others of its group, by rotations within 128 bits.
inline uint32_t best_of_4_twice(const int32_t* keys, int n) {
  __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys));
  __m256i before = _mm256_setzero_si256();  // minus how many come before
  __m256i r1 = _mm256_shuffle_epi32(k, 0x39), r2 = _mm256_shuffle_epi32(k, 0x4E), r3 = _mm256_shuffle_epi32(k, 0x93);
  // A neighbour that stands further left also comes before where it is equal.
  __m256i left1 = _mm256_setr_epi32(0, 0, 0, -1, 0, 0, 0, -1), left2 = _mm256_setr_epi32(0, 0, -1, -1, 0, 0, -1, -1);
  __m256i left3 = _mm256_setr_epi32(0, -1, -1, -1, 0, -1, -1, -1);
  before = _mm256_or_si256(_mm256_cmpgt_epi32(r1, k), _mm256_and_si256(_mm256_cmpeq_epi32(r1, k), left1));
  before = _mm256_add_epi32(
      before, _mm256_or_si256(_mm256_cmpgt_epi32(r2, k), _mm256_and_si256(_mm256_cmpeq_epi32(r2, k), left2)));
  before = _mm256_add_epi32(
      before, _mm256_or_si256(_mm256_cmpgt_epi32(r3, k), _mm256_and_si256(_mm256_cmpeq_epi32(r3, k), left3)));
  __m256i keep = _mm256_cmpgt_epi32(before, _mm256_set1_epi32(-n));
  return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(keep)));
}
#endif

void nm_row(const int32_t* keys, uint32_t* words, int64_t width, int64_t n, int64_t m) {
  memset(words, 0, size_t((width + 31) / 32) * 4);
  int64_t i = 0;
  if (m == 4) {
#if EBFT_AVX2
    for (; i + 8 <= width; i += 8) words[i / 32] |= best_of_4_twice(keys + i, int(n)) << (i & 31);
#endif
    for (; i < width; i += 4) words[i / 32] |= best_of_4(keys + i, int(n)) << (i & 31);
    return;
  }
  for (; i < width; i += m) {
    for (int64_t a = 0; a < m; ++a) {
      const int32_t key = keys[i + a];
      int64_t before = 0;
      for (int64_t b = 0; b < a; ++b) before += keys[i + b] >= key;
      for (int64_t b = a + 1; b < m; ++b) before += keys[i + b] > key;
      if (before < n) words[(i + a) / 32] |= 1u << ((i + a) & 31);
    }
  }
}

bool is_nm_row(const uint32_t* words, int64_t width, int64_t n, int64_t m) {
  if (m == 4) {  // four bits a group: counts in nibbles, and a carry into the top bit where one is above n
    uint32_t over = 0, add = 0x11111111u * uint32_t(7 - n);
    for (int64_t j = 0; j < (width + 31) / 32; ++j) {
      const uint32_t word = 32 * j + 32 <= width ? words[j] : words[j] & ((1u << (width & 31)) - 1);  // padding counts for nothing
      uint32_t pairs = word - (word >> 1 & 0x55555555u);
      uint32_t counts = (pairs & 0x33333333u) + (pairs >> 2 & 0x33333333u);
      over |= (counts + add) & 0x88888888u;
    }
    return over == 0;
  }
  for (int64_t i = 0; i < width; i += m) {
    int64_t count = 0;
    for (int64_t b = i; b < i + m; ++b) count += int(words[b / 32] >> (b & 31) & 1);
    if (count > n) return false;
  }
  return true;
}
