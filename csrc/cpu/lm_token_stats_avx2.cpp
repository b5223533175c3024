#if defined(__AVX2__)
#include "cpu/lm_token_stats_lanes.h"

namespace cwfast {

extern const LmRowKernel<float> lm_rows_avx2_float = LmRows<Single>::kKernel;
extern const LmRowKernel<double> lm_rows_avx2_double = LmRows<Double>::kKernel;

}  // namespace cwfast
#endif
