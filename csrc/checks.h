// What every entry checks before it touches memory; errors are one sentence that names what was given.
#pragma once

#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include <string>

namespace ebft {

inline std::string shape_of(at::IntArrayRef sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}
inline std::string shape_of(const at::Tensor& t) { return shape_of(t.sizes()); }

inline int64_t ceil_div(int64_t n, int64_t by) { return n / by + (n % by != 0); }  // of n >= 0; nothing overflows

// Every element that sizes and strides promise lies in memory: a storage may have been freed or shrunk under its tensor.
inline void check_memory(const at::Tensor& t, const char* op, const char* name, c10::Device device) {
  TORCH_CHECK_VALUE(t.device() == device, op, " got ", name, " on ", t.device(), "; expected ", device);
  const size_t needed = at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.dtype().itemsize(), size_t(t.storage_offset()));
  TORCH_CHECK_VALUE(t.numel() == 0 || t.storage().nbytes() >= needed, op, " got ", name, " ", shape_of(t), " that takes ", needed,
                    " bytes, in a storage of ", t.storage().nbytes());
}

inline void check_tensor(const at::Tensor& t, const char* op, const char* name, at::ScalarType dtype, c10::Device device) {
  TORCH_CHECK_VALUE(t.scalar_type() == dtype, op, " got ", name, " of ", toString(t.scalar_type()), "; expected ",
                    toString(dtype));
  TORCH_CHECK_VALUE(t.is_contiguous(), op, " got ", name, " ", shape_of(t), " that is not contiguous");
  check_memory(t, op, name, device);
}

// float32, bfloat16 or float16, of any strides.
inline void check_floats(const at::Tensor& t, const char* op, const char* name, c10::Device device) {
  const auto dtype = t.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, op, " got ", name, " of ", toString(dtype),
                    "; expected float32, bfloat16 or float16");
  check_memory(t, op, name, device);
}

inline void check_scalar(const at::Tensor& t, const char* op, const char* name, c10::Device device) {
  TORCH_CHECK_VALUE(t.dim() <= 1 && t.numel() == 1 && t.is_floating_point(), op, " got ", name, " ", toString(t.scalar_type()), " ", shape_of(t),
                    "; expected a float scalar");
  check_memory(t, op, name, device);
}

inline int64_t words_in(int64_t width) { return ceil_div(width, 32); }

// The bits of a row's last word that stand for no place.
inline uint32_t padding_of(int64_t width) { return width % 32 ? ~0u << (width % 32) : 0; }

// Mask words (..., ceil(K / 32)) of a weight (..., K).
inline void check_words(const at::Tensor& words, const char* op, at::IntArrayRef sizes, c10::Device device) {
  check_tensor(words, op, "mask words", at::kInt, device);
  const int64_t width = sizes.empty() ? 0 : sizes.back();
  TORCH_CHECK_VALUE(width > 0 && words.dim() == int64_t(sizes.size()) && words.size(-1) == words_in(width) &&
                        words.sizes().slice(0, sizes.size() - 1) == sizes.slice(0, sizes.size() - 1),
                    op, " got mask words ", shape_of(words), " for ", shape_of(sizes), "; expected ", words_in(width), " words a row");
}

// --- rows of kept entries -------------------------------------------------------------------------------------------------
// What reference.check_kept_rows defines, shared by every op that finds stored entries by a mask and row offsets: this much without
// reading a tensor's contents, and the rest in cpu/rows.h. On CUDA contents are not read back: kernels bound every address themselves.

struct KeptRows {
  const uint32_t* words;   // rows `stride` words apart
  const int64_t* offsets;  // (rows + 1)
  int64_t rows, width, stride;

  const uint32_t* row(int64_t n) const { return words + n * stride; }
};

inline KeptRows kept_rows(const char* op, const at::Tensor& words, const at::Tensor& row_offsets, at::IntArrayRef sizes,
                          c10::Device device) {
  check_words(words, op, sizes, device);
  check_tensor(row_offsets, op, "row offsets", at::kLong, device);
  const int64_t width = sizes.back(), rows = words.numel() / words.size(-1);
  TORCH_CHECK_VALUE(row_offsets.dim() == 1 && row_offsets.size(0) == rows + 1, op, " got ", row_offsets.numel(), " row offsets for ", rows,
                    " rows; expected ", rows + 1);
  return {static_cast<const uint32_t*>(words.const_data_ptr()), row_offsets.const_data_ptr<int64_t>(), rows, width, words.size(-1)};
}

// What makes the scalars of an AdamW step finite.
inline void check_settings(const char* op, double beta1, double beta2, int64_t step) {
  TORCH_CHECK_VALUE(step >= 1 && 0 <= beta1 && beta1 < 1 && 0 <= beta2 && beta2 < 1, op, " got step ", step, " and betas ", beta1, " and ",
                    beta2, "; expected step >= 1 and betas from 0 to below 1");
}

constexpr int64_t kGrain = 1 << 15;  // places that are worth a thread

inline int64_t grain_rows(int64_t width) { return width < kGrain ? ceil_div(kGrain, width) : 1; }

}  // namespace ebft
