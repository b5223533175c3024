#if defined(__AVX512F__)
#include "cpu/lm_token_stats_lanes.h"

namespace cwfast {

extern const LmRowKernel<float> lm_rows_avx512_float = LmRows<Single>::kKernel;
extern const LmRowKernel<double> lm_rows_avx512_double = LmRows<Double>::kKernel;

}  // namespace cwfast
#endif
