// AVX2 micro-tiles: 6 rows x 2 vectors, twelve accumulators, two panel vectors and one broadcast in sixteen registers.
#if defined(__AVX2__)
#include <immintrin.h>

#include "cpu/saliency_tile.h"

namespace cwfast {
namespace {

constexpr int kRows = 6;

struct F32 {
  using Scalar = float;
  using Vec = __m256;
  static constexpr int kWidth = 8;
  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vec fma(Vec x, Vec y, Vec z) { return _mm256_fmadd_ps(x, y, z); }
  static Vec add(Vec x, Vec y) { return _mm256_add_ps(x, y); }
  static Vec abs(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
};

struct F64 {
  using Scalar = double;
  using Vec = __m256d;
  static constexpr int kWidth = 4;
  static Vec zero() { return _mm256_setzero_pd(); }
  static Vec load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, Vec v) { _mm256_storeu_pd(p, v); }
  static Vec broadcast(const double* p) { return _mm256_broadcast_sd(p); }
  static Vec fma(Vec x, Vec y, Vec z) { return _mm256_fmadd_pd(x, y, z); }
  static Vec add(Vec x, Vec y) { return _mm256_add_pd(x, y); }
  static Vec abs(Vec x) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), x); }
};

template <class V>
void step(const TileStep<typename V::Scalar>& s) {
  using T = typename V::Scalar;
  constexpr int w = V::kWidth;
  typename V::Vec g[kRows][2];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) g[r][0] = g[r][1] = V::zero();
  const T *d = s.d, *a = s.a;
  for (int64_t t = 0; t < s.depth; ++t, d += kRows, a += 2 * w) {
    const typename V::Vec a0 = V::load(a), a1 = V::load(a + w);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const typename V::Vec x = V::broadcast(d + r);
      g[r][0] = V::fma(x, a0, g[r][0]);
      g[r][1] = V::fma(x, a1, g[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const int64_t at = r * s.stride + h * w;
      const typename V::Vec value = s.first ? g[r][h] : V::add(V::load(s.partial + at), g[r][h]);
      if (!s.last) {
        V::store(s.partial + at, value);
        continue;
      }
      const typename V::Vec sum = V::load(s.sum + at);
      V::store(s.sum + at, s.power == 1 ? V::add(sum, V::abs(value)) : V::fma(value, value, sum));
      if (s.total) V::store(s.total + at, V::add(V::load(s.total + at), value));
    }
  }
}

}  // namespace

extern const TileKernel<float> tile_avx2_float = {kRows, 16, step<F32>};
extern const TileKernel<double> tile_avx2_double = {kRows, 8, step<F64>};

}  // namespace cwfast
#endif
