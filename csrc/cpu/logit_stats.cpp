// Per-row statistics of logits. Reference: cwfast/reference.py. Called by cwfast/ops/logit_stats.py.
// Traffic: each logit once from memory while one vector of rows, classes x lanes, stays in the cache of a thread: at
// most 64 bytes a class, so that 1 MB holds 16,384 classes; beyond what it holds, the later passes read memory again.
#include "logit_stats.h"

#include <omp.h>

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/logit_stats_lanes.h"
#include "cpu/numbers.h"
#include "runtime.h"

namespace cwfast {
namespace {

constexpr int64_t kTile = 64;       // classes of each row in turn: what they are written to stays in the first cache
constexpr int64_t kWork = 1 << 15;  // logits of one piece of work
constexpr std::align_val_t kCacheLine{64};

struct Free {
  void operator()(void* p) const { ::operator delete(p, kCacheLine); }
};

template <class T>
LogitKernel<T> kernel() {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, float>) {
    if (isa() == Isa::avx512) return logit_stats_avx512_float;
    if (isa() == Isa::avx2) return logit_stats_avx2_float;
  } else {
    if (isa() == Isa::avx512) return logit_stats_avx512_double;
    if (isa() == Isa::avx2) return logit_stats_avx2_double;
  }
#endif
  using Portable = Rows<std::conditional_t<std::is_same_v<T, float>, Single, Double>>;
  return {Portable::kLanes, Portable::run};
}

// Copies rows into lanes; lanes behind the last row repeat it.
template <class In, class T>
void load(const LogitStatsArgs& x, int64_t first, int64_t count, int64_t lanes, T* work) {
  const In* logits = static_cast<const In*>(x.logits) + first * x.row_stride;
  for (int64_t begin = 0; begin < x.classes; begin += kTile)
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const In* row = logits + std::min(lane, count - 1) * x.row_stride;
      const int64_t end = std::min(begin + kTile, x.classes);
      for (int64_t c = begin; c < end; ++c) work[c * lanes + lane] = number(row[c * x.class_stride]);
    }
}

template <class In>
void run(const LogitStatsArgs& x) {
  using T = std::conditional_t<std::is_same_v<In, double>, double, float>;
  const LogitKernel<T> rows_at_once = kernel<T>();
  const int64_t lanes = rows_at_once.lanes;
  const int64_t step = std::max<int64_t>(1, kWork / (x.classes * lanes)) * lanes;
  Region region;
#pragma omp parallel num_threads(threads())
  {
    std::unique_ptr<T[], Free> work;
    region.run([&] {
      const auto bytes = static_cast<size_t>(x.classes * lanes) * sizeof(T);
      work.reset(static_cast<T*>(::operator new(bytes, kCacheLine)));
    });
#pragma omp for schedule(dynamic)
    for (int64_t begin = 0; begin < x.rows; begin += step)
      region.run([&] {
        for (int64_t first = begin; first < std::min(begin + step, x.rows); first += lanes) {
          const int64_t count = std::min(lanes, x.rows - first);
          int64_t labels[16];
          for (int64_t i = 0; i < lanes; ++i) labels[i] = x.labels[first + std::min(i, count - 1)];
          alignas(64) T found[6 * 16];
          unsigned char correct[16];
          load<In>(x, first, count, lanes, work.get());
          rows_at_once.run({work.get(), labels, x.classes, found, correct});
          for (int64_t v = 0; v < 6; ++v)
            std::copy(found + v * lanes, found + v * lanes + count, static_cast<T*>(x.values[v]) + first);
          std::copy(correct, correct + count, x.correct + first);
        }
      });
  }
  region.finish();
}

}  // namespace

void logit_stats(const LogitStatsArgs& args) {
  switch (args.dtype) {
    case Dtype::float32:
      return run<float>(args);
    case Dtype::float64:
      return run<double>(args);
    case Dtype::bfloat16:
      return run<Bfloat16>(args);
    case Dtype::float16:
      return run<Float16>(args);
  }
}

}  // namespace cwfast
