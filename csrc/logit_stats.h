// Per row z [C] with label y and p = softmax(z): loss, confidence, phi, entropy, modified entropy, margin; is y the
// top? Formulas: cwfast/ops/logit_stats.py. Each logit is read from memory once.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace cwfast {

struct LogitStatsArgs {
  const void* logits;  // [rows, classes] of dtype, any strides (in entries)
  Dtype dtype;
  int64_t rows, classes;  // classes >= 2
  int64_t row_stride, class_stride;
  const int64_t* labels;   // [rows], each in 0 .. classes - 1
  void* values[6];         // [rows] each, written: double for float64, else float; in the order of the first line
  unsigned char* correct;  // [rows], written: 0 or 1
};

void logit_stats(const LogitStatsArgs& args);

}  // namespace cwfast
