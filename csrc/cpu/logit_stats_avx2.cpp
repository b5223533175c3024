// 8 float32 rows, or 4 float64 rows, at once.
#if defined(__AVX2__)
#include "cpu/logit_stats_lanes.h"

namespace cwfast {

extern const LogitKernel<float> logit_stats_avx2_float = {Rows<Single>::kLanes, Rows<Single>::run};
extern const LogitKernel<double> logit_stats_avx2_double = {Rows<Double>::kLanes, Rows<Double>::run};

}  // namespace cwfast
#endif
