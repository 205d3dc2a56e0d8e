// A compressed weight (N, K): one bit a place, and the kept values row by row.
#pragma once

#include <cstdint>

namespace ebft {

enum class Value { kFloat, kBfloat16, kHalf, kInt8 };

inline constexpr int64_t kScaleGroup = 128;  // inputs of a row that share the scale of int8 values

inline constexpr int64_t kChunkInputs = 32, kMostOverread = 32;  // inputs that a kernel takes at a time, values that it may load

struct Compressed {
  const uint8_t* mask;         // bytes of the words, rows `mask_stride` bytes apart
  int64_t mask_stride;
  const void* values;          // kept values, row-major
  const int64_t* row_offsets;  // (N + 1)
  const float* scales;         // int8: (N, ceil(K / kScaleGroup)); otherwise null
  int64_t scale_stride;
  int64_t width;
  int64_t total;               // kept values in all: none may be read past it
  uint32_t padding;            // bits of a row's last word that are 0
};

}  // namespace ebft
