// Exactly the k largest entries of a list of score tensors, ties to the lowest (tensor, flat index).
#pragma once
#include <cstdint>
#include <vector>

#include "dtype.h"

namespace cwfast {

struct ScoreTensor {
  const void* data;  // [numel] contiguous, of one dtype for the whole list
  int64_t numel;
  uint64_t* bits;  // [(numel + 63) / 64], written: entry i is bit i % 64 of word i / 64, zero-padded
};

struct Selected {
  std::vector<int64_t> counts;           // [tensors] selected entries
  std::vector<int64_t> nans, negatives;  // [tensors] entries that are no valid score
  double threshold = 0;                  // the k-th largest score; +inf for k = 0
  bool valid = false;                    // false: nans or negatives forbid the result, or fewer than k can be selected
};

// abs_transform: rank |score|. skip_nan: NaN is allowed and never selected. Requires 0 <= k <= sum of numel.
Selected select_topk(const std::vector<ScoreTensor>& scores, Dtype dtype, int64_t k, bool abs_transform, bool skip_nan);

}  // namespace cwfast
