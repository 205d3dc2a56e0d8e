// Products of many tokens with a weight of which only kept places are stored. Included by every_isa.h.
//
// Lanes run along tokens. A tile holds kTile tokens, input after input: a kept place is one value times kTile numbers that lie
// together. All rows walk one chunk of the tile, which stays in the first cache, before the next:
//
//     y[row][kTile]  +=  value * x[column][kTile]          for each kept (row, column) of a chunk
//     dvalue         +=  sum(dy[row][kTile] * x[column][kTile])

#include "cpu/wide.h"

inline constexpr int kVectors = int(kTile) / kLanesWide;
inline constexpr int kSums = EBFT_AVX512 ? 2 : 1;  // so many sums of a row that enough are under way at a time
inline constexpr int64_t kAhead = 4;               // rows ahead that values are asked for
inline constexpr int64_t kTogether = 8;            // chunks that are added up before they are added to others: sums of sums err less

#if EBFT_AVX2
inline void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_stride);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#else
inline void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}
#endif

// to[column][row] = from[row][column]
inline void transpose(const float* from, int64_t rows, int64_t columns, int64_t from_stride, float* to, int64_t to_stride) {
  for (int64_t c = 0; c < columns; c += 8)
    for (int64_t r = 0; r < rows; r += 8) {
      if (r + 8 <= rows && c + 8 <= columns) {
        transpose8(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
        continue;
      }
      for (int64_t i = r; i < r + 8 && i < rows; ++i)
        for (int64_t j = c; j < c + 8 && j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
    }
}

// A tile of up to kTile tokens (tokens, width), and zeros up to whole ones: (padded, kTile).
void pack_tile(const float* x, int64_t tokens, int64_t width, int64_t padded, float* tile) {
  if (tokens < kTile) memset(tile, 0, size_t(padded * kTile) * sizeof(float));
  else memset(tile + width * kTile, 0, size_t((padded - width) * kTile) * sizeof(float));
  transpose(x, tokens, width, width, tile, kTile);
}

inline void add_place(Wide* sum, float value, const float* x) {
  const Wide w = wide_set(value);
  for (int v = 0; v < kVectors; ++v) sum[v] = multiply_add(w, wide_load(x + v * kLanesWide), sum[v]);
}

// Rows [row0, row1) of y for a tile, to `to` (twice (row1 - row0, kTile)), and from there to y (tokens, rows of all the weight).
void sparse_rows(const Walk& w, const float* values, const float* tile, int64_t row0, int64_t row1, float* to, float* y, int64_t tokens) {
  const int64_t count = (row1 - row0) * kTile;
  float* total = to + count;
  for (int64_t c = 0; c < w.chunks; ++c) {
    const float* x = tile + c * kSparseChunk * kTile;
    for (int64_t row = row0; row < row1; ++row) {
      const int64_t begin = w.offsets[row * w.chunks + c], end = w.offsets[row * w.chunks + c + 1];
      const int64_t soon = w.offsets[(row + kAhead < row1 ? row + kAhead : row) * w.chunks + c];
      __builtin_prefetch(values + soon);
      __builtin_prefetch(values + soon + 16);
      __builtin_prefetch(w.columns + soon);
      Wide sum[kSums][kVectors];
      for (auto& part : sum)
        for (Wide& one : part) one = wide_zero();
      int64_t i = begin;
      for (; i + 4 <= end; i += 4) {
        uint64_t four;
        memcpy(&four, w.columns + i, 8);
        for (int n = 0; n < 4; ++n) add_place(sum[n % kSums], values[i + n], x + int64_t(four >> (16 * n) & 0xFFFF) * kTile);
      }
      for (; i < end; ++i) add_place(sum[0], values[i], x + w.columns[i] * kTile);
      float* out = to + (row - row0) * kTile;
      for (int v = 0; v < kVectors; ++v) {
        Wide all = sum[0][v];
        for (int part = 1; part < kSums; ++part) all = wide_add(all, sum[part][v]);
        wide_store(out + v * kLanesWide, c % kTogether ? wide_add(wide_load(out + v * kLanesWide), all) : all);
      }
    }
    if (w.chunks <= kTogether || (c % kTogether != kTogether - 1 && c != w.chunks - 1)) continue;
    for (int64_t i = 0; i < count; i += kLanesWide)
      wide_store(total + i, c < kTogether ? wide_load(to + i) : wide_add(wide_load(total + i), wide_load(to + i)));
  }
  transpose(w.chunks <= kTogether ? to : total, row1 - row0, tokens, kTile, y + row0, w.rows);
}

inline Wide dot(const Wide (&dy)[kVectors], const float* x) {
  Wide sum = wide_zero();
  for (int v = 0; v < kVectors; ++v) sum = multiply_add(dy[v], wide_load(x + v * kLanesWide), sum);
  return sum;
}

// The sums of four vectors, added to four numbers.
#if EBFT_AVX2
#if EBFT_AVX512
inline __m256 eight_of(Wide a) { return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)); }
#else
inline __m256 eight_of(Wide a) { return a.v; }
#endif
inline void add_sums(float* to, const Wide (&of)[4]) {
  __m256 pairs[2];  // in each half: two sums of the first vector, two of the second
  for (int n = 0; n < 2; ++n) {
    const __m256 a = eight_of(of[2 * n]), b = eight_of(of[2 * n + 1]);
    pairs[n] = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x4E), _mm256_blend_ps(a, b, 0xCC));
  }
  const __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(pairs[0], pairs[1], 0x88), _mm256_shuffle_ps(pairs[0], pairs[1], 0xDD));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), four));
}
#else
inline void add_sums(float* to, const Wide (&of)[4]) {
  for (int n = 0; n < 4; ++n) to[n] += sum_of(of[n]);
}
#endif

// What a tile adds to the gradients of the kept places of rows [row0, row1).
void sparse_dw_rows(const Walk& w, const float* dy_tile, const float* x_tile, int64_t row0, int64_t row1, float* to) {
  for (int64_t c = 0; c < w.chunks; ++c) {
    const float* x = x_tile + c * kSparseChunk * kTile;
    for (int64_t row = row0; row < row1; ++row) {
      const int64_t begin = w.offsets[row * w.chunks + c], end = w.offsets[row * w.chunks + c + 1];
      const int64_t soon = w.offsets[(row + kAhead < row1 ? row + kAhead : row) * w.chunks + c];
      __builtin_prefetch(to + soon, 1);
      __builtin_prefetch(to + soon + 16, 1);
      __builtin_prefetch(w.columns + soon);
      Wide dy[kVectors];
      for (int v = 0; v < kVectors; ++v) dy[v] = wide_load(dy_tile + row * kTile + v * kLanesWide);
      int64_t i = begin;
      for (; i + 4 <= end; i += 4) {
        uint64_t four;
        memcpy(&four, w.columns + i, 8);
        Wide sums[4];
        for (int n = 0; n < 4; ++n) sums[n] = dot(dy, x + int64_t(four >> (16 * n) & 0xFFFF) * kTile);
        add_sums(to + i, sums);
      }
      for (; i < end; ++i) to[i] += sum_of(dot(dy, x + w.columns[i] * kTile));
    }
  }
}
