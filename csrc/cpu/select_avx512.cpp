// Compare-to-bitmask kernels for AVX-512, where a comparison gives the bits at once; otherwise as select_avx2.cpp.
// No software prefetch: measured on Zen 4, it takes a quarter of the bandwidth.
#if defined(__AVX512BW__)
#include <immintrin.h>
#include <string.h>

#include "cpu/select_scan.h"

namespace cwfast {
namespace {

// kInf: key of infinity. `low <= key` and `key <= inf` bound the key on both sides, so NaN needs no step of its own.
template <int kInf>
Word scan16(const void* p, uint64_t low, uint64_t high, bool abs) {
  const uint16_t* data = (const uint16_t*)p;
  const __m512i magnitude = _mm512_set1_epi16(0x7fff), inf = _mm512_set1_epi16((short)kInf);
  const __m512i from = _mm512_set1_epi16((short)low), to = _mm512_set1_epi16((short)high);
  Word out = {0, 0, 0};
  for (int i = 0; i < 64; i += 32) {
    const __m512i raw = _mm512_loadu_si512(data + i), key = _mm512_and_si512(raw, magnitude);
    const __mmask32 valid = _mm512_cmple_epu16_mask(key, inf);
    const __mmask32 negative = _mm512_cmpneq_epu16_mask(raw, key) & _mm512_test_epi16_mask(key, key);
    out.from_low |= (uint64_t)(_mm512_cmpge_epu16_mask(key, from) & valid) << i;
    out.from_high |= (uint64_t)(_mm512_cmpge_epu16_mask(key, to) & valid) << i;
    out.invalid |= (uint64_t)(abs ? (__mmask32)~valid : (__mmask32)(~valid | negative)) << i;
  }
  return out;
}

Word scan32(const void* p, uint64_t low, uint64_t high, bool abs) {
  const int* data = (const int*)p;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), inf = _mm512_set1_epi32(0x7f800000);
  const __m512i from = _mm512_set1_epi32((int)low), to = _mm512_set1_epi32((int)high);
  Word out = {0, 0, 0};
  for (int i = 0; i < 64; i += 16) {
    const __m512i raw = _mm512_loadu_si512(data + i), key = _mm512_and_si512(raw, magnitude);
    const __mmask16 valid = _mm512_cmple_epu32_mask(key, inf);
    const __mmask16 negative = _mm512_cmpneq_epu32_mask(raw, key) & _mm512_test_epi32_mask(key, key);
    out.from_low |= (uint64_t)(__mmask16)(_mm512_cmpge_epu32_mask(key, from) & valid) << i;
    out.from_high |= (uint64_t)(__mmask16)(_mm512_cmpge_epu32_mask(key, to) & valid) << i;
    out.invalid |= (uint64_t)(abs ? (__mmask16)~valid : (__mmask16)(~valid | negative)) << i;
  }
  return out;
}

struct Lanes32 {
  using Mask = __mmask16;
  static constexpr int kLanes = 16, kMagnitude = 0x7fffffff, kInf = 0x7f800000;
  static __m512i all(int x) { return _mm512_set1_epi32(x); }
  static Mask at_most(__m512i a, __m512i b) { return _mm512_cmple_epu32_mask(a, b); }
  static Mask at_least(__m512i a, __m512i b) { return _mm512_cmpge_epu32_mask(a, b); }
};
template <int kInfinity>
struct Lanes16 {
  using Mask = __mmask32;
  static constexpr int kLanes = 32, kMagnitude = 0x7fff, kInf = kInfinity;
  static __m512i all(int x) { return _mm512_set1_epi16((short)x); }
  static Mask at_most(__m512i a, __m512i b) { return _mm512_cmple_epu16_mask(a, b); }
  static Mask at_least(__m512i a, __m512i b) { return _mm512_cmpge_epu16_mask(a, b); }
};

// A run whose scores are all valid needs three comparisons a vector: what is at most infinity as an unsigned integer is
// neither NaN nor negative, and no -0.
template <class Vector>
Scanned scan_run(const void* p, int64_t words, uint64_t low, uint64_t high, bool abs, uint64_t* above,
                 uint64_t* inside) {
  using Mask = typename Vector::Mask;
  const char* data = (const char*)p;
  char *up = (char*)above, *in = (char*)inside;
  const __m512i keep = Vector::all(abs ? Vector::kMagnitude : -1), inf = Vector::all(Vector::kInf);
  const __m512i from = Vector::all((int)low), to = Vector::all((int)high);
  Mask valid = (Mask)-1;
  for (int64_t i = 0; i < words * (64 / Vector::kLanes); ++i) {
    const __m512i key = _mm512_and_si512(_mm512_loadu_si512(data + 64 * i), keep);
    valid &= Vector::at_most(key, inf);
    const Mask from_low = Vector::at_least(key, from), from_high = Vector::at_least(key, to);
    const Mask between = from_low & (Mask)~from_high;
    memcpy(up + i * sizeof(Mask), &from_high, sizeof(Mask));
    memcpy(in + i * sizeof(Mask), &between, sizeof(Mask));
  }
  return counted(above, inside, words, valid == (Mask)-1);
}

}  // namespace

const Scan kAvx512Float32{scan32, scan_run<Lanes32>}, kAvx512Bfloat16{scan16<0x7f80>, scan_run<Lanes16<0x7f80>>},
    kAvx512Float16{scan16<0x7c00>, scan_run<Lanes16<0x7c00>>};

}  // namespace cwfast
#endif
