// ebft_kernels::masked_adamw_step and ::masked_grad_norm on the CPU.

#include <ATen/Parallel.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "checks.h"
#include "cpu/adamw.h"
#include "cpu/isa.h"
#include "cpu/rows.h"
#include "cpu/tables.h"

#define EBFT_KERNELS "cpu/adamw_kernel.h"
#include "cpu/every_isa.h"

namespace ebft {
namespace {

constexpr int64_t kUnmaskedRow = 1 << 12;  // rows that a parameter without a mask is cut into

Weight weight_kind(const at::Tensor& param, bool master, bool stochastic) {
  if (param.scalar_type() == at::kFloat) return Weight::kFloat;
  if (stochastic) return Weight::kStochastic;
  TORCH_CHECK_VALUE(master, "masked_adamw_step got a parameter of ", toString(param.scalar_type()),
                    "; expected a master weight or stochastic rounding with it");
  return param.scalar_type() == at::kHalf ? Weight::kMasterHalf : Weight::kMasterBfloat16;
}

Moment moment_kind(const at::Tensor& exp_avg) {
  if (exp_avg.scalar_type() == at::kFloat) return Moment::kFloat;
  return exp_avg.scalar_type() == at::kBFloat16 ? Moment::kBfloat16 : Moment::kInt8;
}

// Where stored entry number `entry` stands: the place of a compact state's owner, or the entry itself.
struct Place {
  int64_t row, col;
};

Place place_of(int64_t entry, const AdamWTensors& t, int64_t rows, const int64_t* row_offsets) {
  if (!row_offsets) return {entry / t.width, entry % t.width};
  int64_t low = 0, high = rows;  // the last row that starts at or before it
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    (row_offsets[middle] <= entry ? low : high) = middle;
  }
  int64_t left = entry - row_offsets[low];
  const uint8_t* mask = t.mask + low * t.mask_stride;
  int64_t byte = 0;
  while (byte < t.mask_stride && kLanes.count[mask[byte]] <= left) left -= kLanes.count[mask[byte++]];
  int64_t col = byte * 8;
  for (uint8_t bits = byte < t.mask_stride ? mask[byte] : 0; bits; ++col, bits >>= 1)
    if ((bits & 1) && left-- == 0) break;
  return {low, col};
}

// One parameter, cut among threads by rows or, with 8-bit moments, by whole blocks of stored entries.
void step_one(AdamWTensors t, const AdamWSettings& a, int64_t numel, int64_t stored, const int64_t* row_offsets, Weight weight,
              Moment moment) {
  if (!t.mask) t.width = numel < kUnmaskedRow ? numel : kUnmaskedRow;
  const int64_t rows = (numel + t.width - 1) / t.width;
  const bool compact = row_offsets != nullptr;
  if (moment == Moment::kInt8) {
    const int64_t blocks = (stored + kBlock - 1) / kBlock;
    const int64_t last_row = numel / t.width, last_col = numel % t.width;
    // Without a single stored entry there are places still: they become 0.
    at::parallel_for(0, blocks > 0 ? blocks : 1, kGrain / kBlock, [&](int64_t begin, int64_t end) {
      Place from = begin == 0 ? Place{0, 0} : place_of(begin * kBlock, t, rows, row_offsets);
      Place to = end >= blocks ? Place{last_row, last_col} : place_of(end * kBlock, t, rows, row_offsets);
      int64_t stop = end >= blocks ? stored : end * kBlock;
      EBFT_CALL(adamw, t, a, Span{from.row, from.col, to.row, to.col, begin * kBlock, stop}, weight, moment, compact);
    });
    return;
  }
  at::parallel_for(0, rows, grain_rows(t.width), [&](int64_t begin, int64_t end) {
    const int64_t past = end * t.width < numel ? end * t.width : numel;
    const int64_t from = compact ? row_offsets[begin] : begin * t.width, to = compact ? row_offsets[end] : past;
    EBFT_CALL(adamw, t, a, Span{begin, 0, past / t.width, past % t.width, from, to}, weight, moment, compact);
  });
}

void check_states(const at::Tensor& param, const at::Tensor& state, const at::Tensor& scale, const char* name,
                  at::ScalarType code, int64_t stored) {
  const char* op = "masked_adamw_step";
  const auto dtype = state.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == code, op, " got ", name, " of ", toString(dtype),
                    "; expected float32, bfloat16 or ", toString(code));
  check_tensor(state, op, name, dtype, param.device());
  TORCH_CHECK_VALUE(state.numel() == stored, op, " got ", name, " with ", state.numel(), " entries; expected ", stored);
  check_tensor(scale, op, "scales", at::kFloat, param.device());
  const int64_t scales = dtype == code ? (stored + kBlock - 1) / kBlock : 0;
  TORCH_CHECK_VALUE(scale.dim() == 1 && scale.numel() == scales, op, " got ", scale.numel(), " scales of ", name, "; expected ", scales);
}

void masked_adamw_step(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                       at::TensorList exp_avg_scales, at::TensorList exp_avg_sq_scales, at::TensorList masters,
                       at::TensorList words, at::TensorList row_offsets, const std::optional<at::Tensor>& grad_scale, double lr,
                       double beta1, double beta2, double eps, double weight_decay, int64_t step, bool stochastic, int64_t seed,
                       at::IntArrayRef param_ids, bool zero_grads) {
  const char* op = "masked_adamw_step";
  for (at::TensorList list : {grads, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales, masters, words, row_offsets})
    TORCH_CHECK_VALUE(list.size() == params.size(), op, " got lists of ", params.size(), " and ", list.size(),
                      " tensors; expected equal lengths");
  TORCH_CHECK_VALUE(param_ids.size() == params.size(), op, " got ", param_ids.size(), " ids for ", params.size(), " parameters");
  check_settings(op, beta1, beta2, step);
  AdamWSettings a{};
  static_cast<AdamWScalars&>(a) = adamw_scalars(lr, beta1, beta2, eps, weight_decay, step);
  a.scaled = grad_scale.has_value();
  if (a.scaled) check_scalar(*grad_scale, op, "a gradient scale", at::kCPU);
  a.grad_scale = a.scaled ? grad_scale->item<float>() : 1.0f;
  a.zero_grads = zero_grads;
  a.seed_low = uint32_t(uint64_t(seed));
  a.seed_high = uint32_t(uint64_t(seed) >> 32);
  a.step = uint32_t(step);

  // All are checked before any is touched.
  for (size_t n = 0; n < params.size(); ++n) {
    const at::Tensor& param = params[n];
    const auto dtype = param.scalar_type();
    check_floats(param, op, "a parameter", at::kCPU);
    TORCH_CHECK_VALUE(!stochastic || dtype == at::kBFloat16, op, " got a parameter of ", toString(dtype),
                      "; stochastic rounding takes bfloat16");
    check_tensor(param, op, "a parameter", dtype, at::kCPU);
    check_tensor(grads[n], op, "a gradient", dtype, at::kCPU);
    TORCH_CHECK_VALUE(grads[n].sizes() == param.sizes(), op, " got a gradient ", shape_of(grads[n]), " for a parameter ",
                      shape_of(param), "; expected the same shape");
    check_tensor(words[n], op, "mask words", at::kInt, at::kCPU);
    check_tensor(row_offsets[n], op, "row offsets", at::kLong, at::kCPU);
    if (words[n].numel()) check_words(words[n], op, param.sizes(), at::kCPU);
    int64_t stored = param.numel();
    if (row_offsets[n].numel()) {
      const KeptRows kept = kept_rows(op, words[n], row_offsets[n], param.sizes(), at::kCPU);
      stored = exp_avgs[n].numel();
      check_offsets(op, kept, stored);
      at::parallel_for(0, kept.rows, grain_rows(kept.width), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) check_row(op, kept, row);
      });
    }
    check_states(param, exp_avgs[n], exp_avg_scales[n], "first moments", at::kChar, stored);
    check_states(param, exp_avg_sqs[n], exp_avg_sq_scales[n], "second moments", at::kByte, stored);
    TORCH_CHECK_VALUE(moment_kind(exp_avgs[n]) == moment_kind(exp_avg_sqs[n]), op, " got first moments of ",
                      toString(exp_avgs[n].scalar_type()), " and second moments of ", toString(exp_avg_sqs[n].scalar_type()));
    const bool master = masters[n].numel() > 0;
    weight_kind(param, master || stored == 0, stochastic);
    check_tensor(masters[n], op, "a master weight", at::kFloat, at::kCPU);
    TORCH_CHECK_VALUE(!master || (dtype != at::kFloat && !stochastic && masters[n].numel() == stored), op, " got ",
                      masters[n].numel(), " master weights; expected ", stored, " for a 16-bit parameter, and none otherwise");
  }
  for (size_t n = 0; n < params.size(); ++n) {
    const at::Tensor& param = params[n];
    if (param.numel() == 0) continue;
    const int64_t width = param.dim() ? param.size(-1) : 1;
    AdamWTensors t{};
    t.param = param.mutable_data_ptr();
    t.grad = grads[n].mutable_data_ptr();
    t.exp_avg = exp_avgs[n].mutable_data_ptr();
    t.exp_avg_sq = exp_avg_sqs[n].mutable_data_ptr();
    t.exp_avg_scale = exp_avg_scales[n].mutable_data_ptr<float>();
    t.exp_avg_sq_scale = exp_avg_sq_scales[n].mutable_data_ptr<float>();
    t.master = masters[n].mutable_data_ptr<float>();
    t.mask = words[n].numel() ? static_cast<const uint8_t*>(words[n].const_data_ptr()) : nullptr;
    t.mask_stride = 4 * words_in(width);
    t.width = width;
    a.param_id = uint32_t(param_ids[n]);
    const int64_t* offsets = row_offsets[n].numel() ? row_offsets[n].const_data_ptr<int64_t>() : nullptr;
    step_one(t, a, param.numel(), exp_avgs[n].numel(), offsets, weight_kind(param, true, stochastic), moment_kind(exp_avgs[n]));
  }
}

double square_sum(const at::Tensor& grad, const uint8_t* mask, int64_t stride, int64_t width, int64_t row0, int64_t row1) {
  const void* p = grad.const_data_ptr();
  if (grad.scalar_type() == at::kFloat) return EBFT_CALL(square_sum<Weight::kFloat>, p, mask, stride, width, row0, row1);
  if (grad.scalar_type() == at::kHalf) return EBFT_CALL(square_sum<Weight::kMasterHalf>, p, mask, stride, width, row0, row1);
  return EBFT_CALL(square_sum<Weight::kMasterBfloat16>, p, mask, stride, width, row0, row1);
}

// Partial sums over pieces of fixed size, added in their order: the same whatever the number of threads.
at::Tensor masked_grad_norm(at::TensorList grads, at::TensorList words) {
  const char* op = "masked_grad_norm";
  TORCH_CHECK_VALUE(grads.size() == words.size() && grads.size(), op, " got ", grads.size(), " gradients and ", words.size(),
                    " masks; expected as many of both, and at least one");
  double total = 0;
  for (size_t n = 0; n < grads.size(); ++n) {
    check_floats(grads[n], op, "a gradient", at::kCPU);
    check_tensor(words[n], op, "mask words", at::kInt, at::kCPU);
    if (words[n].numel()) check_words(words[n], op, grads[n].sizes(), at::kCPU);
    if (grads[n].numel() == 0) continue;
    const at::Tensor grad = grads[n].contiguous();
    int64_t width = grad.dim() ? grad.size(-1) : 1;
    const auto* mask = words[n].numel() ? static_cast<const uint8_t*>(words[n].const_data_ptr()) : nullptr;
    int64_t rows = grad.numel() / width, last = 0;
    if (!mask) {  // any cut will do
      width = grad.numel() < kUnmaskedRow ? grad.numel() : kUnmaskedRow;
      rows = grad.numel() / width;
      last = grad.numel() % width;
    }
    const int64_t piece = grain_rows(width), pieces = (rows + piece - 1) / piece;
    std::vector<double> sums(static_cast<size_t>(pieces), 0.0);
    at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t stop = (i + 1) * piece < rows ? (i + 1) * piece : rows;
        sums[size_t(i)] = square_sum(grad, mask, 4 * words_in(width), width, i * piece, stop);
      }
    });
    for (double sum : sums) total += sum;
    if (last) {
      auto tail = grad.flatten().narrow(0, rows * width, last);
      total += square_sum(tail, nullptr, 0, last, 0, 1);
    }
  }
  return at::scalar_tensor(std::sqrt(total), at::TensorOptions().dtype(at::kFloat));
}

}  // namespace

TORCH_LIBRARY_IMPL(ebft_kernels, CPU, m) {
  m.impl("masked_adamw_step.native", masked_adamw_step);
  m.impl("masked_grad_norm.native", masked_grad_norm);
}

}  // namespace ebft
