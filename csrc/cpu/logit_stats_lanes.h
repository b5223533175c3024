// LogitKernel written once, in the compiler's own vectors: each file that includes this is compiled for its instruction
// set and has its own copy, in its own unnamed namespace. All rows of a vector take the same steps, and each lane adds
// up one row in one order: the same bits on every instruction set.
#pragma once
#include "cpu/logit_stats_rows.h"

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
struct Rows {
  using T = typename F::T;
  using V = typename F::V;
  using I = typename F::I;
  static constexpr int kLanes = kVectorBytes / (int)sizeof(T);
  static constexpr int kBlock = 64;  // classes whose terms are summed apart: errors grow with it and C / it, not with C

  static V all(T x) { return V{} + x; }
  static V smaller(V x, V y) { return x < y ? x : y; }
  static V larger(V x, V y) { return x > y ? x : y; }

  // e^x for x in [kLowest, 0]: 2^n times a Taylor polynomial on [-ln 2 / 2, ln 2 / 2].
  static V exp(V x) {
    const V shifted = x * (T)1.4426950408889634 + F::kRound, n = shifted - F::kRound;
    const V r = (x - n * F::kLn2High) - n * F::kLn2Low;
    T inverse[F::kExp + 1] = {1};  // of the factorials
    for (int i = 1; i <= F::kExp; ++i) inverse[i] = inverse[i - 1] / (T)i;
    V sum = all(inverse[F::kExp]);
    for (int i = F::kExp; i-- > 0;) sum = sum * r + inverse[i];
    return sum * (V)(((I)shifted + F::kBias) << F::kMantissa);
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

  static void run(const LogitRows<T>& rows) {
    const int64_t classes = rows.classes;
    V* z = (V*)rows.work;
    const T infinity = (T)__builtin_inf();

    V label = {}, other = all(-infinity);  // other: the largest logit but the label's; NaN stays
    for (int i = 0; i < kLanes; ++i) {
      T& at = rows.work[rows.labels[i] * kLanes + i];
      label[i] = at;
      at = -infinity;
    }
    for (int64_t c = 0; c < classes; ++c) other = (z[c] > other) | (z[c] != z[c]) ? z[c] : other;
    const V peak = larger(label, other);
    const I good = (label == label) & (peak > -infinity) & (peak < infinity);
    for (int i = 0; i < kLanes; ++i) {
      rows.correct[i] = good[i] && label[i] >= other[i];
      if (label[i] == other[i])  // a tie goes to the lowest class
        for (int64_t c = 0; c < rows.labels[i]; ++c)
          if (z[c][i] == other[i]) rows.correct[i] = 0;
    }

    // The others relative to their largest: w = e^u. Those that are largest themselves are counted, not summed, so
    // that what is left beside a dominant one keeps its digits.
    const V from = other > -infinity ? other : all(0);
    V tops = {}, rest = {}, slope = {};  // slope: sum of w u
    for (int64_t begin = 0; begin < classes; begin += kBlock) {
      const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
      V some_rest = {}, some_slope = {};
      for (int64_t c = begin; c < end; ++c) {
        const V u = larger(z[c] - from, all(F::kLowest));
        const V w = (u > F::kLowest) & (u < 0) ? exp(u) : all(0);
        tops += u == 0 ? all(1) : all(0);
        some_rest += w;
        some_slope += w * u;
        z[c] = w;
      }
      rest += some_rest;
      slope += some_slope;
    }
    const V sum = larger(tops + rest, all(1)), log_sum = log(sum);  // below 1 only where every other is -inf
    const V phi = tops == 0 ? all(infinity) : (label - from) - log_sum;

    // p = 1 / (1 + e^-phi) and what follows, from e = e^-|phi| in [0, 1]: nothing cancels.
    const V size = smaller(larger(phi, -phi), all(-2 * F::kLowest));
    const V e = -size > F::kLowest ? exp(larger(-size, all(F::kLowest))) : all(0);
    const V log1p_e = log_ratio(e / (e + 2)), large = 1 / (1 + e), small = e / (1 + e);
    const V p = phi < 0 ? small : large, not_p = phi < 0 ? large : small;
    const V loss = (phi < 0 ? -phi : all(0)) + log1p_e;
    const V entropy = large * log1p_e + small * (size + log1p_e) + not_p * (log_sum - slope / sum);

    const V unit = not_p / sum;  // the probability of w = 1
    const V beside = smaller(larger(p + unit * (rest + larger(tops - 1, all(0))), all((T)1e-30)), all(1));
    V modified = not_p * smaller(loss, all((T)69.07755278982137)) - tops * unit * log(beside);
    for (int64_t begin = 0; begin < classes; begin += kBlock) {
      const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
      V some = {};
      for (int64_t c = begin; c < end; ++c) {  // -q ln(1 - q), q <= 1/2 because another class is at least as likely
        const V q = z[c] * unit;
        some += q * log_ratio(q / (2 - q));
      }
      modified += some;
    }

    const V values[6] = {loss, p, phi, entropy, modified, label - other};
    for (int v = 0; v < 6; ++v) ((V*)rows.values)[v] = good ? values[v] : all((T)__builtin_nan(""));
  }
};

}  // namespace
}  // namespace cwfast
