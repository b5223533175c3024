// Elementary functions in the compiler's own vectors: each file that includes this is compiled for its instruction set
// and has its own copy, in its own unnamed namespace. The same bits on every instruction set. Plain C inside (see
// select_scan.h).
#pragma once
#include <stdint.h>

namespace cwfast {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct Single {
  using T = float;
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissa = 23;
  static constexpr int32_t kBias = 127, kFraction = (1 << 23) - 1;
  static constexpr T kLowest = -87;          // exp of it is still a normal number
  static constexpr T kRound = 0x1.8p23f;     // added and taken away again: rounds to an integer
  static constexpr T kLn2High = 0x1.63p-1f;  // few digits: its product with an exponent is exact
  static constexpr T kLn2Low = -0x1.bd0106p-13f;
  static constexpr int kExp = 7;    // 0.347^8 / 8! = 5e-9
  static constexpr int kAtanh = 8;  // 9^-8 / 17 = 1e-9
};

struct Double {
  using T = double;
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissa = 52;
  static constexpr int64_t kBias = 1023, kFraction = ((int64_t)1 << 52) - 1;
  static constexpr T kLowest = -708;
  static constexpr T kRound = 0x1.8p52;
  static constexpr T kLn2High = 0x1.62e42feep-1;
  static constexpr T kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr int kExp = 13;    // 0.347^14 / 14! = 4e-18
  static constexpr int kAtanh = 17;  // 9^-17 / 35 = 2e-18
};

template <class F>
struct Math {
  using T = typename F::T;
  using V = typename F::V;
  using I = typename F::I;
  static constexpr int kLanes = kVectorBytes / (int)sizeof(T);

  static V all(T x) { return V{} + x; }
  static V smaller(V x, V y) { return x < y ? x : y; }
  static V larger(V x, V y) { return x > y ? x : y; }

  // x = n ln 2 + r, r in [-ln 2 / 2, ln 2 / 2].
  struct Reduced {
    V r, power;  // power: 2^n
  };
  static Reduced reduced(V x) {
    const V shifted = x * (T)1.4426950408889634 + F::kRound, n = shifted - F::kRound;
    return {(x - n * F::kLn2High) - n * F::kLn2Low, (V)(((I)shifted + F::kBias) << F::kMantissa)};
  }

  // The Taylor polynomial of e^r without its first `from` terms, over r^from.
  template <int from>
  static V taylor(V r) {
    T inverse[F::kExp + 1] = {1};  // of the factorials
    for (int i = 1; i <= F::kExp; ++i) inverse[i] = inverse[i - 1] / (T)i;
    V sum = all(inverse[F::kExp]);
    for (int i = F::kExp; i-- > from;) sum = sum * r + inverse[i];
    return sum;
  }

  // e^x for x in [kLowest, -kLowest].
  static V exp(V x) {
    const Reduced parts = reduced(x);
    return taylor<0>(parts.r) * parts.power;
  }

  // tanh x by e^|2x| - 1, which keeps the digits of a small x. NaN stays.
  static V tanh(V x) {
    const I sign = (I)x & ((I)all(1) ^ (I)all(-1));
    const V size = (V)((I)x ^ sign) * 2;
    const Reduced parts = reduced(size > 40 ? all(40) : size);
    const V minus_one = parts.r * taylor<1>(parts.r) * parts.power + (parts.power - 1);
    return (V)((I)(minus_one / (minus_one + 2)) | sign);
  }

  // 2 atanh(s) = ln((1 + s) / (1 - s)) for s in [0, 1/3].
  static V log_ratio(V s) {
    const V square = s * s;
    V sum = all(0);
    for (int i = F::kAtanh; i-- > 0;) sum = sum * square + (T)2 / (T)(2 * i + 1);
    return sum * s;
  }

  // ln x for normal x > 0: its exponent and, by log_ratio, its mantissa in [1, 2).
  static V log(V x) {
    const I bits = (I)x, magic = (I)all(F::kRound);
    const V exponent = (V)(magic + (bits >> F::kMantissa)) - (F::kRound + (T)F::kBias);
    const V mantissa = (V)((bits & F::kFraction) | (I)all(1));
    return exponent * F::kLn2High + (exponent * F::kLn2Low + log_ratio((mantissa - 1) / (mantissa + 1)));
  }
};

}  // namespace
}  // namespace cwfast
