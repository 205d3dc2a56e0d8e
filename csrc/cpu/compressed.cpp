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

// A compressed weight as it is given: everything but whether each row's bits fit its offsets, which is seen as the row is read.
struct Given {
  KeptRows kept;
  Compressed w;
  Value value;
};

Given checked(const char* op, const at::Tensor& words, const at::Tensor& values, const at::Tensor& row_offsets,
              const std::optional<at::Tensor>& scales, int64_t width) {
  TORCH_CHECK_VALUE(words.dim() == 2 && width > 0, op, " got words ", shape_of(words), " for rows of ", width,
                    "; expected (N, ceil(K / 32)) with K of at least 1");
  const int64_t rows = words.size(0);
  const Value value = value_kind(values, op);
  const KeptRows kept = kept_rows(op, words, row_offsets, {rows, width}, at::kCPU);
  check_tensor(values, op, "values", values.scalar_type(), at::kCPU);
  TORCH_CHECK_VALUE(values.dim() == 1, op, " got values ", shape_of(values), "; expected (kept)");
  check_offsets(op, kept, values.numel());
  const bool int8 = value == Value::kInt8;
  TORCH_CHECK_VALUE(int8 == scales.has_value(), op, " got ", int8 ? "int8 values without" : "float values with", " scales");
  Compressed w{};
  if (scales) {
    w.scale_stride = ceil_div(width, kScaleGroup);
    check_tensor(*scales, op, "scales", at::kFloat, at::kCPU);
    TORCH_CHECK_VALUE(scales->sizes() == at::IntArrayRef({rows, w.scale_stride}), op, " got scales ", shape_of(*scales), "; expected (",
                      rows, ", ", w.scale_stride, ")");
    w.scales = scales->const_data_ptr<float>();
  }
  w.mask = reinterpret_cast<const uint8_t*>(kept.words);
  w.mask_stride = 4 * kept.stride;
  w.values = values.const_data_ptr();
  w.row_offsets = kept.offsets;
  w.width = width;
  w.total = values.numel();
  w.padding = padding_of(width);
  return {kept, w, value};
}

at::Tensor compressed_linear(const at::Tensor& x, const at::Tensor& words, const at::Tensor& values, const at::Tensor& row_offsets,
                             const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& bias, int64_t width) {
  const char* op = "compressed_linear";
  const auto [kept, w, value] = checked(op, words, values, row_offsets, scales, width);
  check_floats(x, op, "x", at::kCPU);
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == width, op, " got x ", shape_of(x), "; expected (..., ", width, ")");
  const int64_t rows = kept.rows, batch = x.numel() / width;
  if (bias) {
    check_floats(*bias, op, "bias", at::kCPU);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == rows, op, " got bias ", shape_of(*bias), "; expected (", rows, ")");
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = rows;
  if (batch == 0 || rows == 0) return at::empty(sizes, x.options());

  const bool dots = value == Value::kBfloat16 && x.scalar_type() == at::kBFloat16 && has_bfloat16_dots();
  const int64_t x_stride = ceil_div(width, kChunkInputs) * kChunkInputs;  // no more than 32 a word that is there
  const at::Tensor wide = x.reshape({batch, width}).to(at::kFloat).contiguous();
  const at::Tensor arranged = at::empty({batch, x_stride}, wide.options());  // aligned to 64 bytes
  auto* x_rows = arranged.mutable_data_ptr<float>();
  for (int64_t b = 0; b < batch; ++b) EBFT_CALL(arrange, wide.const_data_ptr<float>() + b * width, x_rows + b * x_stride, width, value, dots);
  at::Tensor y = at::empty({batch, rows}, wide.options());
  float* to = y.mutable_data_ptr<float>();
  at::parallel_for(0, rows, kRowGrain, [&, &kept = kept, &w = w, &value = value](int64_t begin, int64_t end) {
    std::vector<char> room(static_cast<size_t>((kept.stride * 32 + kMostOverread) * 4));
    for (int64_t slab = begin; slab < end; slab += kSlab) {  // its values stay in the cache for all of x
      const int64_t stop = slab + kSlab < end ? slab + kSlab : end;
      if (EBFT_CALL(compressed_rows, w, value, slab, stop, x_rows, x_stride, dots, batch, to, rows, room.data())) continue;
      for (int64_t row = slab; row < stop; ++row) check_row(op, kept, row);  // says which
      TORCH_CHECK(false, op, " gave up on rows that fit");
    }
  });
  if (bias) y.add_(bias->to(at::kFloat));
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
  const auto [kept, w, value] = checked(op, words, values, row_offsets, scales, width);
  at::Tensor dense = at::empty({kept.rows, width}, values.options().dtype(value == Value::kInt8 ? at::kFloat : values.scalar_type()));
  void* to = dense.mutable_data_ptr();
  at::parallel_for(0, kept.rows, kRowGrain, [&, &kept = kept, &w = w, &value = value](int64_t begin, int64_t end) {
    std::vector<int8_t> codes(static_cast<size_t>(value == Value::kInt8 ? width : 0));
    for (int64_t row = begin; row < end; ++row) {
      check_row(op, kept, row);  // before its values are read
      if (value == Value::kFloat) {
        EBFT_CALL(spread_row, w.mask + row * w.mask_stride, width, w.row_offsets[row + 1] - w.row_offsets[row],
                  static_cast<const float*>(w.values) + w.row_offsets[row], static_cast<float*>(to) + row * width);
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

at::Tensor gather_kept(const at::Tensor& tensor, const at::Tensor& words, const at::Tensor& row_offsets) {
  const char* op = "gather_kept";
  check_tensor(tensor, op, "tensor", at::kFloat, at::kCPU);
  TORCH_CHECK_VALUE(tensor.dim() == 2, op, " got ", shape_of(tensor), "; expected (N, K)");
  const KeptRows kept = kept_rows(op, words, row_offsets, tensor.sizes(), at::kCPU);
  const int64_t total = kept.offsets[kept.rows];
  TORCH_CHECK_VALUE(total >= 0 && total <= tensor.numel(), op, " got row offsets up to ", total, " for ", tensor.numel(), " places");
  check_offsets(op, kept, total);
  at::Tensor values = at::empty({total}, tensor.options());
  const auto* from = tensor.const_data_ptr<float>();
  auto* to = values.mutable_data_ptr<float>();
  at::parallel_for(0, kept.rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      check_row(op, kept, row);  // before its values are written
      EBFT_CALL(gather_row, reinterpret_cast<const uint8_t*>(kept.row(row)), kept.width, kept.offsets[row + 1] - kept.offsets[row],
                from + row * kept.width, to + kept.offsets[row]);
    }
  });
  return values;
}

}  // namespace

TORCH_LIBRARY_IMPL(ebft_kernels, CPU, m) {
  m.impl("compressed_linear.native", compressed_linear);
  m.impl("decompress.native", decompress);
  m.impl("gather_kept.native", gather_kept);
}

}  // namespace ebft
