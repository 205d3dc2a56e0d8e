// Masked AdamW over a span of one parameter, eight values at a time. The arithmetic is that of
// ebft_kernels/reference.py, operation by operation, so results are equal bit for bit (no contraction into FMA).
// Included by every_isa.h.
//
// A row is taken in chunks of kChunk places. Dense states lie as the parameter does, and one loop does everything. With compact
// states the survivors of a chunk are first packed, so that states are read and written as they lie and the arithmetic is done for
// survivors alone, and then spread over the chunk again:
//
//     param, grad   . a . . b c . d        pack      a b c d      + states of a b c d, where they lie      spread
//     mask          0 1 0 0 1 1 0 1       ----->                  ------------------------------->  a'b'c'd'  ----->  0 a' 0 0 b' c' 0 d'

// --- bfloat16 ---------------------------------------------------------------------------------------------------------

inline F8 from_bfloat16(I8 bits) { return float_of(shl<16>(bits)); }

inline I8 is_not_finite(I8 bits) {
  I8 exponent = seti(0x7F800000);
  return equal(bits & exponent, exponent);
}

// To nearest even, in the low half of each lane; NaN becomes 0x7FC0 with no sign, as in torch.
inline I8 to_bfloat16(F8 value) {
  I8 bits = bits_of(value);
  I8 rounded = shr<16>(bits + seti(0x7FFF) + (shr<16>(bits) & seti(1)));
  I8 nan = greater(bits & seti(0x7FFFFFFF), seti(0x7F800000));
  return select(rounded, seti(0x7FC0), nan);
}

// The first word of Philox 4x32-10 with counter (place, place >> 32, param, step) for the places first + offsets.
inline I8 philox(const AdamWSettings& a, int64_t first, I8 offsets) {
  const uint32_t low = uint32_t(first);
  const I8 sign = seti(int32_t(0x80000000));
  I8 c0 = seti(int32_t(low)) + offsets;
  const I8 carry = greater(seti(int32_t(low)) ^ sign, c0 ^ sign);  // ~0 where the low word wrapped
  I8 c1 = seti(int32_t(uint32_t(uint64_t(first) >> 32))) - carry;
  I8 c2 = seti(int32_t(a.param_id)), c3 = seti(int32_t(a.step));
  uint32_t k0 = a.seed_low, k1 = a.seed_high;
  for (int round = 0; round < 10; ++round) {
    const I8 low0 = mullo(c0, 0xD2511F53u), high0 = mulhi(c0, 0xD2511F53u);
    const I8 low1 = mullo(c2, 0xCD9E8D57u), high1 = mulhi(c2, 0xCD9E8D57u);
    c0 = high1 ^ c1 ^ seti(int32_t(k0));
    c1 = low1;
    c2 = high0 ^ c3 ^ seti(int32_t(k1));
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// To a bfloat16, seen as float, by the low 16 random bits; infinity and NaN as they are.
inline F8 round_stochastically(F8 value, I8 random) {
  const I8 bits = bits_of(value);
  const I8 rounded = (bits + (random & seti(0xFFFF))) & seti(int32_t(0xFFFF0000));
  return float_of(select(rounded, shl<16>(to_bfloat16(value)), is_not_finite(bits)));
}

// --- up to eight elements of an array -----------------------------------------------------------------------------------

struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline F8 load(const Bfloat16* p) { return from_bfloat16(load_u16(&p->bits)); }
inline F8 load(const Half* p) { return load_half(&p->bits); }
inline void store(Bfloat16* p, F8 value) { store_u16(&p->bits, to_bfloat16(value)); }
inline void store(Half* p, F8 value) { store_half(&p->bits, value); }

struct Eight {
  constexpr operator int() const { return 8; }
};

template <typename T> inline F8 load(const T* p, Eight) { return load(p); }
template <typename T> inline void store(T* p, F8 value, Eight) { store(p, value); }
inline F8 load(const float* p, int count) { return load_first(p, count); }
template <typename T> inline F8 load(const T* p, int count) {
  if (count == 8) return load(p);
  T part[8] = {};
  for (int i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
}

template <typename T> inline void store(T* p, F8 value, int count) {
  if (count == 8) return store(p, value);
  T part[8];
  store(part, value);
  for (int i = 0; i < count; ++i) p[i] = part[i];
}

inline int eight_or(int left) { return left < 8 ? left : 8; }

// Calls f(i, count) for i = 0, 8, ... below n: `count` is 8 at compile time, and at run time for what is left.
template <typename F> inline __attribute__((always_inline)) void for_eights(size_t n, const F& f) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8) f(i, Eight());
  if (i < n) f(i, int(n - i));
}

// --- stored moments -------------------------------------------------------------------------------------------------------
// begin(n): the next n stored values are to be read, load(i) ..., and written, store(i) ..., both in order; end(n): they have been.

template <typename T> struct Plain {
  T* next;

  Plain(void* moments, float*, int64_t first) : next(static_cast<T*>(moments) + first) {}
  void begin(int) {}
  template <typename Count> F8 load_at(size_t i, Count count) const { return load(next + i, count); }
  template <typename Count> void store_at(size_t i, F8 value, Count count) { store(next + i, value, count); }
  void end(int n) { next += n; }
  void finish() {}
};

template <bool Signed> struct Codes {
  static constexpr int32_t kOffset = Signed ? 944 << 20 : 952 << 20;
  static constexpr float kTop = Signed ? 1.875f : 1.9375f, kHighest = Signed ? 127.0f : 255.0f;

  uint8_t* codes;
  float* scales;
  int64_t at;       // the next value to be read
  int64_t written;  // the first value that is not written yet; begins a block
  int waiting = 0;  // how many there are from it on, in `after`
  float before[kChunk + 8], after[kBlock + kChunk + 8];

  Codes(void* moments, float* scales, int64_t first)
      : codes(static_cast<uint8_t*>(moments)), scales(scales), at(first), written(first) {}

  void begin(int n) {
    for (int i = 0; i < n;) {
      const int64_t block = (at + i) / kBlock;
      const int left = int((block + 1) * kBlock - (at + i)), stop = left < n - i ? i + left : n;
      const F8 scale = set(scales[block]);
      for (; i < stop; i += 8) {
        const int count = eight_or(stop - i);
        const uint8_t* p = codes + at + i;
        uint8_t part[8] = {};
        if (count < 8) {
          for (int j = 0; j < count; ++j) part[j] = p[j];
          p = part;
        }
        store(before + i, decode(Signed ? load_i8(p) : load_u8(p), scale));
      }
      i = stop;
    }
    at += n;
  }

  F8 load_at(size_t i, int) const { return load(before + i); }
  void store_at(size_t i, F8 value, int) { store(after + waiting + i, value); }

  void end(int n) {
    waiting += n;
    int done = 0;
    for (; waiting - done >= kBlock; done += int(kBlock)) encode(after + done, int(kBlock));
    waiting -= done;
    if (done) memmove(after, after + done, size_t(waiting) * sizeof(float));
  }

  void finish() {
    if (waiting) encode(after, waiting);
  }

  F8 decode(I8 code, F8 scale) const {
    const I8 size = Signed ? abs8(code) : code;
    I8 fraction = shl<3>(bits_of(to_float(size)) - seti(kOffset));
    fraction = select(fraction, seti(0), equal(size, seti(0)));
    const F8 value = float_of(fraction) * scale;
    return Signed ? float_of(bits_of(value) ^ (code & seti(int32_t(0x80000000)))) : value;
  }

  // The codes and the scale of the next block, of `count` values.
  void encode(float* values, int count) {
    const I8 size_mask = seti(0x7FFFFFFF);
    I8 largest8 = seti(0);
    for (int i = 0; i < count; i += 8)  // as integers: NaN is the largest
      largest8 = max8(largest8, bits_of(load(values + i, eight_or(count - i))) & size_mask);
    float lanes[8];
    store(lanes, float_of(largest8));
    int32_t bits = 0;
    for (float lane : lanes) {
      int32_t one;
      memcpy(&one, &lane, 4);
      bits = one > bits ? one : bits;
    }
    float largest;
    memcpy(&largest, &bits, 4);
    const float clamped = largest < 0x1p-100f ? 0x1p-100f : largest;
    const F8 factor = set(kTop / clamped);
    uint8_t* p = codes + written;
    for (int i = 0; i < count; i += 8) {
      const I8 value = bits_of(load(values + i));
      const F8 fraction = float_of(value & size_mask) * factor;
      const F8 root = float_of(shr<3>(bits_of(fraction)) + seti(kOffset));
      I8 code = round_to_int(min8(root, set(kHighest)));
      if constexpr (Signed) {
        code = select(code, seti(0) - code, greater(seti(0), value));
      } else {  // above 0 never becomes 0
        code = select(code, seti(1), equal(code, seti(0)) & greater(value, seti(0)));
      }
      uint8_t part[8];
      const int left = eight_or(count - i);
      store_8(left == 8 ? p + i : part, code);
      for (int j = 0; left < 8 && j < left; ++j) p[i + j] = part[j];
    }
    scales[written / kBlock] = largest == 0 ? 0 : clamped / kTop;
    written += count;
  }
};

// --- the step ---------------------------------------------------------------------------------------------------------

struct Step {
  F8 decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, correction, eps, grad_scale;
  bool scaled;

  explicit Step(const AdamWSettings& a)
      : decay(set(a.decay)), beta1(set(a.beta1)), one_minus_beta1(set(a.one_minus_beta1)), beta2(set(a.beta2)),
        one_minus_beta2(set(a.one_minus_beta2)), step_size(set(a.step_size)), correction(set(a.correction)), eps(set(a.eps)),
        grad_scale(set(a.grad_scale)), scaled(a.scaled) {}

  void operator()(F8& w, F8& m, F8& v, F8 g) const {
    if (scaled) g = g * grad_scale;
    w = w * decay;
    m = beta1 * m + one_minus_beta1 * g;
    v = beta2 * v + one_minus_beta2 * g * g;
    w = w - step_size * m / (sqrt8(v) * correction + eps);
  }
};


template <Weight W> struct ParamOf { using type = Bfloat16; };
template <> struct ParamOf<Weight::kFloat> { using type = float; };
template <> struct ParamOf<Weight::kMasterHalf> { using type = Half; };

// One chunk: `n` places from `place` on.
template <typename Param> struct Chunk {
  Param* param;
  Param* grad;
  float* master;        // of the chunk's first stored entry
  const uint8_t* mask;
  int n;
  int64_t place;

  uint32_t keep(size_t i, Eight) const { return mask[i / 8]; }
  uint32_t keep(size_t i, int count) const { return mask[i / 8] & ((1u << count) - 1); }
};

template <Weight W, typename Param, typename M, typename V>
void dense_chunk(const Chunk<Param>& chunk, const AdamWSettings& a, const Step& step, M& m_stored, V& v_stored) {
  constexpr bool kMaster = W == Weight::kMasterBfloat16 || W == Weight::kMasterHalf;
  for_eights(chunk.n, [&](size_t i, auto count) {
    const uint32_t keep = chunk.keep(i, count);
    F8 w, m = m_stored.load_at(i, count), v = v_stored.load_at(i, count);
    if constexpr (kMaster) w = load(chunk.master + i, count);
    else w = load(chunk.param + i, count);
    step(w, m, v, zero_unless(load(chunk.grad + i, count), keep));
    w = zero_unless(w, keep);
    m_stored.store_at(i, zero_unless(m, keep), count);
    v_stored.store_at(i, zero_unless(v, keep), count);
    if constexpr (kMaster) store(chunk.master + i, w, count);
    if constexpr (W == Weight::kStochastic) w = round_stochastically(w, philox(a, chunk.place + int64_t(i), lane_numbers()));
    store(chunk.param + i, w, count);
  });
}

template <Weight W, typename Param, typename M, typename V>
int compact_chunk(const Chunk<Param>& chunk, const AdamWSettings& a, const Step& step, M& m_stored, V& v_stored) {
  constexpr bool kMaster = W == Weight::kMasterBfloat16 || W == Weight::kMasterHalf;
  float weights[kChunk + 8], grads[kChunk + 8], offsets[kChunk + 8];
  size_t kept = 0;
  for_eights(chunk.n, [&](size_t i, auto count) {
    const uint32_t keep = chunk.keep(i, count);
    if constexpr (!kMaster) store(weights + kept, pack(load(chunk.param + i, count), keep));
    store(grads + kept, pack(load(chunk.grad + i, count), keep));
    if constexpr (W == Weight::kStochastic) store(offsets + kept, pack(float_of(lane_numbers() + seti(int32_t(i))), keep));
    kept += __builtin_popcount(keep);
  });

  m_stored.begin(int(kept));
  v_stored.begin(int(kept));
  for_eights(kept, [&](size_t i, auto count) {
    F8 w, m = m_stored.load_at(i, count), v = v_stored.load_at(i, count);
    if constexpr (kMaster) w = load(chunk.master + i, count);
    else w = load(weights + i);
    step(w, m, v, load(grads + i));
    m_stored.store_at(i, m, count);
    v_stored.store_at(i, v, count);
    if constexpr (kMaster) store(chunk.master + i, w, count);
    if constexpr (W == Weight::kStochastic) w = round_stochastically(w, philox(a, chunk.place, bits_of(load(offsets + i))));
    store(weights + i, w);
  });
  m_stored.end(int(kept));
  v_stored.end(int(kept));

  size_t read = 0;
  for_eights(chunk.n, [&](size_t i, auto count) {
    __builtin_prefetch(chunk.param + 512 + i);  // the chunk after the next: from memory that is how long it takes
    __builtin_prefetch(chunk.grad + 512 + i);
    const uint32_t keep = chunk.keep(i, count);
    store(chunk.param + i, spread(load(weights + read), keep), count);
    read += __builtin_popcount(keep);
  });
  return int(kept);
}

template <Weight W, bool Compact, typename M, typename V>
void adamw_span(const AdamWTensors& t, const AdamWSettings& a, const Span& span) {
  using Param = typename ParamOf<W>::type;
  const Step step(a);
  M m_stored(t.exp_avg, t.exp_avg_scale, span.stored0);
  V v_stored(t.exp_avg_sq, t.exp_avg_sq_scale, span.stored0);
  int64_t stored = span.stored0;
  for (int64_t row = span.row0; row <= span.row1; ++row) {
    const int64_t end = row == span.row1 ? span.col1 : t.width;
    for (int64_t col = row == span.row0 ? span.col0 : 0; col < end;) {
      // A span may begin within a byte of the mask: then with the rest of that byte alone.
      const int bit = int(col & 7);
      const uint8_t* mask = t.mask ? t.mask + row * t.mask_stride + col / 8 : kAllKept.bytes;
      const auto rest = uint8_t(*mask >> bit);
      const int64_t most = bit ? 8 - bit : kChunk, n = end - col < most ? end - col : most, place = row * t.width + col;
      Chunk<Param> chunk{static_cast<Param*>(t.param) + place, static_cast<Param*>(t.grad) + place, t.master + stored,
                         bit ? &rest : mask, int(n), place};
      int used = int(n);
      if constexpr (Compact) {
        used = compact_chunk<W>(chunk, a, step, m_stored, v_stored);
      } else {
        m_stored.begin(used);
        v_stored.begin(used);
        dense_chunk<W>(chunk, a, step, m_stored, v_stored);
        m_stored.end(used);
        v_stored.end(used);
      }
      if (a.zero_grads) memset(static_cast<void*>(chunk.grad), 0, size_t(n) * sizeof(Param));
      stored += used;
      col += n;
    }
  }
  m_stored.finish();
  v_stored.finish();
}

template <Weight W, bool Compact>
void adamw_moment(const AdamWTensors& t, const AdamWSettings& a, const Span& span, Moment moment) {
  if (moment == Moment::kFloat) adamw_span<W, Compact, Plain<float>, Plain<float>>(t, a, span);
  else if (moment == Moment::kBfloat16) adamw_span<W, Compact, Plain<Bfloat16>, Plain<Bfloat16>>(t, a, span);
  else adamw_span<W, Compact, Codes<true>, Codes<false>>(t, a, span);
}

template <Weight W>
void adamw_layout(const AdamWTensors& t, const AdamWSettings& a, const Span& span, Moment moment, bool compact) {
  if (compact) adamw_moment<W, true>(t, a, span, moment);
  else adamw_moment<W, false>(t, a, span, moment);
}

void adamw(const AdamWTensors& t, const AdamWSettings& a, const Span& span, Weight weight, Moment moment, bool compact) {
  if (weight == Weight::kFloat) adamw_layout<Weight::kFloat>(t, a, span, moment, compact);
  else if (weight == Weight::kMasterBfloat16) adamw_layout<Weight::kMasterBfloat16>(t, a, span, moment, compact);
  else if (weight == Weight::kMasterHalf) adamw_layout<Weight::kMasterHalf>(t, a, span, moment, compact);
  else adamw_layout<Weight::kStochastic>(t, a, span, moment, compact);
}

// The sum of the squares of the kept entries of rows [row0, row1) of a gradient, in double.
template <Weight W>
double square_sum(const void* grad, const uint8_t* mask, int64_t mask_stride, int64_t width, int64_t row0, int64_t row1) {
  double total = 0;
  for (int64_t row = row0; row < row1; ++row) {
    const auto* p = static_cast<const typename ParamOf<W>::type*>(grad) + row * width;
    F8 sum = set(0);
    for (int64_t first = 0; first < width; first += 8) {
      const int count = width - first < 8 ? int(width - first) : 8;
      const auto keep = uint8_t((mask ? mask[row * mask_stride + first / 8] : 0xFF) & ((1 << count) - 1));
      const F8 g = zero_unless(load(p + first, count), keep);
      sum = sum + g * g;
    }
    float part[8];
    store(part, sum);
    for (float value : part) total += double(value);
  }
  return total;
}
