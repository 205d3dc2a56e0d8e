// y = x W^T for a compressed W and a few rows of x: expand in registers, multiply, add. Included twice, by both.h.
//
// Sixteen inputs at a time. x lies as `arrange` puts it: of each sixteen, the even ones and then the odd ones, because two
// 16-bit values share a 32-bit lane, and the even one becomes a float by a shift, the odd one by a mask.

inline constexpr int64_t kChunk = 16;

void arrange(const float* x, float* to, int64_t width) {
  for (int64_t first = 0; first < width; first += kChunk)
    for (int64_t i = 0; i < kChunk; ++i) {
      int64_t from = first + (i < 8 ? 2 * i : 2 * (i - 8) + 1);
      to[first + i] = from < width ? x[from] : 0.0f;
    }
}

struct Pair {
  F8 even, odd;
};

#if EBFT_AVX2
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

// Sixteen 16-bit lanes of which `low` and `high` say the kept ones.
inline __m256i spread16(const uint16_t* p, uint8_t low, uint8_t high) {
  const auto* first = reinterpret_cast<const __m128i*>(p);
  const auto* second = reinterpret_cast<const __m128i*>(p + kLanes.count[low]);
  __m256i packed = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(first)), _mm_loadu_si128(second), 1);
  __m256i order = _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kShuffle.of16[low]))),
      _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffle.of16[high])), 1);
  return _mm256_shuffle_epi8(packed, order);
}
#endif

// The sixteen weights whose kept ones start at p, as floats, even and odd inputs apart.
template <Value V> inline Pair spread(const void* values, int64_t at, uint8_t low, uint8_t high);

template <> inline Pair spread<Value::kBfloat16>(const void* values, int64_t at, uint8_t low, uint8_t high) {
  const auto* p = static_cast<const uint16_t*>(values) + at;
#if EBFT_AVX2
  __m256i lanes = spread16(p, low, high);
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(lanes, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(lanes, _mm256_set1_epi32(int32_t(0xFFFF0000))))}};
#else
  Pair r;
  uint32_t bits = uint32_t(low) | uint32_t(high) << 8;
  for (int i = 0; i < 16; ++i) {
    uint32_t word = bits >> i & 1 ? uint32_t(*p++) << 16 : 0;
    memcpy(&(i % 2 ? r.odd : r.even).v[i / 2], &word, 4);
  }
  return r;
#endif
}

template <> inline Pair spread<Value::kHalf>(const void* values, int64_t at, uint8_t low, uint8_t high) {
  const auto* p = static_cast<const uint16_t*>(values) + at;
  uint16_t lanes[16] = {};
#if EBFT_AVX2
  __m256i all = spread16(p, low, high);
  // Even and odd 16-bit lanes apart, then both halves to floats.
  __m256i sorted = _mm256_shuffle_epi8(all, _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5,
                                                            8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  sorted = _mm256_permute4x64_epi64(sorted, 0xD8);
  (void)lanes;
  return {{_mm256_cvtph_ps(_mm256_castsi256_si128(sorted))}, {_mm256_cvtph_ps(_mm256_extracti128_si256(sorted, 1))}};
#else
  uint32_t bits = uint32_t(low) | uint32_t(high) << 8;
  for (int i = 0; i < 16; ++i)
    if (bits >> i & 1) lanes[i / 2 + (i % 2 ? 8 : 0)] = *p++;
  return {load_half(lanes), load_half(lanes + 8)};
#endif
}

inline Pair even_odd(F8 first, F8 second) {
#if EBFT_AVX2
  __m256 even = _mm256_shuffle_ps(first.v, second.v, 0x88), odd = _mm256_shuffle_ps(first.v, second.v, 0xDD);
  return {{_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xD8))},
          {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xD8))}};
#else
  Pair r;
  for (int i = 0; i < 4; ++i) {
    r.even.v[i] = first.v[2 * i], r.even.v[i + 4] = second.v[2 * i];
    r.odd.v[i] = first.v[2 * i + 1], r.odd.v[i + 4] = second.v[2 * i + 1];
  }
  return r;
#endif
}

inline F8 spread_lanes(F8 packed, uint8_t byte) {
  return float_of(permute(bits_of(packed), kLanes.expand[byte]) & lanes_of(byte));
}

template <> inline Pair spread<Value::kFloat>(const void* values, int64_t at, uint8_t low, uint8_t high) {
  const auto* p = static_cast<const float*>(values) + at;
  return even_odd(spread_lanes(load(p), low), spread_lanes(load(p + kLanes.count[low]), high));
}

template <> inline Pair spread<Value::kInt8>(const void* values, int64_t at, uint8_t low, uint8_t high) {
  const auto* p = static_cast<const uint8_t*>(values) + at;
  F8 first = to_float(load_i8(p)), second = to_float(load_i8(p + kLanes.count[low]));
  return even_odd(spread_lanes(first, low), spread_lanes(second, high));
}

inline F8 multiply_add(F8 a, F8 b, F8 sum) {
#if EBFT_AVX2
  return {_mm256_fmadd_ps(a.v, b.v, sum.v)};
#else
  return a * b + sum;
#endif
}

inline float sum_of(F8 a) {
  float v[8];
  store(v, a);
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

inline constexpr int64_t kOverread = 16;  // values that a load may touch past the last one it needs

// Rows [row, row + Rows) times Batch rows of arranged x; to[b * to_stride + r].
template <Value V, int Rows, int Batch>
void multiply(const Compressed& w, int64_t row, const float* x, int64_t x_stride, float* to, int64_t to_stride) {
  F8 sum[Rows][Batch], group[Rows][Batch];
  int64_t at[Rows];
  const uint8_t* mask[Rows];
  for (int r = 0; r < Rows; ++r) {
    at[r] = w.row_offsets[row + r];
    mask[r] = w.mask + (row + r) * w.mask_stride;
    for (int b = 0; b < Batch; ++b) sum[r][b] = group[r][b] = set(0);
  }
  for (int64_t first = 0; first < w.width; first += kChunk) {
    for (int r = 0; r < Rows; ++r) {
      const uint8_t low = mask[r][first / 8], high = mask[r][first / 8 + 1];
      const Pair weights = spread<V>(w.values, at[r], low, high);
      at[r] += kLanes.count[low] + kLanes.count[high];
      for (int b = 0; b < Batch; ++b) {
        const float* p = x + b * x_stride + first;
        F8& into = V == Value::kInt8 ? group[r][b] : sum[r][b];
        into = multiply_add(weights.even, load(p), into);
        into = multiply_add(weights.odd, load(p + 8), into);
      }
    }
    if (V == Value::kInt8 && ((first + kChunk) % kScaleGroup == 0 || first + kChunk >= w.width)) {
      for (int r = 0; r < Rows; ++r) {
        const F8 scale = set(w.scales[(row + r) * w.scale_stride + first / kScaleGroup]);
        for (int b = 0; b < Batch; ++b) {
          sum[r][b] = multiply_add(group[r][b], scale, sum[r][b]);
          group[r][b] = set(0);
        }
      }
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int b = 0; b < Batch; ++b) to[b * to_stride + r] = sum_of(sum[r][b]);
}

template <Value V> inline int64_t size_of() { return V == Value::kFloat ? 4 : V == Value::kInt8 ? 1 : 2; }

// One row whose values end where no more may be read: from a copy with room behind it.
template <Value V, int Batch>
void multiply_last(const Compressed& w, int64_t row, const float* x, int64_t x_stride, float* to, int64_t to_stride, char* room) {
  const int64_t from = w.row_offsets[row], count = w.row_offsets[row + 1] - from, size = size_of<V>();
  memcpy(room, static_cast<const char*>(w.values) + from * size, size_t(count * size));
  memset(room + count * size, 0, size_t(kOverread * size));
  const int64_t offsets[2] = {0, count};
  Compressed alone = w;
  alone.mask += row * w.mask_stride;
  if (w.scales) alone.scales += row * w.scale_stride;
  alone.values = room;
  alone.row_offsets = offsets;
  multiply<V, 1, Batch>(alone, 0, x, x_stride, to, to_stride);
}

template <Value V, int Batch>
void rows_batch(const Compressed& w, int64_t row0, int64_t row1, const float* x, int64_t x_stride, float* to, int64_t to_stride,
                char* room) {
  constexpr int kRows = Batch == 1 ? 4 : Batch == 2 ? 4 : Batch == 4 ? 2 : 1;
  int64_t row = row0;
  for (; row + kRows <= row1 && w.row_offsets[row + kRows] + kOverread <= w.total; row += kRows)
    multiply<V, kRows, Batch>(w, row, x, x_stride, to + row, to_stride);
  for (; row < row1; ++row) multiply_last<V, Batch>(w, row, x, x_stride, to + row, to_stride, room);
}

template <Value V>
void rows_value(const Compressed& w, int64_t row0, int64_t row1, const float* x, int64_t x_stride, int64_t batch, float* to,
                int64_t to_stride, char* room) {
  while (batch > 0) {
    const int step = batch >= 8 ? 8 : batch >= 4 ? 4 : batch >= 2 ? 2 : 1;
    if (step == 8) rows_batch<V, 8>(w, row0, row1, x, x_stride, to, to_stride, room);
    else if (step == 4) rows_batch<V, 4>(w, row0, row1, x, x_stride, to, to_stride, room);
    else if (step == 2) rows_batch<V, 2>(w, row0, row1, x, x_stride, to, to_stride, room);
    else rows_batch<V, 1>(w, row0, row1, x, x_stride, to, to_stride, room);
    batch -= step, x += step * x_stride, to += step * to_stride;
  }
}

// Rows [row0, row1) of W times `batch` rows of arranged x into `to`; `room` holds a row of values and kOverread more.
void compressed_rows(const Compressed& w, Value value, int64_t row0, int64_t row1, const float* x, int64_t x_stride,
                     int64_t batch, float* to, int64_t to_stride, char* room) {
  if (value == Value::kFloat) rows_value<Value::kFloat>(w, row0, row1, x, x_stride, batch, to, to_stride, room);
  else if (value == Value::kBfloat16) rows_value<Value::kBfloat16>(w, row0, row1, x, x_stride, batch, to, to_stride, room);
  else if (value == Value::kHalf) rows_value<Value::kHalf>(w, row0, row1, x, x_stride, batch, to, to_stride, room);
  else rows_value<Value::kInt8>(w, row0, row1, x, x_stride, batch, to, to_stride, room);
}
