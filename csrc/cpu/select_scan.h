// Comparisons of 64-entry words and of runs of them: the only part of selection that depends on the instruction set.
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

struct Scanned {
  int64_t above, inside;  // entries with key >= high; with low <= key < high
  bool clean;             // false: some entry may be invalid or -0, and nothing else here is to be used
};

// The bits of each word of a run. The common case: what is not clean goes word by word.
using ScanRun = Scanned (*)(const void* p, int64_t words, uint64_t low, uint64_t high, bool abs, uint64_t* above,
                            uint64_t* inside);

struct Scan {
  ScanWord word;
  ScanRun run;
};

// After the words are written: a loop that writes and counts would wait for its own narrow stores.
static inline Scanned counted(const uint64_t* above, const uint64_t* inside, int64_t words, bool clean) {
  Scanned out = {0, 0, clean};
  for (int64_t w = 0; clean && w < words; ++w) {
    out.above += __builtin_popcountll(above[w]);
    out.inside += __builtin_popcountll(inside[w]);
  }
  return out;
}

// A run by the scan of its words.
template <ScanWord kScan, int kBytes>
static inline Scanned run_by_words(const void* p, int64_t words, uint64_t low, uint64_t high, bool abs, uint64_t* above,
                                   uint64_t* inside) {
  uint64_t invalid = 0;
  for (int64_t w = 0; w < words; ++w) {
    const Word word = kScan((const char*)p + 64 * kBytes * w, low, high, abs);
    above[w] = word.from_high;
    inside[w] = word.from_low & ~word.from_high;
    invalid |= word.invalid;
  }
  return counted(above, inside, words, invalid == 0);
}

extern const Scan kAvx2Float32, kAvx2Float64, kAvx2Bfloat16, kAvx2Float16;
// float64 has no scan of its own for AVX-512: it takes that of AVX2.
extern const Scan kAvx512Float32, kAvx512Bfloat16, kAvx512Float16;

}  // namespace cwfast
