// Selection over scores that come in pieces: histograms of keys, and the bits above and inside a bracket of keys.
// Reference: cwfast._streaming, which calls it on threads of its own, one for each piece: these kernels start none.
// Traffic: one read of the piece; the marks write 2 bits an entry.
#include <algorithm>
#include <vector>

#include "cpu/select_keys.h"
#include "select.h"

namespace cwfast {
namespace {

template <class F>
void histogram_typed(const char* data, int64_t numel, uint64_t low, int shift, int64_t* bins, int64_t bin_count) {
  const auto count = static_cast<uint64_t>(bin_count);
  std::vector<uint32_t> mine(count + 1);  // select.h bounds the entries; the last takes what is in no bin
  for (int64_t i = 0; i < numel; ++i) {
    const uint64_t key = key_at<F>(data, i);
    const uint64_t bin = (key - low) >> shift;  // keys below low wrap around to far above
    ++mine[key <= F::kInf ? std::min(bin, count) : count];
  }
  for (uint64_t b = 0; b < count; ++b) bins[b] += mine[b];
}

}  // namespace

void score_histogram(const ScoreTensor& scores, Dtype dtype, uint64_t low, int shift, int64_t* bins,
                     int64_t bin_count) {
  by_dtype(dtype, [&](auto format) {
    histogram_typed<decltype(format)>(static_cast<const char*>(scores.data), scores.numel, low, shift, bins, bin_count);
  });
}

Marks mark_scores(const ScoreTensor& scores, Dtype dtype, uint64_t low, uint64_t high, uint64_t* inside) {
  return by_dtype(dtype, [&](auto format) {
    using F = decltype(format);
    Marks marks{0, 0, 0, 0};
    scan_part<F>(scanner<F>(dtype), static_cast<const char*>(scores.data), scores.numel, low, high, false, scores.bits,
                 inside, marks);
    return marks;
  });
}

}  // namespace cwfast
