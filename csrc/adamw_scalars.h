// The scalars of an AdamW step, rounded to float where the arithmetic is float; one place for CPU and CUDA.
#pragma once

#include <cmath>
#include <cstdint>

namespace ebft {

struct AdamWScalars {
  float decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, correction, eps;
};

inline AdamWScalars adamw_scalars(double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step) {
  return {float(1 - lr * weight_decay),
          float(beta1),
          float(1 - beta1),
          float(beta2),
          float(1 - beta2),
          float(lr / (1 - std::pow(beta1, double(step)))),
          float(std::pow(1 - std::pow(beta2, double(step)), -0.5)),
          float(eps)};
}

}  // namespace ebft
