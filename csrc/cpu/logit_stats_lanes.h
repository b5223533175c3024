// LogitKernel written once, in the compiler's own vectors: each file that includes this is compiled for its instruction
// set and has its own copy, in its own unnamed namespace. All rows of a vector take the same steps, and each lane adds
// up one row in one order: the same bits on every instruction set.
#pragma once
#include "cpu/logit_stats_rows.h"
#include "cpu/vector_math.h"

namespace cwfast {
namespace {

template <class F>
struct Rows : Math<F> {
  using typename Math<F>::T;
  using typename Math<F>::V;
  using typename Math<F>::I;
  using Math<F>::kLanes;
  using Math<F>::all;
  using Math<F>::smaller;
  using Math<F>::larger;
  using Math<F>::exp;
  using Math<F>::log;
  using Math<F>::log_ratio;
  static constexpr int kBlock = 64;  // classes whose terms are summed apart: errors grow with it and C / it, not with C

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
