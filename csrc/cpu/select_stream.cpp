// Selection over scores that come in pieces: histograms of keys, and the bits above and inside a bracket of keys.
// Reference: cwfast._streaming, which calls it on threads of its own, one for each piece: these kernels start none.
// Traffic: one read of the piece; the marks write 2 bits an entry.
#include <algorithm>
#include <vector>

#include "cpu/picks.h"
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

template <class F>
void settle_typed(const Picks& above, const Picks& inside, const char* values, uint64_t threshold, int64_t ties,
                  uint64_t* bits) {
  std::fill(bits, bits + (above.numel + 63) / 64, 0);
  int64_t value = 0;
  for (int64_t block = 0; block * kBlock < above.numel; ++block) {
    each_of_block(above, block, [&](int64_t i) { bits[i / 64] |= uint64_t{1} << (i % 64); });
    each_of_block(inside, block, [&](int64_t i) {
      const uint64_t key = key_at<F>(values, value++);
      const bool tie = (key == threshold) & (ties > 0), taken = (key > threshold) | tie;
      ties -= tie;
      bits[i / 64] |= uint64_t{taken} << (i % 64);
    });
  }
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

void settle_marks(const Picks& above, const Picks& inside, const void* values, Dtype dtype, uint64_t threshold,
                  int64_t ties, uint64_t* bits) {
  by_dtype(dtype, [&](auto format) {
    settle_typed<decltype(format)>(above, inside, static_cast<const char*>(values), threshold, ties, bits);
  });
}

}  // namespace cwfast
