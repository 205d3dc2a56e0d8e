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
#include "cpu/rows.h"
#include "cpu/tables.h"

#define EBFT_KERNELS "cpu/compressed_kernel.h"
#include "cpu/every_isa.h"

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

at::Tensor compressed_linear(const at::Tensor& x, const at::Tensor& words, const at::Tensor& values, const at::Tensor& row_offsets,
                             const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& bias, int64_t width) {
  const char* op = "compressed_linear";
  const Compressed w = checked(op, words, values, row_offsets, scales, width);
  const Value value = value_kind(values, op);
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == width, op, " got x ", shape_of(x), "; expected (..., ", width, ")");
  TORCH_CHECK_VALUE(x.is_floating_point() && x.device() == at::kCPU, op, " got x of ", toString(x.scalar_type()), " on ",
                    x.device(), "; expected floats on the CPU");
  const auto* bits = static_cast<const uint32_t*>(words.const_data_ptr());
  const int64_t stride = words_in(width);
  const int64_t rows = words.size(0), batch = x.numel() / width, x_stride = (width + kChunkInputs - 1) / kChunkInputs * kChunkInputs;
  if (bias) TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == rows, op, " got bias ", shape_of(*bias), "; expected (", rows, ")");

  const bool dots = value == Value::kBfloat16 && x.scalar_type() == at::kBFloat16 && has_bfloat16_dots();
  const at::Tensor wide = x.reshape({batch, width}).to(at::kFloat).contiguous();
  const at::Tensor arranged = at::empty({batch, x_stride}, wide.options());  // aligned to 64 bytes
  auto* x_rows = arranged.mutable_data_ptr<float>();
  for (int64_t b = 0; b < batch; ++b) EBFT_CALL(arrange, wide.const_data_ptr<float>() + b * width, x_rows + b * x_stride, width, value, dots);
  at::Tensor y = at::empty({batch, rows}, wide.options());
  float* to = y.mutable_data_ptr<float>();
  at::parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    std::vector<char> room(static_cast<size_t>((stride * 32 + kMostOverread) * 4));
    for (int64_t slab = begin; slab < end; slab += kSlab) {  // its values stay in the cache for all of x
      const int64_t stop = slab + kSlab < end ? slab + kSlab : end;
      if (EBFT_CALL(compressed_rows, w, value, slab, stop, x_rows, x_stride, dots, batch, to, rows, room.data())) continue;
      for (int64_t row = slab; row < stop; ++row) check_row(op, w.row_offsets, row, bits + row * stride, stride);
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
  const auto* bits = static_cast<const uint32_t*>(words.const_data_ptr());
  const int64_t stride = words_in(width);
  const int64_t rows = words.size(0);
  const Value value = value_kind(values, op);
  at::Tensor dense = at::empty({rows, width}, values.options().dtype(value == Value::kInt8 ? at::kFloat : values.scalar_type()));
  void* to = dense.mutable_data_ptr();
  at::parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    std::vector<int8_t> codes(static_cast<size_t>(value == Value::kInt8 ? width : 0));
    for (int64_t row = begin; row < end; ++row) {
      check_row(op, w.row_offsets, row, bits + row * stride, stride);
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
