// What the device code offers: raw pointers, shapes and a stream. No torch header here or in any .cu file, so that all of it
// compiles where torch has no CUDA (binding.cpp connects the two where it has).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "adamw_scalars.h"

namespace ebft::cuda {

// y[b, n] = bias[n] + sum over k of x[b, k] W[n, k] for 1 to 8 rows of x, W as mask words (N, ceil(K / 32)) and kept values.
// `values` is aligned to 16 bytes; all else as its type. Value and X are float, __half or __nv_bfloat16, by `kind`.
enum class Kind { kFloat, kHalf, kBfloat16 };

struct CompressedGemv {
  const uint32_t* words;
  const void* values;
  const int64_t* row_offsets;  // (N + 1)
  const void* x;               // (batch, K)
  const void* bias;            // (N) or null
  void* y;                     // (batch, N)
  int64_t n, k;
  int64_t total;               // values in all: none is read past them, and a row whose offsets and bits disagree gives NaN
  int batch;
  Kind value_kind, x_kind;     // bias and y are of x's kind
};

cudaError_t compressed_gemv(const CompressedGemv& a, cudaStream_t stream);

// Masked AdamW with survivor-only float32 states on one matrix: the arithmetic of reference.masked_adamw_step.
struct CompactAdamW {
  void* param;                 // (rows, width), of `kind`
  void* grad;
  float* exp_avg;              // (kept)
  float* exp_avg_sq;
  float* master;               // (kept), or null where the parameter is float
  const uint32_t* words;       // (rows, ceil(width / 32))
  const int64_t* row_offsets;  // (rows + 1)
  const float* grad_scale;     // on the device, or null
  int64_t rows, width;
  int64_t stored;              // kept entries in all: none is touched past them, and a weight whose entry lies outside becomes NaN
  AdamWScalars scalars;
  bool zero_grads;
  Kind kind;
};

cudaError_t compact_adamw(const CompactAdamW& a, cudaStream_t stream);

}  // namespace ebft::cuda
