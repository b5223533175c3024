// One 64-entry word of comparisons: the only part of selection that depends on the instruction set.
// A score's key is its bit pattern without the sign: an unsigned integer that orders as the non-negative score does.
// Plain C inside, no library headers: a file compiled for AVX2 must not leave inline functions to the linker.
#pragma once
#include <stdint.h>

namespace cwfast {

struct Word {
  uint64_t from_low;   // bit i: key[i] >= low and not NaN
  uint64_t from_high;  // bit i: key[i] >= high and not NaN
  uint64_t invalid;    // bit i: NaN, or (unless abs) below zero
};

// `low`, `high` are keys in [0, infinity's key + 1]; p points at 64 entries.
using ScanWord = Word (*)(const void* p, uint64_t low, uint64_t high, bool abs);

Word scan_avx2_float32(const void* p, uint64_t low, uint64_t high, bool abs);
Word scan_avx2_float64(const void* p, uint64_t low, uint64_t high, bool abs);
Word scan_avx2_bfloat16(const void* p, uint64_t low, uint64_t high, bool abs);
Word scan_avx2_float16(const void* p, uint64_t low, uint64_t high, bool abs);

// float64 has no scan of its own for AVX-512: it takes that of AVX2.
Word scan_avx512_float32(const void* p, uint64_t low, uint64_t high, bool abs);
Word scan_avx512_bfloat16(const void* p, uint64_t low, uint64_t high, bool abs);
Word scan_avx512_float16(const void* p, uint64_t low, uint64_t high, bool abs);

}  // namespace cwfast
