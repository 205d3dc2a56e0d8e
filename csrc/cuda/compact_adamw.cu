// Masked AdamW with survivor-only states: parameter and gradient are read where they lie, the states of kept weights
// lie together, row after row.
//
// One warp a stretch of 1024 places of a row: lane l loads word l of the stretch, the warp's prefix sum of popcounts says where in
// the states the kept weights of each word begin, and then the warp takes the words one by one, lane i the place 32 j + i:
//
//     word j (from lane j, by shuffle)   bit i: lane i is kept;  its entry = row offset + before stretch + before word + popc(lower bits)
//
// so that parameter and gradient are read 32 places at a time, and the states of neighbours are neighbours.
//
// Bytes a place: parameter read and written, gradient read, and 16 bytes of states (24 with a master) for the kept share.

#include <climits>
#include <cmath>

#include "cuda/launch.h"
#include "cuda/warp.cuh"

namespace ebft::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kStretch = 1024;

template <typename T>
__global__ void __launch_bounds__(32 * kWarps) adamw_kernel(const CompactAdamW a, int64_t words_in_row, int64_t stretches) {
  const int lane = threadIdx.x % 32;
  const int64_t job = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, row = job / stretches, stretch = job % stretches;
  if (row >= a.rows) return;  // the whole warp leaves
  const uint32_t* words = a.words + row * words_in_row;

  // Kept weights of the row before this stretch.
  const int64_t first_word = stretch * (kStretch / 32);
  int before_stretch = 0;
  for (int64_t i = lane; i < first_word; i += 32) before_stretch += __popc(words[i]);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) before_stretch += __shfl_xor_sync(kFull, before_stretch, step);

  const uint32_t my_word = first_word + lane < words_in_row ? words[first_word + lane] : 0;
  int total;
  const int my_before = exclusive_sum(__popc(my_word), lane, &total);
  const int64_t base = a.row_offsets[row] + before_stretch;
  const AdamWScalars& s = a.scalars;
  const float scale = a.grad_scale ? *a.grad_scale : 1.0f;
  T* param = static_cast<T*>(a.param) + row * a.width;
  T* grad = static_cast<T*>(a.grad) + row * a.width;

#pragma unroll 4
  for (int j = 0; j < 32; ++j) {
    const uint32_t word = __shfl_sync(kFull, my_word, j);
    const int before = __shfl_sync(kFull, my_before, j);
    const int64_t place = stretch * kStretch + 32 * j + lane;
    if (place >= a.width) continue;
    float w = 0;
    if (word >> lane & 1) {
      const int64_t entry = base + before + __popc(word & ((1u << lane) - 1));
      if (entry < 0 || entry >= a.stored) {  // the offsets are not those of this mask
        param[place] = from_float<T>(NAN);
        continue;
      }
      const float g = to_float(grad[place]) * scale;
      float m = a.exp_avg[entry], v = a.exp_avg_sq[entry];
      w = a.master ? a.master[entry] : to_float(param[place]);
      w = __fmul_rn(w, s.decay);
      m = __fadd_rn(__fmul_rn(s.beta1, m), __fmul_rn(s.one_minus_beta1, g));
      v = __fadd_rn(__fmul_rn(s.beta2, v), __fmul_rn(__fmul_rn(s.one_minus_beta2, g), g));
      w = __fsub_rn(w, __fdiv_rn(__fmul_rn(s.step_size, m), __fadd_rn(__fmul_rn(__fsqrt_rn(v), s.correction), s.eps)));
      a.exp_avg[entry] = m;
      a.exp_avg_sq[entry] = v;
      if (a.master) a.master[entry] = w;
    }
    param[place] = from_float<T>(w);
    if (a.zero_grads) grad[place] = from_float<T>(0.0f);
  }
}

template <typename T> cudaError_t launch(const CompactAdamW& a, cudaStream_t stream) {
  if (a.rows < 1 || a.width < 1) return cudaErrorInvalidValue;
  const int64_t stretches = (a.width + kStretch - 1) / kStretch, jobs = a.rows * stretches;
  const int64_t blocks = (jobs + kWarps - 1) / kWarps;
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  adamw_kernel<T><<<static_cast<unsigned>(blocks), 32 * kWarps, 0, stream>>>(a, (a.width + 31) / 32, stretches);
  return cudaGetLastError();
}

}  // namespace

cudaError_t compact_adamw(const CompactAdamW& a, cudaStream_t stream) {
  if (a.kind == Kind::kFloat) return launch<float>(a, stream);
  if (a.kind == Kind::kHalf) return launch<__half>(a, stream);
  return launch<__nv_bfloat16>(a, stream);
}

}  // namespace ebft::cuda
