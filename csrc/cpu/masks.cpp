// The mask ops of ebft_kernels on the CPU: rows are independent, and threads share them.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/tables.h"

#define EBFT_KERNELS "cpu/masks_kernel.h"
#include "cpu/every_isa.h"

namespace ebft {
namespace {

std::vector<int64_t> with_last(const at::Tensor& t, int64_t last) {
  std::vector<int64_t> sizes = t.sizes().vec();
  sizes.back() = last;
  return sizes;
}

void check_rows(const at::Tensor& t, const char* op, const char* name) {
  TORCH_CHECK_VALUE(t.dim() > 0 && t.size(-1) > 0, op, " got ", name, " ", shape_of(t), "; expected (..., K) with K of at least 1");
}

at::Tensor pack_mask(const at::Tensor& mask) {
  const char* op = "pack_mask";
  TORCH_CHECK_VALUE(mask.scalar_type() == at::kBool, op, " got a mask of ", toString(mask.scalar_type()), "; expected Bool");
  check_rows(mask, op, "a mask");
  check_memory(mask, op, "a mask", at::kCPU);
  const at::Tensor dense = mask.contiguous();
  const int64_t width = mask.size(-1), stride = words_in(width), rows = mask.numel() / width;
  at::Tensor words = at::empty(with_last(mask, stride), mask.options().dtype(at::kInt));
  const auto* from = static_cast<const uint8_t*>(dense.const_data_ptr());
  auto* to = static_cast<uint32_t*>(words.mutable_data_ptr());
  at::parallel_for(0, rows, grain_rows(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) EBFT_CALL(pack_row, from + row * width, to + row * stride, width);
  });
  return words;
}

// Words (..., ceil(K / 32)) and K, checked; contiguous.
at::Tensor checked_words(const at::Tensor& words, const char* op, int64_t width) {
  TORCH_CHECK_VALUE(words.scalar_type() == at::kInt, op, " got words of ", toString(words.scalar_type()), "; expected Int");
  TORCH_CHECK_VALUE(words.dim() > 0 && width > 0 && words.size(-1) == words_in(width), op, " got words ", shape_of(words),
                    " for rows of ", width, "; expected ", words_in(width), " a row");
  check_memory(words, op, "words", at::kCPU);
  return words.contiguous();
}

at::Tensor unpack_mask(const at::Tensor& words, int64_t width) {
  const at::Tensor packed = checked_words(words, "unpack_mask", width);
  const int64_t stride = words.size(-1), rows = words.numel() / stride;
  at::Tensor mask = at::empty(with_last(words, width), words.options().dtype(at::kBool));
  const auto* from = static_cast<const uint32_t*>(packed.const_data_ptr());
  auto* to = static_cast<uint8_t*>(mask.mutable_data_ptr());
  at::parallel_for(0, rows, grain_rows(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) EBFT_CALL(unpack_row, from + row * stride, to + row * width, width);
  });
  return mask;
}

void zero_pruned_(const at::Tensor& tensor, const at::Tensor& words) {
  const char* op = "zero_pruned_";
  check_rows(tensor, op, "a tensor");
  const int64_t width = tensor.size(-1), stride = words_in(width), rows = tensor.numel() / width, bytes = tensor.element_size();
  check_tensor(tensor, op, "a tensor", tensor.scalar_type(), at::kCPU);
  TORCH_CHECK_VALUE(tensor.is_floating_point() && (bytes == 2 || bytes == 4), op, " got a tensor of ",
                    toString(tensor.scalar_type()), "; expected float32, bfloat16 or float16");
  TORCH_CHECK_VALUE(!tensor.is_neg(), op, " got a negated view; expected a tensor of its own numbers");
  check_words(words, op, tensor.sizes(), at::kCPU);
  const auto* kept = static_cast<const uint32_t*>(words.const_data_ptr());
  void* values = tensor.mutable_data_ptr();
  at::parallel_for(0, rows, grain_rows(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (bytes == 4) {
        EBFT_CALL(zero_row_of_4, static_cast<uint32_t*>(values) + row * width, kept + row * stride, width);
      } else {
        EBFT_CALL(zero_row_of_2, static_cast<uint16_t*>(values) + row * width, kept + row * stride, width);
      }
    }
  });
}

at::Tensor row_offsets(const at::Tensor& words) {
  TORCH_CHECK_VALUE(words.scalar_type() == at::kInt && words.dim() > 0 && words.size(-1) > 0, "row_offsets got words ",
                    toString(words.scalar_type()), " ", shape_of(words), "; expected Int (..., W) with W of at least 1");
  check_memory(words, "row_offsets", "words", at::kCPU);
  const at::Tensor packed = words.contiguous();
  const int64_t stride = words.size(-1), rows = words.numel() / stride;
  at::Tensor offsets = at::empty({rows + 1}, words.options().dtype(at::kLong));
  const auto* from = static_cast<const uint32_t*>(packed.const_data_ptr());
  auto* to = offsets.mutable_data_ptr<int64_t>();
  at::parallel_for(0, rows, grain_rows(stride), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) to[row + 1] = count_bits(from + row * stride, stride);
  });
  to[0] = 0;
  for (int64_t row = 0; row < rows; ++row) to[row + 1] += to[row];
  return offsets;
}

// For every row of scores: its keys, in a buffer of the thread's own, to `choose(keys, words of the row)`.
template <typename Choose>
at::Tensor choose_rows(const at::Tensor& scores, const char* op, const Choose& choose) {
  const auto dtype = scores.scalar_type();
  check_floats(scores, op, "scores", at::kCPU);
  check_rows(scores, op, "scores");
  const at::Tensor dense = scores.contiguous();
  const int64_t width = scores.size(-1), stride = words_in(width), rows = scores.numel() / width;
  at::Tensor words = at::empty(with_last(scores, stride), scores.options().dtype(at::kInt));
  const void* from = dense.const_data_ptr();
  auto* to = static_cast<uint32_t*>(words.mutable_data_ptr());
  at::parallel_for(0, rows, grain_rows(width), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> keys(static_cast<size_t>(width));
    for (int64_t row = begin; row < end; ++row) {
      if (dtype == at::kFloat) {
        EBFT_CALL(keys_of_float, static_cast<const float*>(from) + row * width, keys.data(), width);
      } else if (dtype == at::kBFloat16) {
        EBFT_CALL(keys_of_bfloat16, static_cast<const uint16_t*>(from) + row * width, keys.data(), width);
      } else {
        EBFT_CALL(keys_of_half, static_cast<const uint16_t*>(from) + row * width, keys.data(), width);
      }
      choose(keys.data(), to + row * stride, width);
    }
  });
  return words;
}

at::Tensor topk_mask(const at::Tensor& scores, int64_t k) {
  TORCH_CHECK_VALUE(scores.dim() > 0 && 0 <= k && k <= scores.size(-1), "topk_mask got k = ", k, " for scores ", shape_of(scores),
                    "; expected 0 to the row's length");
  return choose_rows(scores, "topk_mask", [k](const int32_t* keys, uint32_t* words, int64_t width) {
    EBFT_CALL(topk_row, keys, words, width, k);
  });
}

void check_nm(const char* op, int64_t n, int64_t m, int64_t width) {
  TORCH_CHECK_VALUE(0 < n && n <= m && width % m == 0, op, " got ", n, ":", m, " for rows of ", width,
                    "; expected 0 < N <= M and M dividing the width");
}

at::Tensor nm_mask(const at::Tensor& scores, int64_t n, int64_t m) {
  check_rows(scores, "nm_mask", "scores");
  check_nm("nm_mask", n, m, scores.size(-1));
  return choose_rows(scores, "nm_mask", [n, m](const int32_t* keys, uint32_t* words, int64_t width) {
    EBFT_CALL(nm_row, keys, words, width, n, m);
  });
}

at::Tensor is_nm(const at::Tensor& words, int64_t width, int64_t n, int64_t m) {
  const at::Tensor packed = checked_words(words, "is_nm", width);
  check_nm("is_nm", n, m, width);
  const int64_t stride = words.size(-1), rows = words.numel() / stride;
  const auto* from = static_cast<const uint32_t*>(packed.const_data_ptr());
  std::atomic<bool> valid{true};
  at::parallel_for(0, rows, grain_rows(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end && valid; ++row)
      if (!EBFT_CALL(is_nm_row, from + row * stride, width, n, m)) valid = false;
  });
  return at::scalar_tensor(valid.load(), at::TensorOptions().dtype(at::kBool));
}

}  // namespace

TORCH_LIBRARY_IMPL(ebft_kernels, CPU, m) {
  m.impl("pack_mask.native", pack_mask);
  m.impl("unpack_mask.native", unpack_mask);
  m.impl("zero_pruned_.native", zero_pruned_);
  m.impl("row_offsets.native", row_offsets);
  m.impl("topk_mask.native", topk_mask);
  m.impl("nm_mask.native", nm_mask);
  m.impl("is_nm.native", is_nm);
}

}  // namespace ebft
