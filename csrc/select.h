// Exactly the k largest entries of a list of score tensors, ties to the lowest (tensor, flat index).
#pragma once
#include <cstdint>
#include <vector>

#include "dtype.h"
#include "rewind.h"

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

// What one piece of scores holds.
struct Marks {
  int64_t above, inside;    // entries at or above the bracket, and inside it
  int64_t nans, negatives;  // entries that are no valid score
};

// Adds the entries whose key lies in [low, low + (bin_count << shift)) to bins[(key - low) >> shift]; NaN is left out.
// Requires scores.numel < 2^32. This and the next run on the calling thread: for pieces of millions of entries.
void score_histogram(const ScoreTensor& scores, Dtype dtype, uint64_t low, int shift, int64_t* bins, int64_t bin_count);
// Writes the bits of entries with key >= high to scores.bits, of those in [low, high) to `inside`, of the same length.
Marks mark_scores(const ScoreTensor& scores, Dtype dtype, uint64_t low, uint64_t high, uint64_t* inside);
// Writes the bits of `above`, and of those entries of `inside` whose key is above the threshold or that are among the
// first `ties` that have it. values: the scores of `inside` in order. bits: [(above.numel + 63) / 64]
void settle_marks(const Picks& above, const Picks& inside, const void* values, Dtype dtype, uint64_t threshold,
                  int64_t ties, uint64_t* bits);

}  // namespace cwfast
