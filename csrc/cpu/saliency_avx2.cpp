// AVX2 micro-tiles: 6 rows x 2 vectors, twelve accumulators, two panel vectors and one broadcast in sixteen registers.
#if defined(__AVX2__)
#include <immintrin.h>

#include "cpu/saliency_step.h"

namespace cwfast {
namespace {

struct F32 {
  using Scalar = float;
  using Vec = __m256;
  static constexpr int kWidth = 8;
  static __m256i first(int n) {  // the sign bits choose
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec set(float x) { return _mm256_set1_ps(x); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec load_n(const float* p, int n) { return n == kWidth ? load(p) : _mm256_maskload_ps(p, first(n)); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static void store_n(float* p, Vec v, int n) { n == kWidth ? store(p, v) : _mm256_maskstore_ps(p, first(n), v); }
  static Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vec fma(Vec x, Vec y, Vec z) { return _mm256_fmadd_ps(x, y, z); }
  static Vec add(Vec x, Vec y) { return _mm256_add_ps(x, y); }
  static Vec mul(Vec x, Vec y) { return _mm256_mul_ps(x, y); }
  static Vec abs(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
};

struct F64 {
  using Scalar = double;
  using Vec = __m256d;
  static constexpr int kWidth = 4;
  static __m256i first(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
  static Vec zero() { return _mm256_setzero_pd(); }
  static Vec set(double x) { return _mm256_set1_pd(x); }
  static Vec load(const double* p) { return _mm256_loadu_pd(p); }
  static Vec load_n(const double* p, int n) { return n == kWidth ? load(p) : _mm256_maskload_pd(p, first(n)); }
  static void store(double* p, Vec v) { _mm256_storeu_pd(p, v); }
  static void store_n(double* p, Vec v, int n) { n == kWidth ? store(p, v) : _mm256_maskstore_pd(p, first(n), v); }
  static Vec broadcast(const double* p) { return _mm256_broadcast_sd(p); }
  static Vec fma(Vec x, Vec y, Vec z) { return _mm256_fmadd_pd(x, y, z); }
  static Vec add(Vec x, Vec y) { return _mm256_add_pd(x, y); }
  static Vec mul(Vec x, Vec y) { return _mm256_mul_pd(x, y); }
  static Vec abs(Vec x) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), x); }
};

}  // namespace

extern const TileKernel<float> tile_avx2_float = tile_kernel_of<F32, 6, 2>();
extern const TileKernel<double> tile_avx2_double = tile_kernel_of<F64, 6, 2>();

}  // namespace cwfast
#endif
