// Masked AdamW over a span of one parameter, eight places at a time. The arithmetic is that of
// ebft_kernels/reference.py, operation by operation, so results are equal bit for bit (no contraction into FMA).
// Included twice, by both.h.

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

// The first word of Philox 4x32-10 with counter (place, place >> 32, param, step) for eight places from `first`.
inline I8 philox(const AdamWSettings& a, int64_t first) {
  uint32_t low = uint32_t(first);
  I8 sign = seti(int32_t(0x80000000));
  I8 c0 = seti(int32_t(low)) + lane_numbers();
  I8 carry = greater(seti(int32_t(low)) ^ sign, c0 ^ sign);  // ~0 where the low word wrapped
  I8 c1 = seti(int32_t(uint32_t(uint64_t(first) >> 32))) - carry;
  I8 c2 = seti(int32_t(a.param_id)), c3 = seti(int32_t(a.step));
  uint32_t k0 = a.seed_low, k1 = a.seed_high;
  for (int round = 0; round < 10; ++round) {
    I8 low0 = mullo(c0, 0xD2511F53u), high0 = mulhi(c0, 0xD2511F53u);
    I8 low1 = mullo(c2, 0xCD9E8D57u), high1 = mulhi(c2, 0xCD9E8D57u);
    c0 = high1 ^ c1 ^ seti(int32_t(k0));
    c1 = low1;
    c2 = high0 ^ c3 ^ seti(int32_t(k1));
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// --- eight elements of a type, whole or in part -----------------------------------------------------------------------

// Reads the lanes of `lanes` alone, for the ends of rows and tensors.
template <typename T> inline void copy_lanes(T* to, const T* from, uint8_t lanes) {
  for (int i = 0; i < 8; ++i)
    if (lanes >> i & 1) to[i] = from[i];
}

template <Weight W> struct ParamType { using type = uint16_t; };
template <> struct ParamType<Weight::kFloat> { using type = float; };

template <Weight W> inline F8 read8(const typename ParamType<W>::type* p) {
  if constexpr (W == Weight::kFloat) return load(p);
  else if constexpr (W == Weight::kMasterHalf) return load_half(p);
  else return from_bfloat16(load_u16(p));
}

template <Weight W> inline F8 read(const typename ParamType<W>::type* p, uint8_t lanes) {
  if (lanes == 0xFF) return read8<W>(p);
  typename ParamType<W>::type part[8] = {};
  copy_lanes(part, p, lanes);
  return read8<W>(part);
}

template <Weight W>
inline void write8(typename ParamType<W>::type* p, F8 value, const AdamWSettings& a, int64_t place) {
  if constexpr (W == Weight::kFloat) {
    store(p, value);
  } else if constexpr (W == Weight::kMasterHalf) {
    store_half(p, value);
  } else if constexpr (W == Weight::kMasterBfloat16) {
    store_u16(p, to_bfloat16(value));
  } else {
    I8 bits = bits_of(value);
    I8 rounded = shr<16>(bits + (philox(a, place) & seti(0xFFFF)));
    store_u16(p, select(rounded, to_bfloat16(value), is_not_finite(bits)));
  }
}

template <Weight W>
inline void write(typename ParamType<W>::type* p, F8 value, uint8_t lanes, const AdamWSettings& a, int64_t place) {
  if (lanes == 0xFF) return write8<W>(p, value, a, place);
  typename ParamType<W>::type part[8];
  write8<W>(part, value, a, place);
  copy_lanes(p, part, lanes);
}

// --- stored entries: a float32 or bfloat16 array ----------------------------------------------------------------------

// `stored` entries from p on belong to lanes `from` (count of them), in order. Where eight can be touched (`whole`) the
// others are written back as they were.
inline F8 expand(F8 packed, uint8_t from) { return float_of(permute(bits_of(packed), kLanes.expand[from])); }
inline F8 compress(F8 lanes, uint8_t from) { return float_of(permute(bits_of(lanes), kLanes.compress[from])); }

inline void load8(const float* p, F8* value) { *value = load(p); }
inline void load8(const uint16_t* p, F8* value) { *value = from_bfloat16(load_u16(p)); }
inline void store8(float* p, F8 value) { store(p, value); }
inline void store8(uint16_t* p, F8 value) { store_u16(p, to_bfloat16(value)); }

template <typename T> inline F8 load_stored(const T* p, int count, bool whole) {
  F8 value;
  if (whole) {
    load8(p, &value);
  } else {
    T part[8] = {};
    for (int i = 0; i < count; ++i) part[i] = p[i];
    load8(part, &value);
  }
  return value;
}

template <typename T> inline void store_stored(T* p, F8 value, F8 before, int count, bool whole) {
  if (whole) {
    I8 mine = lanes_of(uint8_t((1 << count) - 1));
    store8(p, float_of(select(bits_of(before), bits_of(value), mine)));
  } else {
    T part[8];
    store8(part, value);
    for (int i = 0; i < count; ++i) p[i] = part[i];
  }
}

// --- stored entries: 8-bit codes --------------------------------------------------------------------------------------

template <bool Signed> struct Codes {
  static constexpr int32_t kOffset = Signed ? 944 << 20 : 952 << 20;
  static constexpr float kTop = Signed ? 1.875f : 1.9375f, kHighest = Signed ? 127.0f : 255.0f;

  uint8_t* codes;
  float* scales;
  int64_t block;              // the block being gathered
  int filled = 0;             // entries of it in `values`
  float values[kBlock + 8];   // new values, until the block is whole and its scale known

  Codes(void* codes, float* scales, int64_t block) : codes(static_cast<uint8_t*>(codes)), scales(scales), block(block) {}

  F8 decode(I8 code, F8 scale) const {
    I8 sign = code & seti(int32_t(0x80000000));
    I8 size = code;
    if constexpr (Signed) size = select(code, seti(0) - code, greater(seti(0), code));
    F8 root = to_float(size);
    I8 fraction = shl<3>(bits_of(root) - seti(kOffset));
    fraction = select(fraction, seti(0), equal(size, seti(0)));
    F8 value = float_of(fraction) * scale;
    if constexpr (Signed) value = float_of(bits_of(value) | sign);
    return value;
  }

  F8 read_codes(int64_t at, int count, bool whole) const {
    if (count == 0) return set(0);  // there may be no scale either
    uint8_t part[8] = {};
    const uint8_t* p = codes + at;
    if (!whole) {
      for (int i = 0; i < count; ++i) part[i] = p[i];
      p = part;
    }
    I8 code;
    if constexpr (Signed) code = load_i8(p);
    else code = load_u8(p);
    int64_t number = at / kBlock;
    F8 scale = set(scales[number]);
    int left = int((number + 1) * kBlock - at);  // entries before the next scale
    if (left < count) {
      I8 next = greater(lane_numbers(), seti(left - 1));
      scale = float_of(select(bits_of(scale), bits_of(set(scales[number + 1])), next));
    }
    return decode(code, scale);
  }

  void push(F8 value, int count) {
    store(values + filled, value);
    filled += count;
    if (filled >= kBlock) {
      encode(kBlock);
      filled -= kBlock;
      for (int i = 0; i < filled; ++i) values[i] = values[kBlock + i];
      ++block;
    }
  }

  // Writes the codes and the scale of the first `count` values as those of block number `block`.
  void encode(int count) {
    for (int i = count; i < (count + 7) / 8 * 8; ++i) values[i] = 0;
    I8 size_mask = seti(0x7FFFFFFF);
    F8 largest8 = set(0);
    bool nan = false;
    for (int i = 0; i < count; i += 8) largest8 = max8(float_of(bits_of(load(values + i)) & size_mask), largest8);
    float lanes[8], largest = 0;
    store(lanes, largest8);
    for (int i = 0; i < 8; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
    for (int i = 0; i < count; ++i) nan |= values[i] != values[i];
    if (nan) largest = __builtin_nanf("");
    float clamped = largest < 0x1p-100f ? 0x1p-100f : largest;
    F8 factor = set(kTop / clamped);
    uint8_t out[kBlock + 8];
    for (int i = 0; i < count; i += 8) {
      I8 bits = bits_of(load(values + i));
      F8 fraction = float_of(bits & size_mask) * factor;
      F8 root = float_of(shr<3>(bits_of(fraction)) + seti(kOffset));
      I8 code = round_to_int(min8(root, set(kHighest)));
      if constexpr (Signed) {
        code = select(code, seti(0) - code, greater(seti(0), bits));
      } else {  // above 0 never becomes 0
        I8 lost = equal(code, seti(0)) & greater(bits, seti(0));
        code = select(code, seti(1), lost);
      }
      store_8(out + i, code);
    }
    uint8_t* p = codes + block * kBlock;
    for (int i = 0; i < count; ++i) p[i] = out[i];
    scales[block] = largest == 0 ? 0 : clamped / kTop;
  }

  void finish() {
    if (filled) encode(filled);
  }
};

// --- the step ---------------------------------------------------------------------------------------------------------

template <Weight W, Moment M, bool Compact>
void adamw_span(const AdamWTensors& t, const AdamWSettings& a, const Span& span) {
  using Param = typename ParamType<W>::type;
  using Stored = std::conditional_t<M == Moment::kBfloat16, uint16_t, float>;
  constexpr bool kMaster = W == Weight::kMasterBfloat16 || W == Weight::kMasterHalf;
  auto* param = static_cast<Param*>(t.param);
  auto* grad = static_cast<Param*>(t.grad);
  auto* m_stored = static_cast<Stored*>(t.exp_avg);
  auto* v_stored = static_cast<Stored*>(t.exp_avg_sq);
  Codes<true> m_codes(t.exp_avg, t.exp_avg_scale, span.stored0 / kBlock);
  Codes<false> v_codes(t.exp_avg_sq, t.exp_avg_sq_scale, span.stored0 / kBlock);

  const F8 decay = set(a.decay), beta1 = set(a.beta1), one_minus_beta1 = set(a.one_minus_beta1);
  const F8 beta2 = set(a.beta2), one_minus_beta2 = set(a.one_minus_beta2);
  const F8 step_size = set(a.step_size), correction = set(a.correction), eps = set(a.eps), grad_scale = set(a.grad_scale);

  int64_t stored = span.stored0;
  for (int64_t row = span.row0; row <= span.row1; ++row) {
    const int64_t begin = row == span.row0 ? span.col0 : 0, end = row == span.row1 ? span.col1 : t.width;
    const uint8_t* mask = t.mask ? t.mask + row * t.mask_stride : nullptr;
    for (int64_t col = begin; col < end;) {
      const int64_t first = col & ~int64_t(7), place = row * t.width + first;
      const int lane0 = int(col - first), lane1 = int(end - first < 8 ? end - first : 8);
      const auto lanes = uint8_t(((1 << lane1) - 1) & ~((1 << lane0) - 1));
      const auto keep = uint8_t(mask ? mask[first / 8] & lanes : lanes);
      const uint8_t owners = Compact ? keep : lanes;  // the lanes that have stored entries
      const int count = kLanes.count[owners];
      const bool whole = stored + 8 <= span.stored1;
      col = first + lane1;

      F8 m_before, v_before, w_before, m, v, w;
      if constexpr (M == Moment::kInt8) {
        m_before = m_codes.read_codes(stored, count, whole);
        v_before = v_codes.read_codes(stored, count, whole);
      } else {
        m_before = load_stored(m_stored + stored, count, whole);
        v_before = load_stored(v_stored + stored, count, whole);
      }
      if constexpr (kMaster) w_before = load_stored(t.master + stored, count, whole);
      else w = read<W>(param + place, lanes);
      const bool spread = owners != 0xFF;
      m = spread ? expand(m_before, owners) : m_before;
      v = spread ? expand(v_before, owners) : v_before;
      if constexpr (kMaster) w = spread ? expand(w_before, owners) : w_before;

      const I8 kept = lanes_of(keep);
      F8 g = float_of(bits_of(read<W>(grad + place, lanes)) & kept);
      if (a.scaled) g = g * grad_scale;
      w = w * decay;
      m = beta1 * m + one_minus_beta1 * g;
      v = beta2 * v + one_minus_beta2 * g * g;
      w = w - step_size * m / (sqrt8(v) * correction + eps);
      w = float_of(bits_of(w) & kept);
      m = float_of(bits_of(m) & kept);
      v = float_of(bits_of(v) & kept);

      write<W>(param + place, w, lanes, a, place);
      if (a.zero_grads) {
        if (lanes == 0xFF) memset(grad + place, 0, 8 * sizeof(Param));
        else memset(grad + place + lane0, 0, size_t(lane1 - lane0) * sizeof(Param));
      }
      if (spread) {
        m = compress(m, owners);
        v = compress(v, owners);
        if constexpr (kMaster) w = compress(w, owners);
      }
      if constexpr (M == Moment::kInt8) {
        m_codes.push(m, count);
        v_codes.push(v, count);
      } else {
        store_stored(m_stored + stored, m, m_before, count, whole);
        store_stored(v_stored + stored, v, v_before, count, whole);
      }
      if constexpr (kMaster) store_stored(t.master + stored, w, w_before, count, whole);
      stored += count;
    }
  }
  if constexpr (M == Moment::kInt8) {
    m_codes.finish();
    v_codes.finish();
  }
}

template <Weight W, Moment M> void adamw_layout(const AdamWTensors& t, const AdamWSettings& a, const Span& span, bool compact) {
  if (compact) adamw_span<W, M, true>(t, a, span);
  else adamw_span<W, M, false>(t, a, span);
}

template <Weight W>
void adamw_moment(const AdamWTensors& t, const AdamWSettings& a, const Span& span, Moment moment, bool compact) {
  if (moment == Moment::kFloat) adamw_layout<W, Moment::kFloat>(t, a, span, compact);
  else if (moment == Moment::kBfloat16) adamw_layout<W, Moment::kBfloat16>(t, a, span, compact);
  else adamw_layout<W, Moment::kInt8>(t, a, span, compact);
}

void adamw(const AdamWTensors& t, const AdamWSettings& a, const Span& span, Weight weight, Moment moment, bool compact) {
  if (weight == Weight::kFloat) adamw_moment<Weight::kFloat>(t, a, span, moment, compact);
  else if (weight == Weight::kMasterBfloat16) adamw_moment<Weight::kMasterBfloat16>(t, a, span, moment, compact);
  else if (weight == Weight::kMasterHalf) adamw_moment<Weight::kMasterHalf>(t, a, span, moment, compact);
  else adamw_moment<Weight::kStochastic>(t, a, span, moment, compact);
}

// The sum of the squares of the kept entries of rows [row0, row1) of a gradient, in double.
template <Weight W>
double square_sum(const void* grad, const uint8_t* mask, int64_t mask_stride, int64_t width, int64_t row0, int64_t row1) {
  double total = 0;
  for (int64_t row = row0; row < row1; ++row) {
    const auto* p = static_cast<const typename ParamType<W>::type*>(grad) + row * width;
    F8 sum = set(0);
    for (int64_t first = 0; first < width; first += 8) {
      const auto lanes = uint8_t(width - first < 8 ? (1 << (width - first)) - 1 : 0xFF);
      const auto keep = uint8_t(mask ? mask[row * mask_stride + first / 8] & lanes : lanes);
      F8 g = float_of(bits_of(read<W>(p + first, lanes)) & lanes_of(keep));
      sum = sum + g * g;
    }
    float part[8];
    store(part, sum);
    for (float value : part) total += double(value);
  }
  return total;
}
