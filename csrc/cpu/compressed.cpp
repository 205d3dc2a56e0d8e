// ebft_kernels::compressed_linear and ::decompress on the CPU.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "checks.h"
#include "cpu/compressed.h"
#include "cpu/isa.h"
#include "cpu/tables.h"

#define EBFT_KERNELS "cpu/compressed_kernel.h"
#include "cpu/both.h"

namespace ebft {
namespace {

constexpr int64_t kRowGrain = 64;  // rows that are worth a thread
constexpr int64_t kSlab = 16;

Value value_kind(const at::Tensor& values, const char* op) {
  switch (values.scalar_type()) {
    case at::kFloat: return Value::kFloat;
    case at::kBFloat16: return Value::kBfloat16;
    case at::kHalf: return Value::kHalf;
    case at::kChar: return Value::kInt8;
    default:
      TORCH_CHECK_VALUE(false, op, " got values of ", toString(values.scalar_type()), "; expected float32, bfloat16, float16 or int8");
  }
}

// Everything a kernel relies on, row offsets against the bits included.
Compressed checked(const char* op, const at::Tensor& words, const at::Tensor& values, const at::Tensor& row_offsets,
                   const std::optional<at::Tensor>& scales, int64_t width) {
  TORCH_CHECK_VALUE(words.dim() == 2 && width > 0, op, " got words ", shape_of(words), " for rows of ", width,
                    "; expected (N, ceil(K / 32)) with K of at least 1");
  const int64_t rows = words.size(0);
  check_words(words, op, rows * width, width, at::kCPU);
  check_tensor(values, op, "values", values.scalar_type(), at::kCPU);
  check_tensor(row_offsets, op, "row offsets", at::kLong, at::kCPU);
  TORCH_CHECK_VALUE(row_offsets.numel() == rows + 1, op, " got ", row_offsets.numel(), " row offsets; expected ", rows + 1);
  const bool int8 = value_kind(values, op) == Value::kInt8;
  TORCH_CHECK_VALUE(int8 == scales.has_value(), op, " got ", int8 ? "int8 values without" : "float values with", " scales");
  Compressed w{};
  if (scales) {
    check_tensor(*scales, op, "scales", at::kFloat, at::kCPU);
    w.scale_stride = (width + kScaleGroup - 1) / kScaleGroup;
    TORCH_CHECK_VALUE(scales->numel() == rows * w.scale_stride, op, " got ", scales->numel(), " scales; expected ",
                      rows * w.scale_stride);
    w.scales = scales->const_data_ptr<float>();
  }
  w.mask = static_cast<const uint8_t*>(words.const_data_ptr());
  w.mask_stride = 4 * words_in(width);
  w.values = values.const_data_ptr();
  w.row_offsets = row_offsets.const_data_ptr<int64_t>();
  w.width = width;
  w.total = values.numel();
  TORCH_CHECK_VALUE(w.row_offsets[0] == 0 && w.row_offsets[rows] == w.total, op, " got ", w.total,
                    " values and row offsets up to ", w.row_offsets[rows], "; expected as many");
  return w;
}

// A row's bits and its offsets say the same; cheap beside the row's products, and without it memory could be overrun.
void check_row(const char* op, const Compressed& w, int64_t row) {
  const uint8_t* mask = w.mask + row * w.mask_stride;
  int64_t kept = 0;
  for (int64_t i = 0; i < w.mask_stride; i += 8) {
    uint64_t bits = 0;
    std::memcpy(&bits, mask + i, size_t(w.mask_stride - i < 8 ? w.mask_stride - i : 8));
    kept += __builtin_popcountll(bits);
  }
  TORCH_CHECK_VALUE(w.row_offsets[row + 1] - w.row_offsets[row] == kept, op, " got row offsets that give row ", row, " ",
                    w.row_offsets[row + 1] - w.row_offsets[row], " values; its mask keeps ", kept);
}

void rows_of(const Compressed& w, Value value, int64_t row0, int64_t row1, const float* x, int64_t x_stride, int64_t batch,
             float* to, int64_t to_stride, char* room) {
#ifdef EBFT_HAS_AVX2_KERNELS
  if (has_avx2()) return avx2::compressed_rows(w, value, row0, row1, x, x_stride, batch, to, to_stride, room);
#endif
  plain::compressed_rows(w, value, row0, row1, x, x_stride, batch, to, to_stride, room);
}

at::Tensor compressed_linear(const at::Tensor& x, const at::Tensor& words, const at::Tensor& values, const at::Tensor& row_offsets,
                             const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& bias, int64_t width) {
  const char* op = "compressed_linear";
  const Compressed w = checked(op, words, values, row_offsets, scales, width);
  const Value value = value_kind(values, op);
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == width, op, " got x ", shape_of(x), "; expected (..., ", width, ")");
  TORCH_CHECK_VALUE(x.is_floating_point() && x.device() == at::kCPU, op, " got x of ", toString(x.scalar_type()), " on ",
                    x.device(), "; expected floats on the CPU");
  const int64_t rows = words.size(0), batch = x.numel() / width, x_stride = (width + plain::kChunk - 1) / plain::kChunk * plain::kChunk;
  if (bias) TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == rows, op, " got bias ", shape_of(*bias), "; expected (", rows, ")");

  const at::Tensor wide = x.reshape({batch, width}).to(at::kFloat).contiguous();
  std::vector<float> arranged(static_cast<size_t>(batch * x_stride));
  for (int64_t b = 0; b < batch; ++b)
    plain::arrange(wide.const_data_ptr<float>() + b * width, arranged.data() + b * x_stride, width);
  at::Tensor y = at::empty({batch, rows}, wide.options());
  float* to = y.mutable_data_ptr<float>();
  at::parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    std::vector<char> room(static_cast<size_t>((width + plain::kOverread) * 4));
    for (int64_t slab = begin; slab < end; slab += kSlab) {  // checked while they are in the cache
      const int64_t stop = slab + kSlab < end ? slab + kSlab : end;
      for (int64_t row = slab; row < stop; ++row) check_row(op, w, row);
      rows_of(w, value, slab, stop, arranged.data(), x_stride, batch, to, rows, room.data());
    }
  });
  if (bias) y.add_(bias->to(at::kFloat));
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = rows;
  return y.to(x.scalar_type()).reshape(sizes);
}

template <typename T> void decompress_row(const Compressed& w, int64_t row, const T* values, T* to) {
  const uint8_t* mask = w.mask + row * w.mask_stride;
  const T* from = values + w.row_offsets[row];
  for (int64_t i = 0; i < w.width; ++i) to[i] = (mask[i / 8] >> (i & 7) & 1) ? *from++ : T(0);
}

at::Tensor decompress(const at::Tensor& words, const at::Tensor& values, const at::Tensor& row_offsets,
                      const std::optional<at::Tensor>& scales, int64_t width) {
  const char* op = "decompress";
  const Compressed w = checked(op, words, values, row_offsets, scales, width);
  const int64_t rows = words.size(0);
  const Value value = value_kind(values, op);
  at::Tensor dense = at::empty({rows, width}, values.options().dtype(value == Value::kInt8 ? at::kFloat : values.scalar_type()));
  void* to = dense.mutable_data_ptr();
  at::parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    std::vector<int8_t> codes(static_cast<size_t>(value == Value::kInt8 ? width : 0));
    for (int64_t row = begin; row < end; ++row) {
      check_row(op, w, row);
      if (value == Value::kFloat) {
        decompress_row(w, row, static_cast<const float*>(w.values), static_cast<float*>(to) + row * width);
      } else if (value == Value::kInt8) {
        decompress_row(w, row, static_cast<const int8_t*>(w.values), codes.data());
        float* out = static_cast<float*>(to) + row * width;
        const float* scale = w.scales + row * w.scale_stride;
        for (int64_t i = 0; i < width; ++i) out[i] = float(codes[size_t(i)]) * scale[i / kScaleGroup];
      } else {
        decompress_row(w, row, static_cast<const uint16_t*>(w.values), static_cast<uint16_t*>(to) + row * width);
      }
    }
  });
  return dense;
}

}  // namespace

TORCH_LIBRARY_IMPL(ebft_kernels, CPU, m) {
  m.impl("compressed_linear.native", compressed_linear);
  m.impl("decompress.native", decompress);
}

}  // namespace ebft
