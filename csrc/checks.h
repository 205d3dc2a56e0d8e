// What every entry checks before it touches memory; errors are one sentence that names what was given.
#pragma once

#include <torch/library.h>

#include <string>

namespace ebft {

inline std::string shape_of(const at::Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + ")";
}

inline void check_tensor(const at::Tensor& t, const char* op, const char* name, at::ScalarType dtype, c10::Device device) {
  TORCH_CHECK_VALUE(t.scalar_type() == dtype, op, " got ", name, " of ", toString(t.scalar_type()), "; expected ",
                    toString(dtype));
  TORCH_CHECK_VALUE(t.device() == device, op, " got ", name, " on ", t.device(), "; expected ", device);
  TORCH_CHECK_VALUE(t.is_contiguous(), op, " got ", name, " ", shape_of(t), " that is not contiguous");
}

inline int64_t words_in(int64_t width) { return (width + 31) / 32; }

// The words of a weight with rows of `width` and `numel` places in all.
inline void check_words(const at::Tensor& words, const char* op, int64_t numel, int64_t width, c10::Device device) {
  check_tensor(words, op, "mask words", at::kInt, device);
  int64_t rows = width ? numel / width : 0;
  TORCH_CHECK_VALUE(words.numel() == rows * words_in(width), op, " got ", words.numel(), " mask words for ", rows, " rows of ",
                    width, "; expected ", rows * words_in(width));
}

constexpr int64_t kGrain = 1 << 15;  // places that are worth a thread

inline int64_t grain_rows(int64_t width) { return (kGrain + width - 1) / width; }

}  // namespace ebft
