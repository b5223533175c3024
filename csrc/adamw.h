// AdamW on the selected entries of a list of tensors, whose moments are compact lists in flat order.
#pragma once
#include <cstdint>
#include <vector>

#include "rewind.h"

namespace cwfast {

struct AdamwTensor {
  float* weight;                       // [numel] contiguous; selected entries are written
  const float* grad;                   // [numel] contiguous
  float *exp_avg, *exp_avg_sq;         // [k] contiguous, written
  double correction, sqrt_correction;  // 1 - beta1^step, sqrt(1 - beta2^step)
};

struct AdamwOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};

// picks: lists (offset is not null), one per tensor, checked.
void selected_adamw(const std::vector<AdamwTensor>& tensors, const std::vector<Picks>& picks,
                    const AdamwOptions& options);

}  // namespace cwfast
