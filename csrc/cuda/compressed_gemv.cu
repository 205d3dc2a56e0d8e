// y = x W^T for a compressed weight and 1 to 8 rows of x.
//
// One warp a row of W, four warps a block. The warp takes 1024 inputs at a time:
//
//     lane        0        1        2    ...   31
//     word       w0       w1       w2         w31        one 128-byte load
//     before      0   popc(w0)  + popc(w1)     ...       prefix sum over the warp: where each lane's values begin
//     values   [ the kept values of all 1024 inputs, together in memory ]   16-byte loads into shared memory
//
// and then every lane walks over the set bits of its own word, multiplies and adds in float32. x lies in shared memory with a gap
// after every 32 inputs, so that the lanes, 32 inputs apart, read from different banks.
//
// No address depends on what the tensors hold: offsets outside of the values are taken for 0, and no load passes the last value.
//
// Bytes: K / 8 of mask and density K of values a row, read once; 2 K density FLOPs a row of x. Memory-bound.

#include <climits>
#include <cmath>

#include "cuda/launch.h"
#include "cuda/warp.cuh"

namespace ebft::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kChunk = 1024;          // inputs a warp takes at a time
constexpr int kPadded = kChunk + 32;  // with a gap after every 32

template <typename Value, typename X, int Batch>
__global__ void __launch_bounds__(32 * kWarps)
    gemv_kernel(const uint32_t* __restrict__ words, const Value* __restrict__ values, const int64_t* __restrict__ row_offsets,
                const X* __restrict__ x, const X* __restrict__ bias, X* __restrict__ y, int64_t n, int64_t k, int64_t words_in_row,
                int64_t total) {
  constexpr int kPerLoad = 16 / sizeof(Value);
  __shared__ float x_tile[Batch][kPadded];
  __shared__ alignas(16) Value tile[kWarps][kChunk + 2 * kPerLoad];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  const bool alive = row < n;
  int64_t at = alive ? row_offsets[row] : 0;  // the next value of this row
  int64_t end = alive ? row_offsets[row + 1] : 0;
  bool fits = at >= 0 && at <= end && end <= total;  // as far as seen: a row that does not fit becomes NaN
  if (!fits) at = end = 0;
  float sum[Batch];
#pragma unroll
  for (int b = 0; b < Batch; ++b) sum[b] = 0;

  for (int64_t first = 0; first < k; first += kChunk) {
    __syncthreads();  // the tile of x is done with
    for (int i = threadIdx.x; i < kChunk; i += 32 * kWarps) {
      const int64_t input = first + i;
#pragma unroll
      for (int b = 0; b < Batch; ++b) x_tile[b][i + i / 32] = input < k ? to_float(x[b * k + input]) : 0.0f;
    }
    const int64_t word_number = first / 32 + lane;
    uint32_t word = alive && word_number < words_in_row ? words[row * words_in_row + word_number] : 0;
    if (word_number == words_in_row - 1 && k % 32 && word >> (k % 32)) word = 0, fits = false;  // bits past the end
    int count;
    const int before = exclusive_sum(__popc(word), lane, &count);

    // The values from the last 16-byte boundary on. What lies past the end of all values is not touched.
    const int64_t aligned = at / kPerLoad * kPerLoad;
    const int skipped = int(at - aligned);
    for (int i = lane * kPerLoad; i < skipped + count; i += 32 * kPerLoad) {
      if (aligned + i + kPerLoad <= total) {
        *reinterpret_cast<uint4*>(&tile[warp][i]) = *reinterpret_cast<const uint4*>(values + aligned + i);
      } else {
        for (int j = 0; j < kPerLoad && aligned + i + j < end; ++j) tile[warp][i + j] = values[aligned + i + j];
      }
    }
    at += count;
    __syncthreads();

    const Value* mine = &tile[warp][skipped + before];
    const int column = lane * 33;
    while (word) {
      const int bit = __ffs(word) - 1;
      word &= word - 1;
      const float value = to_float(*mine++);
#pragma unroll
      for (int b = 0; b < Batch; ++b) sum[b] = fmaf(value, x_tile[b][column + bit], sum[b]);
    }
    __syncwarp();
  }

  fits = __all_sync(kFull, fits && at == end);
#pragma unroll
  for (int b = 0; b < Batch; ++b) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum[b] += __shfl_down_sync(kFull, sum[b], step);
    if (lane == 0 && alive) y[b * n + row] = from_float<X>(fits ? sum[b] + (bias ? to_float(bias[row]) : 0.0f) : NAN);
  }
}

template <typename Value, typename X, int Batch> void launch(const CompressedGemv& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((a.n + kWarps - 1) / kWarps);
  gemv_kernel<Value, X, Batch><<<blocks, 32 * kWarps, 0, stream>>>(
      a.words, static_cast<const Value*>(a.values), a.row_offsets, static_cast<const X*>(a.x), static_cast<const X*>(a.bias),
      static_cast<X*>(a.y), a.n, a.k, (a.k + 31) / 32, a.total);
}

template <typename Value, typename X> cudaError_t launch_batch(CompressedGemv a, cudaStream_t stream) {
  if (a.batch < 1 || a.batch > 8 || a.n < 1 || a.n > int64_t(INT_MAX) * kWarps || a.k < 1) return cudaErrorInvalidValue;
  constexpr int kMost = sizeof(Value) == 4 ? 4 : 8;  // rows of x that fit 48 KiB of shared memory beside the values
  while (a.batch > 0) {                              // powers of two, so that few kernels are compiled
    const int step = a.batch >= kMost ? kMost : a.batch >= 4 ? 4 : a.batch >= 2 ? 2 : 1;
    if (step == kMost) launch<Value, X, kMost>(a, stream);
    else if (step == 4) launch<Value, X, 4>(a, stream);
    else if (step == 2) launch<Value, X, 2>(a, stream);
    else launch<Value, X, 1>(a, stream);
    a.batch -= step;
    a.x = static_cast<const X*>(a.x) + step * a.k;
    a.y = static_cast<X*>(a.y) + step * a.n;
  }
  return cudaGetLastError();
}

template <typename Value> cudaError_t launch_x(const CompressedGemv& a, cudaStream_t stream) {
  if (a.x_kind == Kind::kFloat) return launch_batch<Value, float>(a, stream);
  if (a.x_kind == Kind::kHalf) return launch_batch<Value, __half>(a, stream);
  return launch_batch<Value, __nv_bfloat16>(a, stream);
}

}  // namespace

cudaError_t compressed_gemv(const CompressedGemv& a, cudaStream_t stream) {
  if (a.value_kind == Kind::kFloat) return launch_x<float>(a, stream);
  if (a.value_kind == Kind::kHalf) return launch_x<__half>(a, stream);
  return launch_x<__nv_bfloat16>(a, stream);
}

}  // namespace ebft::cuda
