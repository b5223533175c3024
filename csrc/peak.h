// What the processor's multiply-add units can do at most: the limit that benchmarks hold kernels to.
#pragma once
#include <cstdint>

namespace cwfast {

// Each thread runs `rounds` rounds of independent multiply-adds of float32 vectors that stay in registers, with the
// instruction set in use. Returns the floating-point operations of all threads together: 2 for each multiply-add.
int64_t fma_peak(int64_t rounds);

}  // namespace cwfast
