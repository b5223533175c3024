// fma_peak: multiply-adds and nothing else, enough of them at once to hide their latency. Called by benchmarks only.
#include "peak.h"

#include <omp.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>

#include "runtime.h"

namespace cwfast {
namespace {

constexpr int kChains = 12;             // two units x four to six cycles of latency, and within 16 registers
constexpr int64_t kPerChunk = 1 << 16;  // rounds between looks at Ctrl-C: under a millisecond

// x = x * m + m, which tends to m / (1 - m): neither zero, denormal nor infinite.
constexpr float kFactor = 0.5f;

// Every instruction set's loop returns a sum, so that the compiler cannot drop the work; and its chains start from
// values of their own, or they would be one chain to the compiler.
float portable(int64_t rounds) {
  typedef float Vec __attribute__((vector_size(16)));  // as the kernels' portable path
  Vec x[kChains];
  const Vec m = {kFactor, kFactor, kFactor, kFactor};
  for (int c = 0; c < kChains; ++c) x[c] = m + static_cast<float>(c);
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) x[c] = x[c] * m + m;
  float sum = 0;
  for (const Vec& v : x) sum += v[0];
  return sum;
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) float avx2(int64_t rounds) {
  __m256 x[kChains];
  const __m256 m = _mm256_set1_ps(kFactor);
  for (int c = 0; c < kChains; ++c) x[c] = _mm256_set1_ps(kFactor + static_cast<float>(c));
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) x[c] = _mm256_fmadd_ps(x[c], m, m);
  float sum = 0;
  for (const __m256& v : x) sum += _mm256_cvtss_f32(v);
  return sum;
}

__attribute__((target("avx512f"))) float avx512(int64_t rounds) {
  __m512 x[kChains];
  const __m512 m = _mm512_set1_ps(kFactor);
  for (int c = 0; c < kChains; ++c) x[c] = _mm512_set1_ps(kFactor + static_cast<float>(c));
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) x[c] = _mm512_fmadd_ps(x[c], m, m);
  float sum = 0;
  for (const __m512& v : x) sum += _mm512_cvtss_f32(v);
  return sum;
}
#endif

volatile float sink;  // written once a call

}  // namespace

int64_t fma_peak(int64_t rounds) {
  auto* loop = portable;
  int64_t width = 4;
#if defined(__x86_64__)
  if (isa() != Isa::scalar) {
    loop = isa() == Isa::avx512 ? avx512 : avx2;
    width = isa() == Isa::avx512 ? 16 : 8;
  }
#endif
  const int count = threads();
  Region region;
  float sum = 0;
#pragma omp parallel for schedule(static, 1) num_threads(count) reduction(+ : sum)
  for (int i = 0; i < count; ++i)
    for (int64_t done = 0; done < rounds; done += kPerChunk)
      region.run([&] { sum += loop(std::min(kPerChunk, rounds - done)); });
  region.finish();
  sink = sum;
  return 2 * width * kChains * rounds * count;
}

}  // namespace cwfast
