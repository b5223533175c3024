// What is done to one row of a tile of logits. Plain C inside (see select_scan.h).
#pragma once
#include <stdint.h>

namespace cwfast {

constexpr int64_t kRowLanes = 16;    // a row's length is a multiple of it; entries behind the last token are -inf
constexpr int64_t kPeakBlock = 128;  // entries with a peak of their own

struct RowSums {
  double tops, rest, slope, spread;  // as in LmParts
};
struct CrossSums {
  double sum, ref_sum, gap;  // as in LmDivergence
};

// Rows z, r and work are aligned to 64 bytes.
template <class T>
struct LmRowKernel {
  // z = softcap tanh(scale (z + bias) / softcap); bias null: 0; softcap 0: none.
  void (*transform)(T* z, int64_t length, const T* bias, T scale, T softcap);
  // The largest of each block, NaN where one is; returns how many are larger than the pivot.
  int64_t (*survey)(const T* z, int64_t length, T pivot, T* peaks);
  // With u = z - peak, of which none is above 0 and one is 0.
  RowSums (*sums)(const T* z, int64_t length, T peak, T* work);
  CrossSums (*cross)(const T* z, const T* r, int64_t length, T peak, T ref_peak);
  // z = factor (e^(z - high - low) - e^(r - ref_high - ref_low)) (1 - (z / softcap)^2); r null: without the second.
  void (*gradient)(T* z, const T* r, int64_t length, const T* logsumexp, const T* ref_logsumexp, T factor, T softcap);
};

extern const LmRowKernel<float> lm_rows_avx2_float;
extern const LmRowKernel<double> lm_rows_avx2_double;
extern const LmRowKernel<float> lm_rows_avx512_float;
extern const LmRowKernel<double> lm_rows_avx512_double;

}  // namespace cwfast
