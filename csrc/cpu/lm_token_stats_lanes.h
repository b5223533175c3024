// LmRowKernel written once, in the compiler's own vectors: see vector_math.h. A row is added up in 16 lanes on every
// instruction set, and the lanes in order, in double: the same bits everywhere. A lane adds at most kTileColumns / 16
// numbers in the precision of the logits.
#pragma once
#include "cpu/lm_token_stats_rows.h"
#include "cpu/vector_math.h"

namespace cwfast {
namespace {

template <class F>
struct LmRows : Math<F> {
  using typename Math<F>::T;
  using typename Math<F>::V;
  using typename Math<F>::I;
  using Math<F>::kLanes;
  using Math<F>::all;
  static constexpr int kVectors = (int)kRowLanes / kLanes;

  struct Lanes {
    V v[kVectors] = {};
    double sum() const {
      double total = 0;
      for (int i = 0; i < (int)kRowLanes; ++i) total += v[i / kLanes][i % kLanes];
      return total;
    }
  };

  // e^x, 0 where that is below the smallest normal number or x is NaN; x at most a little above 0.
  static V power(V x) {
    const I in = x > F::kLowest;
    return in ? Math<F>::exp(in ? x : all(0)) : all(0);
  }

  static void transform(T* row, int64_t length, const T* bias, T scale, T softcap) {
    V* z = (V*)row;
    const V* b = (const V*)bias;
    for (int64_t i = 0; i < length / kLanes; ++i) {
      const V x = (b ? z[i] + b[i] : z[i]) * scale;
      z[i] = softcap > 0 ? softcap * Math<F>::tanh(x / softcap) : x;
    }
  }

  static int64_t survey(const T* row, int64_t length, T pivot, T* peaks) {
    const V* z = (const V*)row;
    int64_t above = 0;
    for (int64_t begin = 0; begin < length; begin += kPeakBlock) {
      const int64_t end = begin + kPeakBlock < length ? begin + kPeakBlock : length;
      V peak = z[begin / kLanes];
      I less = {};  // minus the number above
      for (int64_t i = begin / kLanes; i < end / kLanes; ++i) {
        peak = (z[i] > peak) | (z[i] != z[i]) ? z[i] : peak;
        less += z[i] > pivot;
      }
      T largest = peak[0];
      for (int i = 0; i < kLanes; ++i) {
        if (peak[i] > largest || peak[i] != peak[i]) largest = peak[i];
        above -= less[i];
      }
      *peaks++ = largest;
    }
    return above;
  }

  static RowSums sums(const T* row, int64_t length, T peak, T* work) {
    const V* z = (const V*)row;
    V* w = (V*)work;
    Lanes tops, rest, slope;
    for (int64_t i = 0; i < length / kLanes; i += kVectors)
      for (int j = 0; j < kVectors; ++j) {
        const V u = z[i + j] - peak, e = power(u);
        const I top = u == 0;
        tops.v[j] += top ? all(1) : all(0);
        rest.v[j] += top ? all(0) : e;
        slope.v[j] += e > 0 ? e * u : all(0);
        w[i + j] = e;
      }
    RowSums out = {tops.sum(), rest.sum(), slope.sum(), 0};
    const double weight = out.tops + out.rest;
    const T mean = (T)(out.slope / weight);
    Lanes spread, off;
    for (int64_t i = 0; i < length / kLanes; i += kVectors)
      for (int j = 0; j < kVectors; ++j) {
        const V d = w[i + j] > 0 ? (z[i + j] - peak) - mean : all(0), wd = w[i + j] * d;
        spread.v[j] += wd * d;
        off.v[j] += wd;
      }
    const double offset = off.sum();  // what rounding the mean has left
    out.spread = spread.sum() - offset * offset / weight;
    return out;
  }

  static CrossSums cross(const T* row, const T* ref_row, int64_t length, T peak, T ref_peak) {
    const V *z = (const V*)row, *r = (const V*)ref_row;
    Lanes sum, ref_sum, gap;
    for (int64_t i = 0; i < length / kLanes; i += kVectors)
      for (int j = 0; j < kVectors; ++j) {
        const V q = power(r[i + j] - ref_peak);
        sum.v[j] += power(z[i + j] - peak);
        ref_sum.v[j] += q;
        gap.v[j] += q > 0 ? q * (r[i + j] - z[i + j]) : all(0);
      }
    return {sum.sum(), ref_sum.sum(), gap.sum()};
  }

  static void gradient(T* row, const T* ref_row, int64_t length, const T* logsumexp, const T* ref_logsumexp, T factor,
                       T softcap) {
    V* z = (V*)row;
    const V* r = (const V*)ref_row;
    if (logsumexp[0] != logsumexp[0] || (r && ref_logsumexp[0] != ref_logsumexp[0])) factor = (T)__builtin_nan("");
    for (int64_t i = 0; i < length / kLanes; ++i) {
      V p = power((z[i] - logsumexp[0]) - logsumexp[1]);
      if (r) p -= power((r[i] - ref_logsumexp[0]) - ref_logsumexp[1]);
      const V share = z[i] / softcap;
      z[i] = softcap > 0 ? p * factor * (1 - share * share) : p * factor;
    }
  }

  static constexpr LmRowKernel<T> kKernel = {transform, survey, sums, cross, gradient};
};

}  // namespace
}  // namespace cwfast
