// Element types that kernels read.
#pragma once

namespace cwfast {

enum class Dtype { float32, float64, bfloat16, float16 };

}  // namespace cwfast
