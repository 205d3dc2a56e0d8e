// What a masked AdamW kernel works on: one parameter and its states, as plain pointers.
#pragma once

#include <cstdint>

#include "adamw_scalars.h"

namespace ebft {

enum class Weight { kFloat, kMasterBfloat16, kMasterHalf, kStochastic };
enum class Moment { kFloat, kBfloat16, kInt8 };

inline constexpr int64_t kBlock = 256;  // stored moments that share a scale
inline constexpr int kChunk = 512;      // places of a row that a kernel takes at a time

// The mask of a chunk where there is none.
struct AllKept {
  uint8_t bytes[kChunk / 8];
  constexpr AllKept() : bytes() {
    for (uint8_t& byte : bytes) byte = 0xFF;
  }
};
inline constexpr AllKept kAllKept{};

struct AdamWSettings : AdamWScalars {
  float grad_scale;  // if `scaled`
  bool scaled, zero_grads;
  uint32_t seed_low, seed_high, step, param_id;
};

struct AdamWTensors {
  void* param;
  void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  float* exp_avg_scale;
  float* exp_avg_sq_scale;
  float* master;
  const uint8_t* mask;   // bytes of the mask words, or null: everything is kept
  int64_t mask_stride;   // bytes from row to row
  int64_t width;
};

// The places [(row0, col0), (row1, col1)) in row-major order, and the stored entries [stored0, stored1) among them.
// With 8-bit moments stored0 is a multiple of kBlock.
struct Span {
  int64_t row0, col0, row1, col1, stored0, stored1;
};

}  // namespace ebft
