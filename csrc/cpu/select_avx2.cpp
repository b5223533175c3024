// Compare-to-bitmask kernels for AVX2; the scalar twin is scan_scalar in select_keys.h. Integer comparisons: those of
// floats would take subnormal scores for zeros where the program flushes them (torch.set_flush_denormal).
#if defined(__AVX2__)
#include <immintrin.h>

#include "cpu/select_scan.h"

namespace cwfast {
namespace {

constexpr int kAhead = 1024;  // entries: 4 KB of float32 ahead of the stream hides the memory latency

// kInf: key of infinity. Signed 16-bit comparisons are safe because keys stay below 2^15.
template <int kInf>
inline Word scan16(const void* p, uint64_t low, uint64_t high, bool abs) {
  const uint16_t* data = (const uint16_t*)p;
  const __m256i magnitude = _mm256_set1_epi16(0x7fff), inf = _mm256_set1_epi16((short)kInf);
  const __m256i below_low = _mm256_set1_epi16((short)((int)low - 1)),
                below_high = _mm256_set1_epi16((short)((int)high - 1));
  const __m256i zero = _mm256_setzero_si256();
  Word out = {0, 0, 0};
  for (int half = 0; half < 2; ++half) {
    __m256i from_low[2], from_high[2], invalid[2];
    for (int i = 0; i < 2; ++i) {
      const __m256i raw = _mm256_loadu_si256((const __m256i*)(data + 32 * half + 16 * i));
      const __m256i key = _mm256_and_si256(raw, magnitude);
      const __m256i nan = _mm256_cmpgt_epi16(key, inf);
      from_low[i] = _mm256_andnot_si256(nan, _mm256_cmpgt_epi16(key, below_low));
      from_high[i] = _mm256_andnot_si256(nan, _mm256_cmpgt_epi16(key, below_high));
      // negative: sign set and key not zero (-0 is a valid zero)
      const __m256i negative = _mm256_andnot_si256(_mm256_cmpeq_epi16(key, zero), _mm256_cmpgt_epi16(zero, raw));
      invalid[i] = abs ? nan : _mm256_or_si256(nan, negative);
    }
    auto mask = [](const __m256i* v) {
      const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(v[0], v[1]), 0xD8);
      return (uint64_t)(uint32_t)_mm256_movemask_epi8(bytes);
    };
    out.from_low |= mask(from_low) << (32 * half);
    out.from_high |= mask(from_high) << (32 * half);
    out.invalid |= mask(invalid) << (32 * half);
  }
  return out;
}

Word float32(const void* p, uint64_t low, uint64_t high, bool abs) {
  const int* data = (const int*)p;
  for (int i = 0; i < 64; i += 16) _mm_prefetch((const char*)(data + kAhead + i), _MM_HINT_T0);
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff), inf = _mm256_set1_epi32(0x7f800000);
  const __m256i below_low = _mm256_set1_epi32((int)low - 1), below_high = _mm256_set1_epi32((int)high - 1);
  const __m256i zero = _mm256_setzero_si256();
  auto mask = [](__m256i v) { return (uint64_t)_mm256_movemask_ps(_mm256_castsi256_ps(v)); };
  Word out = {0, 0, 0};
  for (int i = 0; i < 64; i += 8) {
    const __m256i raw = _mm256_loadu_si256((const __m256i*)(data + i));
    const __m256i key = _mm256_and_si256(raw, magnitude);
    const __m256i nan = _mm256_cmpgt_epi32(key, inf);
    const __m256i negative =
        _mm256_andnot_si256(_mm256_cmpeq_epi32(key, zero), raw);  // in the sign bit, which mask reads
    out.from_low |= mask(_mm256_andnot_si256(nan, _mm256_cmpgt_epi32(key, below_low))) << i;
    out.from_high |= mask(_mm256_andnot_si256(nan, _mm256_cmpgt_epi32(key, below_high))) << i;
    out.invalid |= mask(abs ? nan : _mm256_or_si256(nan, negative)) << i;
  }
  return out;
}

Word float64(const void* p, uint64_t low, uint64_t high, bool abs) {
  const long long* data = (const long long*)p;
  const __m256i magnitude = _mm256_set1_epi64x(0x7fffffffffffffff), inf = _mm256_set1_epi64x(0x7ff0000000000000);
  const __m256i below_low = _mm256_set1_epi64x((long long)low - 1),
                below_high = _mm256_set1_epi64x((long long)high - 1);
  const __m256i zero = _mm256_setzero_si256();
  auto mask = [](__m256i v) { return (uint64_t)_mm256_movemask_pd(_mm256_castsi256_pd(v)); };
  Word out = {0, 0, 0};
  for (int i = 0; i < 64; i += 4) {
    const __m256i raw = _mm256_loadu_si256((const __m256i*)(data + i));
    const __m256i key = _mm256_and_si256(raw, magnitude);
    const __m256i nan = _mm256_cmpgt_epi64(key, inf);
    const __m256i negative = _mm256_andnot_si256(_mm256_cmpeq_epi64(key, zero), raw);
    out.from_low |= mask(_mm256_andnot_si256(nan, _mm256_cmpgt_epi64(key, below_low))) << i;
    out.from_high |= mask(_mm256_andnot_si256(nan, _mm256_cmpgt_epi64(key, below_high))) << i;
    out.invalid |= mask(abs ? nan : _mm256_or_si256(nan, negative)) << i;
  }
  return out;
}

}  // namespace

const Scan kAvx2Float32{float32, run_by_words<float32, 4>}, kAvx2Float64{float64, run_by_words<float64, 8>},
    kAvx2Bfloat16{scan16<0x7f80>, run_by_words<scan16<0x7f80>, 2>},
    kAvx2Float16{scan16<0x7c00>, run_by_words<scan16<0x7c00>, 2>};

}  // namespace cwfast
#endif
