// ebft_kernels on CUDA: what an op is given, checked, to the device code. Built only where torch has CUDA; the one file of this folder
// that includes torch. Contents are not read back: the kernels bound every address by the number of stored entries themselves, and
// where offsets and bits disagree the result is NaN (compressed_gemv.cu, compact_adamw.cu).

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "adamw_scalars.h"
#include "checks.h"
#include "cuda/launch.h"

namespace ebft {
namespace {

cuda::Kind kind_of(const at::Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return cuda::Kind::kFloat;
    case at::kHalf: return cuda::Kind::kHalf;
    case at::kBFloat16: return cuda::Kind::kBfloat16;
    default:
      TORCH_CHECK_VALUE(false, op, " got ", name, " of ", toString(t.scalar_type()), "; expected float32, float16 or bfloat16");
  }
}

void check_launch(cudaError_t error, const char* op) {
  TORCH_CHECK(error == cudaSuccess, op, " could not be launched: ", cudaGetErrorString(error));
}

at::Tensor compressed_linear(const at::Tensor& x, const at::Tensor& words, const at::Tensor& values, const at::Tensor& row_offsets,
                             const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& bias, int64_t width) {
  const char* op = "compressed_linear";
  const c10::Device device = x.device();
  TORCH_CHECK_VALUE(!scales, op, " got 8-bit values on CUDA; expected float32, float16 or bfloat16");
  TORCH_CHECK_VALUE(words.dim() == 2 && width > 0, op, " got words ", shape_of(words), " for rows of ", width,
                    "; expected (N, ceil(K / 32)) with K of at least 1");
  const KeptRows kept = kept_rows(op, words, row_offsets, {words.size(0), width}, device);
  const int64_t rows = kept.rows;
  check_tensor(values, op, "values", values.scalar_type(), device);
  TORCH_CHECK_VALUE(values.dim() == 1, op, " got values ", shape_of(values), "; expected (kept)");
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(values.const_data_ptr()) % 16 == 0, op, " got values that are not aligned to 16 bytes");
  check_floats(x, op, "x", device);
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == width, op, " got x ", shape_of(x), "; expected (..., ", width, ")");

  const c10::cuda::CUDAGuard guard(device);
  const int64_t batch = x.numel() / width;
  const at::Tensor rows_of_x = x.contiguous();
  if (bias) {
    check_floats(*bias, op, "bias", device);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == rows, op, " got bias ", shape_of(*bias), "; expected (", rows, ")");
  }
  const at::Tensor one_bias = bias ? bias->to(x.scalar_type()).contiguous() : at::Tensor();
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = rows;
  at::Tensor y = at::empty(sizes, x.options());
  cuda::CompressedGemv a{};
  a.words = kept.words;
  a.values = values.const_data_ptr();
  a.row_offsets = kept.offsets;
  a.total = values.numel();
  a.bias = bias ? one_bias.const_data_ptr() : nullptr;
  a.n = rows;
  a.k = width;
  a.value_kind = kind_of(values, op, "values");
  a.x_kind = kind_of(x, op, "x");
  for (int64_t done = 0; done < batch && rows > 0; done += 8) {
    a.batch = static_cast<int>(batch - done < 8 ? batch - done : 8);
    a.x = static_cast<const char*>(rows_of_x.const_data_ptr()) + done * width * x.element_size();
    a.y = static_cast<char*>(y.mutable_data_ptr()) + done * rows * x.element_size();
    check_launch(cuda::compressed_gemv(a, c10::cuda::getCurrentCUDAStream()), op);
  }
  return y;
}

// Survivor-only float32 states. Other layouts are not taken: dispatch.py asks before it calls.
void masked_adamw_step(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                       at::TensorList exp_avg_scales, at::TensorList exp_avg_sq_scales, at::TensorList masters,
                       at::TensorList words, at::TensorList row_offsets, const std::optional<at::Tensor>& grad_scale, double lr,
                       double beta1, double beta2, double eps, double weight_decay, int64_t step, bool stochastic, int64_t seed,
                       at::IntArrayRef param_ids, bool zero_grads) {
  const char* op = "masked_adamw_step";
  TORCH_CHECK_VALUE(!stochastic, op, " got stochastic rounding; the CUDA kernel takes float32 weights or masters");
  for (at::TensorList list : {grads, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales, masters, words, row_offsets})
    TORCH_CHECK_VALUE(list.size() == params.size(), op, " got lists of ", params.size(), " and ", list.size(),
                      " tensors; expected equal lengths");
  check_settings(op, beta1, beta2, step);
  for (size_t n = 0; n < params.size(); ++n) {
    const at::Tensor& param = params[n];
    const c10::Device device = param.device();
    check_tensor(param, op, "a parameter", param.scalar_type(), device);
    check_tensor(grads[n], op, "a gradient", param.scalar_type(), device);
    TORCH_CHECK_VALUE(grads[n].sizes() == param.sizes(), op, " got a gradient ", shape_of(grads[n]), " for a parameter ",
                      shape_of(param), "; expected the same shape");
    kept_rows(op, words[n], row_offsets[n], param.sizes(), device);
    kind_of(param, op, "a parameter");
    if (grad_scale) check_scalar(*grad_scale, op, "a gradient scale", device);
    check_tensor(exp_avgs[n], op, "first moments", at::kFloat, device);
    check_tensor(exp_avg_sqs[n], op, "second moments", at::kFloat, device);
    TORCH_CHECK_VALUE(exp_avgs[n].numel() == exp_avg_sqs[n].numel(), op, " got ", exp_avgs[n].numel(), " first and ",
                      exp_avg_sqs[n].numel(), " second moments; expected as many");
    const bool master = param.scalar_type() != at::kFloat;
    if (master) check_tensor(masters[n], op, "a master weight", at::kFloat, device);
    TORCH_CHECK_VALUE(masters[n].numel() == (master ? exp_avgs[n].numel() : 0), op, " got ", masters[n].numel(), " master weights; expected ",
                      master ? exp_avgs[n].numel() : 0);
  }
  const AdamWScalars s = adamw_scalars(lr, beta1, beta2, eps, weight_decay, step);
  for (size_t n = 0; n < params.size(); ++n) {
    const at::Tensor& param = params[n];
    if (param.numel() == 0) continue;
    const c10::cuda::CUDAGuard guard(param.device());
    cuda::CompactAdamW a{};
    a.param = param.mutable_data_ptr();
    a.grad = grads[n].mutable_data_ptr();
    a.exp_avg = exp_avgs[n].mutable_data_ptr<float>();
    a.exp_avg_sq = exp_avg_sqs[n].mutable_data_ptr<float>();
    a.master = masters[n].numel() ? masters[n].mutable_data_ptr<float>() : nullptr;
    a.words = static_cast<const uint32_t*>(words[n].const_data_ptr());
    a.row_offsets = row_offsets[n].const_data_ptr<int64_t>();
    a.stored = exp_avgs[n].numel();
    a.grad_scale = grad_scale ? grad_scale->const_data_ptr<float>() : nullptr;
    a.width = param.dim() ? param.size(-1) : 1;
    a.rows = param.numel() / a.width;
    a.scalars = s;
    a.zero_grads = zero_grads;
    a.kind = kind_of(param, op, "a parameter");
    check_launch(cuda::compact_adamw(a, c10::cuda::getCurrentCUDAStream()), op);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(ebft_kernels, CUDA, m) {
  m.impl("compressed_linear.native", compressed_linear);
  m.impl("masked_adamw_step.native", masked_adamw_step);
}

}  // namespace ebft
