// Selection over scores that come in pieces: histograms of keys, and the bits above and inside a bracket of keys.
// Reference: cwfast._streaming, which calls it. Traffic: one read of the piece; the marks write 2 bits an entry.
#include <omp.h>

#include <algorithm>

#include "cpu/select_keys.h"
#include "runtime.h"
#include "select.h"

namespace cwfast {
namespace {

constexpr int64_t kPart = 1 << 16;  // entries of one piece of work: a multiple of 64, some tens of microseconds

template <class F>
void histogram_typed(const char* data, int64_t numel, uint64_t low, int shift, int64_t* bins, int64_t bin_count) {
  const uint64_t inf = F::kInf;
  Region region;
#pragma omp parallel num_threads(threads())
  {
    std::vector<uint32_t> mine;  // select.h bounds the entries; half the cache of 64-bit counters
    region.run([&] { mine.assign(static_cast<size_t>(bin_count), 0); });
#pragma omp for schedule(dynamic, 4)
    for (int64_t part = 0; part < (numel + kPart - 1) / kPart; ++part)
      region.run([&, part] {
        const int64_t end = std::min((part + 1) * kPart, numel);
        for (int64_t i = part * kPart; i < end; ++i) {
          const uint64_t key = key_at<F>(data, i);
          const uint64_t bin = (key - low) >> shift;  // keys below low wrap around to far above
          if (key <= inf && bin < static_cast<uint64_t>(bin_count)) ++mine[bin];
        }
      });
#pragma omp critical
    for (size_t b = 0; b < mine.size(); ++b) bins[b] += mine[b];
  }
  region.finish();
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
    const auto* data = static_cast<const char*>(scores.data);
    const Scan scan = scanner<F>(dtype);
    int64_t above = 0, within = 0, nans = 0, negatives = 0;
    Region region;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads()) reduction(+ : above, within, nans, negatives)
    for (int64_t part = 0; part < (scores.numel + kPart - 1) / kPart; ++part)
      region.run([&, part] {
        const int64_t at = part * kPart, numel = std::min(kPart, scores.numel - at);
        Marks marks{0, 0, 0, 0};
        scan_part<F>(scan, data + at * static_cast<int64_t>(sizeof(typename F::Raw)), numel, low, high, false,
                     scores.bits + at / 64, inside + at / 64, marks);
        above += marks.above, within += marks.inside, nans += marks.nans, negatives += marks.negatives;
      });
    region.finish();
    return Marks{above, within, nans, negatives};
  });
}

}  // namespace cwfast
