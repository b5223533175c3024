// Compare-to-bitmask kernels for AVX-512, where a comparison gives the bits at once; otherwise as select_avx2.cpp.
#if defined(__AVX512BW__)
#include <immintrin.h>

#include "cpu/select_scan.h"

namespace cwfast {
namespace {

// kInf: key of infinity. `low <= key` and `key <= inf` bound the key on both sides, so NaN needs no step of its own.
template <int kInf>
inline Word scan16(const void* p, uint64_t low, uint64_t high, bool abs) {
  const uint16_t* data = (const uint16_t*)p;
  const __m512i magnitude = _mm512_set1_epi16(0x7fff), inf = _mm512_set1_epi16((short)kInf);
  const __m512i from = _mm512_set1_epi16((short)low), to = _mm512_set1_epi16((short)high);
  Word out = {0, 0, 0};
  for (int i = 0; i < 64; i += 32) {
    _mm_prefetch((const char*)(data + 2048 + i), _MM_HINT_T0);
    const __m512i raw = _mm512_loadu_si512(data + i), key = _mm512_and_si512(raw, magnitude);
    const __mmask32 valid = _mm512_cmple_epu16_mask(key, inf);
    const __mmask32 negative = _mm512_cmpneq_epu16_mask(raw, key) & _mm512_test_epi16_mask(key, key);
    out.from_low |= (uint64_t)(_mm512_cmpge_epu16_mask(key, from) & valid) << i;
    out.from_high |= (uint64_t)(_mm512_cmpge_epu16_mask(key, to) & valid) << i;
    out.invalid |= (uint64_t)(abs ? (__mmask32)~valid : (__mmask32)(~valid | negative)) << i;
  }
  return out;
}

}  // namespace

Word scan_avx512_float32(const void* p, uint64_t low, uint64_t high, bool abs) {
  const int* data = (const int*)p;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), inf = _mm512_set1_epi32(0x7f800000);
  const __m512i from = _mm512_set1_epi32((int)low), to = _mm512_set1_epi32((int)high);
  Word out = {0, 0, 0};
  for (int i = 0; i < 64; i += 16) {
    _mm_prefetch((const char*)(data + 1024 + i), _MM_HINT_T0);
    const __m512i raw = _mm512_loadu_si512(data + i), key = _mm512_and_si512(raw, magnitude);
    const __mmask16 valid = _mm512_cmple_epu32_mask(key, inf);
    const __mmask16 negative = _mm512_cmpneq_epu32_mask(raw, key) & _mm512_test_epi32_mask(key, key);
    out.from_low |= (uint64_t)(__mmask16)(_mm512_cmpge_epu32_mask(key, from) & valid) << i;
    out.from_high |= (uint64_t)(__mmask16)(_mm512_cmpge_epu32_mask(key, to) & valid) << i;
    out.invalid |= (uint64_t)(abs ? (__mmask16)~valid : (__mmask16)(~valid | negative)) << i;
  }
  return out;
}

Word scan_avx512_bfloat16(const void* p, uint64_t low, uint64_t high, bool abs) {
  return scan16<0x7f80>(p, low, high, abs);
}
Word scan_avx512_float16(const void* p, uint64_t low, uint64_t high, bool abs) {
  return scan16<0x7c00>(p, low, high, abs);
}

}  // namespace cwfast
#endif
