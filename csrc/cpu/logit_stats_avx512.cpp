// 16 float32 rows, or 8 float64 rows, at once.
#if defined(__AVX512F__)
#include "cpu/logit_stats_lanes.h"

namespace cwfast {

extern const LogitKernel<float> logit_stats_avx512_float = {Rows<Single>::kLanes, Rows<Single>::run};
extern const LogitKernel<double> logit_stats_avx512_double = {Rows<Double>::kLanes, Rows<Double>::run};

}  // namespace cwfast
#endif
