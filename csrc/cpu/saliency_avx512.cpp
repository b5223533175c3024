// AVX-512 micro-tiles: 14 rows x 2 vectors; with two panel vectors and one broadcast, 31 of the 32 registers.
#if defined(__AVX512F__)
#include <immintrin.h>

#include "cpu/saliency_step.h"

namespace cwfast {
namespace {

struct F32 {
  using Scalar = float;
  using Vec = __m512;
  static constexpr int kWidth = 16;
  static __mmask16 first(int n) { return (__mmask16)((1u << n) - 1); }
  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec set(float x) { return _mm512_set1_ps(x); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static void store_n(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vec fma(Vec x, Vec y, Vec z) { return _mm512_fmadd_ps(x, y, z); }
  static Vec add(Vec x, Vec y) { return _mm512_add_ps(x, y); }
  static Vec mul(Vec x, Vec y) { return _mm512_mul_ps(x, y); }
  static Vec abs(Vec x) { return _mm512_abs_ps(x); }
};

struct F64 {
  using Scalar = double;
  using Vec = __m512d;
  static constexpr int kWidth = 8;
  static __mmask8 first(int n) { return (__mmask8)((1u << n) - 1); }
  static Vec zero() { return _mm512_setzero_pd(); }
  static Vec set(double x) { return _mm512_set1_pd(x); }
  static Vec load(const double* p) { return _mm512_loadu_pd(p); }
  static Vec load_n(const double* p, int n) { return _mm512_maskz_loadu_pd(first(n), p); }
  static void store(double* p, Vec v) { _mm512_storeu_pd(p, v); }
  static void store_n(double* p, Vec v, int n) { _mm512_mask_storeu_pd(p, first(n), v); }
  static Vec broadcast(const double* p) { return _mm512_set1_pd(*p); }
  static Vec fma(Vec x, Vec y, Vec z) { return _mm512_fmadd_pd(x, y, z); }
  static Vec add(Vec x, Vec y) { return _mm512_add_pd(x, y); }
  static Vec mul(Vec x, Vec y) { return _mm512_mul_pd(x, y); }
  static Vec abs(Vec x) { return _mm512_abs_pd(x); }
};

}  // namespace

extern const TileKernel<float> tile_avx512_float = tile_kernel_of<F32, 14, 2>();
extern const TileKernel<double> tile_avx512_double = tile_kernel_of<F64, 14, 2>();

}  // namespace cwfast
#endif
