// y = x W^T for a compressed W and a few rows of x: expand in registers, multiply, add. Included by every_isa.h.
//
// A step takes the inputs of one mask word in kParts vectors of floats: 4 x 8, or with AVX-512 2 x 16. bfloat16 values are expanded in
// 16-bit lanes, two vectors' worth at a time, and become floats by a shift (the even inputs) or a mask (the odd ones): `arrange` puts x
// in that order. With kDots, x is bfloat16 too, two inputs in the place of a float, and AVX-512 multiplies pairs.

#include "cpu/wide.h"

inline constexpr int kParts = int(kChunkInputs) / kLanesWide;

// x of `width` inputs, and zeros up to a whole chunk, as a kernel for values of kind `value` takes it.
void arrange(const float* x, float* to, int64_t width, Value value, bool dots) {
  const int64_t padded = (width + kChunkInputs - 1) / kChunkInputs * kChunkInputs;
  if (dots) {
    for (int64_t i = 0; i < padded; ++i) {
      uint32_t bits = 0;
      if (i < width) memcpy(&bits, x + i, 4);
      reinterpret_cast<uint16_t*>(to)[i] = uint16_t(bits >> 16);
    }
    return;
  }
  const bool apart = value == Value::kBfloat16;
  for (int64_t start = 0; start < padded; start += 2 * kLanesWide)
    for (int64_t i = 0; i < 2 * kLanesWide; ++i) {
      const int64_t from = start + (!apart ? i : i < kLanesWide ? 2 * i : 2 * (i - kLanesWide) + 1);
      to[start + i] = from < width ? x[from] : 0.0f;
    }
}

struct Weights {
  Wide part[kParts];
};

// --- the weights of a chunk, whose kept ones start at p, as floats; absent ones 0 ------------------------------------------

#if EBFT_AVX512

// Loaded first: an expansion straight from memory, into which compilers would fold the load, takes several times as long on Zen 4.
inline __m512i load_whole(const void* p) {
  __m512i all = _mm512_loadu_si512(p);
  asm("" : "+v"(all));
  return all;
}

inline __m512i expand16(const char* p, uint32_t bits) { return _mm512_maskz_expand_epi16(bits, load_whole(p)); }

template <Value V> inline Weights expand(const char* p, uint32_t bits) {
  if constexpr (V == Value::kBfloat16) {
    const __m512i lanes = expand16(p, bits);
    return {{{_mm512_castsi512_ps(_mm512_slli_epi32(lanes, 16))},
             {_mm512_castsi512_ps(_mm512_and_si512(lanes, _mm512_set1_epi32(int32_t(0xFFFF0000))))}}};
  } else if constexpr (V == Value::kHalf) {
    const __m512i lanes = expand16(p, bits);
    return {{{_mm512_cvtph_ps(_mm512_castsi512_si256(lanes))}, {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(lanes, 1))}}};
  } else if constexpr (V == Value::kFloat) {
    const auto low = __mmask16(bits), high = __mmask16(bits >> 16);
    return {{{_mm512_maskz_expand_ps(low, _mm512_castsi512_ps(load_whole(p)))},
             {_mm512_maskz_expand_ps(high, _mm512_castsi512_ps(load_whole(p + 4 * __builtin_popcount(low))))}}};
  } else {
    __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    asm("" : "+v"(all));
    const __m256i lanes = _mm256_maskz_expand_epi8(bits, all);
    return {{{_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(lanes)))},
             {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(lanes, 1)))}}};
  }
}

#elif EBFT_AVX2

struct ShuffleTables {
  alignas(16) uint8_t of16[256][16];  // for pshufb: eight 16-bit lanes from packed values, absent ones 0
};
constexpr ShuffleTables make_shuffle_tables() {
  ShuffleTables tables{};
  for (int byte = 0; byte < 256; ++byte)
    for (int lane = 0, kept = 0; lane < 8; ++lane) {
      bool here = byte >> lane & 1;
      for (int half = 0; half < 2; ++half)
        tables.of16[byte][2 * lane + half] = here ? uint8_t(2 * kept + half) : uint8_t(0x80);
      kept += here;
    }
  return tables;
}
inline constexpr ShuffleTables kShuffle = make_shuffle_tables();

inline __m256i both(const void* first, const void* second) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(first))),
                                 _mm_loadu_si128(static_cast<const __m128i*>(second)), 1);
}

template <Value V> inline Weights expand(const char* p, uint32_t bits) {
  const uint32_t byte[4] = {bits & 0xFF, bits >> 8 & 0xFF, bits >> 16 & 0xFF, bits >> 24};
  // How many values come before those of a byte; by counting, which takes fewer instructions than a table.
  const size_t before[4] = {0, size_t(__builtin_popcount(byte[0])), size_t(__builtin_popcount(bits & 0xFFFF)),
                            size_t(__builtin_popcount(bits & 0xFFFFFF))};
  Weights weights;
  if constexpr (V == Value::kBfloat16 || V == Value::kHalf) {
    for (int i = 0; i < 4; i += 2) {
      const __m256i lanes = _mm256_shuffle_epi8(both(p + 2 * before[i], p + 2 * before[i + 1]),
                                                both(kShuffle.of16[byte[i]], kShuffle.of16[byte[i + 1]]));
      if constexpr (V == Value::kBfloat16) {
        weights.part[i] = {_mm256_castsi256_ps(_mm256_slli_epi32(lanes, 16))};
        weights.part[i + 1] = {_mm256_castsi256_ps(_mm256_and_si256(lanes, _mm256_set1_epi32(int32_t(0xFFFF0000))))};
      } else {
        weights.part[i] = {_mm256_cvtph_ps(_mm256_castsi256_si128(lanes))};
        weights.part[i + 1] = {_mm256_cvtph_ps(_mm256_extracti128_si256(lanes, 1))};
      }
    }
  } else {
    for (int i = 0; i < 4; ++i) {
      if constexpr (V == Value::kFloat) weights.part[i] = spread(load(reinterpret_cast<const float*>(p) + before[i]), byte[i]);
      else weights.part[i] = spread(to_float(load_i8(reinterpret_cast<const uint8_t*>(p) + before[i])), byte[i]);
    }
  }
  return weights;
}

#else

template <Value V> inline Weights expand(const char* p, uint32_t bits) {
  constexpr bool kApart = V == Value::kBfloat16;
  float lanes[kChunkInputs];
  for (int i = 0; i < kChunkInputs; ++i) {
    float value = 0;
    if (bits >> i & 1) {
      if constexpr (V == Value::kFloat) {
        memcpy(&value, p, 4);
      } else if constexpr (V == Value::kInt8) {
        value = *reinterpret_cast<const int8_t*>(p);
      } else {
        uint16_t one[8] = {};
        memcpy(one, p, 2);
        if constexpr (V == Value::kBfloat16) {
          const uint32_t word = uint32_t(one[0]) << 16;
          memcpy(&value, &word, 4);
        } else {
          value = load_half(one).v[0];
        }
      }
      p += V == Value::kFloat ? 4 : V == Value::kInt8 ? 1 : 2;
    }
    const int in_pair = i % (2 * kLanesWide);
    lanes[!kApart ? i : i - in_pair + in_pair / 2 + (in_pair % 2 ? kLanesWide : 0)] = value;
  }
  Weights weights;
  for (int i = 0; i < kParts; ++i) weights.part[i] = load(lanes + i * kLanesWide);
  return weights;
}

#endif

template <Value V> inline int64_t size_of() { return V == Value::kFloat ? 4 : V == Value::kInt8 ? 1 : 2; }

// Rows [row, row + Rows) times Batch rows of arranged x; to[b * to_stride + r]. Whether the bits keep as many values as the row offsets
// say, and none past the width; if not, no more than most_read(w) values have been read from the offset of a row on.
template <Value V, bool Dots, int Rows, int Batch>
bool multiply(const Compressed& w, int64_t row, const float* x, int64_t x_stride, float* to, int64_t to_stride) {
  const int64_t* offsets = w.row_offsets + row;
  const char* values = static_cast<const char*>(w.values);
  const uint8_t* mask = w.mask + row * w.mask_stride;
  // A row is too short for the processor to learn how its values run: what the next rows need is asked for while these are worked on.
  const int64_t ahead = (offsets[Rows] - offsets[0]) * size_of<V>();
  constexpr bool kScaled = V == Value::kInt8;
  const int64_t stretch = kScaled ? kScaleGroup : w.width;  // inputs that are added up before anything else is done
  Wide sum[Rows][Batch];
  const char* at[Rows];
  for (int r = 0; r < Rows; ++r) {
    at[r] = values + offsets[r] * size_of<V>();
    for (int b = 0; b < Batch; ++b) sum[r][b] = wide_zero();
  }
  for (int64_t begin = 0; begin < w.width; begin += stretch) {
    const int64_t end = begin + stretch < w.width ? begin + stretch : w.width;
    Wide part[Rows][Batch];
    for (int r = 0; r < Rows; ++r)
      for (int b = 0; b < Batch; ++b) part[r][b] = wide_zero();
    for (int64_t first = begin; first < end; first += kChunkInputs) {
      if (first % 512 == 0)  // a line of the mask
        for (int r = 0; r < Rows; ++r) __builtin_prefetch(mask + (Rows + r) * w.mask_stride + first / 8);
      for (int r = 0; r < Rows; ++r) {
        uint32_t bits;
        memcpy(&bits, mask + r * w.mask_stride + first / 8, sizeof bits);
        __builtin_prefetch(at[r] + ahead);
#if EBFT_AVX512
        if constexpr (Dots) {
          const auto weights = __m512bh(expand16(at[r], bits));
          for (int b = 0; b < Batch; ++b)
            part[r][b].v = _mm512_dpbf16_ps(part[r][b].v, weights, __m512bh(_mm512_loadu_si512(x + b * x_stride + first / 2)));
          at[r] += __builtin_popcount(bits) * size_of<V>();
          continue;
        }
#endif
        const Weights weights = expand<V>(at[r], bits);
        at[r] += __builtin_popcount(bits) * size_of<V>();
        for (int b = 0; b < Batch; ++b)
          for (int i = 0; i < kParts; ++i)
            part[r][b] = multiply_add(weights.part[i], wide_load(x + b * x_stride + first + i * kLanesWide), part[r][b]);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      const Wide scale = wide_set(kScaled ? w.scales[(row + r) * w.scale_stride + begin / kScaleGroup] : 1.0f);
      for (int b = 0; b < Batch; ++b) sum[r][b] = kScaled ? multiply_add(part[r][b], scale, sum[r][b]) : part[r][b];
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int b = 0; b < Batch; ++b) to[b * to_stride + r] = sum_of(sum[r][b]);
  bool fits = true;
  for (int r = 0; r < Rows; ++r) {
    uint32_t last;
    memcpy(&last, mask + (r + 1) * w.mask_stride - sizeof last, sizeof last);
    fits &= at[r] == values + offsets[r + 1] * size_of<V>() && !(last & w.padding);
  }
  return fits;
}

// Values that a row's kernel may touch: its mask's words may keep that many, and a load takes kMostOverread.
inline int64_t most_read(const Compressed& w) { return w.mask_stride * 8 + kMostOverread; }

// One row whose values end where no more may be read: from a copy with room behind it.
template <Value V, bool Dots, int Batch>
bool multiply_last(const Compressed& w, int64_t row, const float* x, int64_t x_stride, float* to, int64_t to_stride, char* room) {
  const int64_t from = w.row_offsets[row], count = w.row_offsets[row + 1] - from, size = size_of<V>();
  if (count > 0) memcpy(room, static_cast<const char*>(w.values) + from * size, size_t(count * size));
  memset(room + count * size, 0, size_t((most_read(w) - count) * size));
  const int64_t offsets[2] = {0, count};
  Compressed alone = w;
  alone.mask += row * w.mask_stride;
  if (w.scales) alone.scales += row * w.scale_stride;
  alone.values = room;
  alone.row_offsets = offsets;
  return multiply<V, Dots, 1, Batch>(alone, 0, x, x_stride, to, to_stride);
}

template <Value V, bool Dots, int Batch>
bool rows_batch(const Compressed& w, int64_t row0, int64_t row1, const float* x, int64_t x_stride, float* to, int64_t to_stride,
                char* room) {
  // As many as leave the sums in registers: AVX-512 has twice as many.
  constexpr int kRows = Batch <= 2 ? 4 : (EBFT_AVX512 ? 2 : 1) * (Batch == 4 ? 2 : 1);
  const int64_t last = w.total - most_read(w);  // a row that begins here or before reads nothing past the end
  bool fits = true;
  for (int64_t row = row0; row < row1;) {
    bool inside = row + kRows <= row1;
    for (int r = 0; inside && r < kRows; ++r) inside = w.row_offsets[row + r] <= last;
    if (inside) {
      fits &= multiply<V, Dots, kRows, Batch>(w, row, x, x_stride, to + row, to_stride);
      row += kRows;
    } else {
      fits &= multiply_last<V, Dots, Batch>(w, row, x, x_stride, to + row, to_stride, room);
      ++row;
    }
  }
  return fits;
}

template <Value V, bool Dots = false>
bool rows_value(const Compressed& w, int64_t row0, int64_t row1, const float* x, int64_t x_stride, int64_t batch, float* to,
                int64_t to_stride, char* room) {
  bool fits = true;
  while (batch > 0) {
    const int step = batch >= 8 ? 8 : batch >= 4 ? 4 : batch >= 2 ? 2 : 1;
    if (step == 8) fits &= rows_batch<V, Dots, 8>(w, row0, row1, x, x_stride, to, to_stride, room);
    else if (step == 4) fits &= rows_batch<V, Dots, 4>(w, row0, row1, x, x_stride, to, to_stride, room);
    else if (step == 2) fits &= rows_batch<V, Dots, 2>(w, row0, row1, x, x_stride, to, to_stride, room);
    else fits &= rows_batch<V, Dots, 1>(w, row0, row1, x, x_stride, to, to_stride, room);
    batch -= step, x += step * x_stride, to += step * to_stride;
  }
  return fits;
}

// Rows [row0, row1) of W times `batch` rows of arranged x into `to`; `room` holds most_read(w) values. Row offsets rise from 0 to `total`
// (check_offsets). False, and nothing read past the values, if the bits do not fit them: then `to` means nothing.
bool compressed_rows(const Compressed& w, Value value, int64_t row0, int64_t row1, const float* x, int64_t x_stride,
                     bool dots, int64_t batch, float* to, int64_t to_stride, char* room) {
#if EBFT_AVX512
  if (dots) return rows_value<Value::kBfloat16, true>(w, row0, row1, x, x_stride, batch, to, to_stride, room);
#endif
  (void)dots;
  if (value == Value::kFloat) return rows_value<Value::kFloat>(w, row0, row1, x, x_stride, batch, to, to_stride, room);
  if (value == Value::kBfloat16) return rows_value<Value::kBfloat16>(w, row0, row1, x, x_stride, batch, to, to_stride, room);
  if (value == Value::kHalf) return rows_value<Value::kHalf>(w, row0, row1, x, x_stride, batch, to, to_stride, room);
  return rows_value<Value::kInt8>(w, row0, row1, x, x_stride, batch, to, to_stride, room);
}

// --- a row of floats and its kept ones, of which there are `kept` ------------------------------------------------------------

// Nothing is written past them: what follows may be another thread's.
void gather_row(const uint8_t* mask, int64_t width, int64_t kept, const float* from, float* to) {
  int64_t count = 0, i = 0;
  for (; i + 8 <= width; i += 8) {
    const F8 packed = pack(load(from + i), mask[i / 8]);
    const int64_t here = __builtin_popcount(mask[i / 8]);
    if (count + 8 <= kept) {
      store(to + count, packed);
    } else {
      float part[8];
      store(part, packed);
      memcpy(to + count, part, size_t(here) * sizeof(float));
    }
    count += here;
  }
  for (; i < width; ++i)
    if (mask[i / 8] >> (i & 7) & 1) to[count++] = from[i];
}

void spread_row(const uint8_t* mask, int64_t width, int64_t kept, const float* from, float* to) {
  int64_t count = 0, i = 0;
  for (; i + 8 <= width; i += 8) {
    if (count + 8 <= kept) {
      store(to + i, spread(load(from + count), mask[i / 8]));
    } else {
      float part[8] = {};
      memcpy(part, from + count, size_t(kept - count) * sizeof(float));
      store(to + i, spread(load(part), mask[i / 8]));
    }
    count += __builtin_popcount(mask[i / 8]);
  }
  for (; i < width; ++i) to[i] = (mask[i / 8] >> (i & 7) & 1) ? from[count++] : 0.0f;
}
