// Keys of scores: their bits without the sign, unsigned integers that order as the non-negative scores do.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/select_scan.h"
#include "runtime.h"
#include "select.h"

namespace cwfast {

template <class Bits, uint64_t kInfKey, int kShift>
struct Format {
  using Raw = Bits;
  static constexpr uint64_t kInf = kInfKey;                            // key of +infinity, the largest valid one
  static constexpr uint64_t kMagnitude = (uint64_t{1} << kShift) - 1;  // all bits but the sign
};
using Float32 = Format<uint32_t, 0x7f800000u, 31>;
using Float64 = Format<uint64_t, 0x7ff0000000000000u, 63>;
using Bfloat16 = Format<uint16_t, 0x7f80u, 15>;
using Float16 = Format<uint16_t, 0x7c00u, 15>;

template <class F>
uint64_t key_at(const char* data, int64_t i) {
  typename F::Raw raw;
  std::memcpy(&raw, data + i * int64_t{sizeof raw}, sizeof raw);
  return raw & F::kMagnitude;
}

template <class F>
Word scan_scalar(const void* p, uint64_t low, uint64_t high, bool abs) {
  const auto* data = static_cast<const typename F::Raw*>(p);
  Word out{0, 0, 0};
  for (int i = 0; i < 64; ++i) {
    const uint64_t raw = data[i], key = raw & F::kMagnitude;
    const bool nan = key > F::kInf, negative = !abs && raw != key && key != 0;
    out.from_low |= uint64_t{!nan && key >= low} << i;
    out.from_high |= uint64_t{!nan && key >= high} << i;
    out.invalid |= uint64_t{nan || negative} << i;
  }
  return out;
}

// The scans of the instruction set in use.
template <class F>
Scan scanner(Dtype dtype) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512 && dtype != Dtype::float64)
    return dtype == Dtype::float32 ? kAvx512Float32 : dtype == Dtype::bfloat16 ? kAvx512Bfloat16 : kAvx512Float16;
  if (isa() >= Isa::avx2) {
    switch (dtype) {
      case Dtype::float32:
        return kAvx2Float32;
      case Dtype::float64:
        return kAvx2Float64;
      case Dtype::bfloat16:
        return kAvx2Bfloat16;
      case Dtype::float16:
        return kAvx2Float16;
    }
  }
#endif
  (void)dtype;
  return {scan_scalar<F>, run_by_words<scan_scalar<F>, sizeof(typename F::Raw)>};
}

// The scan of up to 64 entries.
template <class F>
Word scan_some(const Scan& scan, const char* data, int64_t numel, uint64_t low, uint64_t high, bool abs) {
  using Raw = typename F::Raw;
  if (numel >= 64) return scan.word(data, low, high, abs);
  Raw padded[64] = {};
  std::memcpy(padded, data, static_cast<size_t>(numel) * sizeof(Raw));
  Word word = scan.word(padded, low, high, abs);
  const uint64_t real = (uint64_t{1} << numel) - 1;
  word.from_low &= real, word.from_high &= real, word.invalid &= real;
  return word;
}

// Adds the NaN and negative entries of a word to the counts.
template <class F>
void count_invalid(const char* data, uint64_t invalid, int64_t& nans, int64_t& negatives) {
  for (; invalid; invalid &= invalid - 1) (key_at<F>(data, __builtin_ctzll(invalid)) > F::kInf ? nans : negatives) += 1;
}

// The bits of up to a run of entries at `above` and `inside`, and what they are added to `marks`.
template <class F>
void scan_part(const Scan& scan, const char* data, int64_t numel, uint64_t low, uint64_t high, bool abs,
               uint64_t* above, uint64_t* inside, Marks& marks) {
  const int64_t words = numel / 64;
  const Scanned run = scan.run(data, words, low, high, abs, above, inside);
  if (run.clean) marks.above += run.above, marks.inside += run.inside;
  for (int64_t w = run.clean ? words : 0; w < (numel + 63) / 64; ++w) {
    const char* p = data + w * int64_t{64 * sizeof(typename F::Raw)};
    const Word word = scan_some<F>(scan, p, numel - 64 * w, low, high, abs);
    above[w] = word.from_high;
    inside[w] = word.from_low & ~word.from_high;
    marks.above += __builtin_popcountll(above[w]);
    marks.inside += __builtin_popcountll(inside[w]);
    if (word.invalid) count_invalid<F>(p, word.invalid, marks.nans, marks.negatives);
  }
}

// By integers, because a conversion of subnormals may flush them to zero.
template <class F>
double value_of(uint64_t key) {
  if (key == F::kInf) return std::numeric_limits<double>::infinity();
  if constexpr (sizeof(typename F::Raw) == 8) {
    double value;
    std::memcpy(&value, &key, sizeof value);
    return value;
  } else {
    // the fraction has `bits` bits
    constexpr int bits = __builtin_ctzll(F::kInf), bias = static_cast<int>(F::kInf >> bits) / 2;
    const int exponent = static_cast<int>(key >> bits);
    const double fraction = static_cast<double>(key & ((uint64_t{1} << bits) - 1));
    if (exponent == 0) return std::ldexp(fraction, 1 - bias - bits);
    return std::ldexp(fraction + static_cast<double>(uint64_t{1} << bits), exponent - bias - bits);
  }
}

// Runs typed(F{}) with the format of this dtype.
template <class Typed>
auto by_dtype(Dtype dtype, Typed typed) {
  switch (dtype) {
    case Dtype::float32:
      return typed(Float32{});
    case Dtype::float64:
      return typed(Float64{});
    case Dtype::bfloat16:
      return typed(Bfloat16{});
    case Dtype::float16:
      break;
  }
  return typed(Float16{});
}

}  // namespace cwfast
