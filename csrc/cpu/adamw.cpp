// m += (1 - b1) (g - m); v = b2 v + (1 - b2) g^2; w = (1 - lr wd) w - lr / c1 * m / (sqrt(v) / sqrt(c2) + eps)
// on selected entries. Reference: torch.optim.AdamW. Called by cwfast/ops/adamw.py. Traffic per selected entry: one
// cache line each of weight (read and written) and gradient, 16 bytes of moments, 2 of the list.
#include "adamw.h"

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "cpu/picks.h"
#include "runtime.h"

namespace cwfast {
namespace {

constexpr int kChunk = 128;  // entries gathered, updated and scattered together: their lines stay in the first cache
constexpr int kAhead = 64;   // list entries between prefetch and use

struct Factors {  // of one tensor, in the precision of the update
  float decay, beta1_rest, beta2, beta2_rest, step, inverse_sqrt, eps, sign;
};

Factors factors_of(const AdamwTensor& t, const AdamwOptions& o) {
  return {static_cast<float>(1 - o.lr * o.weight_decay),
          static_cast<float>(1 - o.beta1),
          static_cast<float>(o.beta2),
          static_cast<float>(1 - o.beta2),
          static_cast<float>(o.lr / t.correction),
          static_cast<float>(1 / t.sqrt_correction),
          static_cast<float>(o.eps),
          o.maximize ? -1.0f : 1.0f};
}

// errno is never read here, and setting it would keep sqrt from being vectorized.
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("no-math-errno")))
#endif
void update(float* __restrict weight, const float* __restrict grad, float* __restrict exp_avg,
            float* __restrict exp_avg_sq, int n, Factors f) {
  for (int i = 0; i < n; ++i) {
    const float g = f.sign * grad[i];
    const float m = exp_avg[i] + f.beta1_rest * (g - exp_avg[i]);
    const float v = f.beta2 * exp_avg_sq[i] + f.beta2_rest * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    weight[i] = f.decay * weight[i] - f.step * m / (std::sqrt(v) * f.inverse_sqrt + f.eps);
  }
}

void update_run(const AdamwTensor& t, const Picks& p, const Run& run, const Factors& f) {
  float weight[kChunk], grad[kChunk];
  int64_t flat[kChunk];
  const int64_t end = p.offset[run.last];
  Cursor cursor{p, run.first}, ahead{p, run.first};
  const auto announce = [&] {
    if (ahead.at == end) return;
    const int64_t index = ahead.next();
    prefetch(t.weight + index);
    prefetch(t.grad + index);
  };
  for (int i = 0; i < kAhead; ++i) announce();
  while (cursor.at < end) {
    const int64_t begin = cursor.at;
    const int n = static_cast<int>(std::min<int64_t>(kChunk, end - begin));
    for (int i = 0; i < n; ++i) {
      announce();
      flat[i] = cursor.next();
      weight[i] = t.weight[flat[i]];
      grad[i] = t.grad[flat[i]];
    }
    update(weight, grad, t.exp_avg + begin, t.exp_avg_sq + begin, n, f);
    for (int i = 0; i < n; ++i) t.weight[flat[i]] = weight[i];
  }
}

}  // namespace

void selected_adamw(const std::vector<AdamwTensor>& tensors, const std::vector<Picks>& picks,
                    const AdamwOptions& options) {
  const std::vector<Run> runs = runs_of(picks);
  std::vector<Factors> factors;
  for (const AdamwTensor& tensor : tensors) factors.push_back(factors_of(tensor, options));
  Region region;
#pragma omp parallel for schedule(dynamic) num_threads(threads())
  for (int64_t i = 0; i < static_cast<int64_t>(runs.size()); ++i) {
    const Run& run = runs[static_cast<size_t>(i)];
    region.run([&] { update_run(tensors[run.tensor], picks[run.tensor], run, factors[run.tensor]); });
  }
  region.finish();
}

}  // namespace cwfast
