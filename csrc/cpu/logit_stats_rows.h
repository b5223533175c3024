// The statistics of as many rows as a vector has lanes. Plain C inside (see select_scan.h).
#pragma once
#include <stdint.h>

namespace cwfast {

template <class T>
struct LogitRows {
  T* work;                 // [classes, lanes], aligned to 64 bytes: the logits, a row in each lane; overwritten
  const int64_t* labels;   // [lanes]
  int64_t classes;         //
  T* values;               // [6, lanes], written
  unsigned char* correct;  // [lanes], written
};

template <class T>
struct LogitKernel {
  int64_t lanes;
  void (*run)(const LogitRows<T>& rows);
};

extern const LogitKernel<float> logit_stats_avx2_float;
extern const LogitKernel<double> logit_stats_avx2_double;
extern const LogitKernel<float> logit_stats_avx512_float;
extern const LogitKernel<double> logit_stats_avx512_double;

}  // namespace cwfast
