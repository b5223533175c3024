// Tiles of logits: rows in parallel, each by the vectors of lm_token_stats_lanes.h, merged in double.
#include "lm_token_stats.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/lm_token_stats_lanes.h"
#include "runtime.h"

namespace cwfast {
namespace {

constexpr int64_t kChunk = 16;  // rows between looks at Ctrl-C, and of a thread's piece of work
constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class T>
const LmRowKernel<T>& kernel() {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, float>) {
    if (isa() == Isa::avx512) return lm_rows_avx512_float;
    if (isa() == Isa::avx2) return lm_rows_avx2_float;
  } else {
    if (isa() == Isa::avx512) return lm_rows_avx512_double;
    if (isa() == Isa::avx2) return lm_rows_avx2_double;
  }
#endif
  return LmRows<std::conditional_t<std::is_same_v<T, float>, Single, Double>>::kKernel;
}

template <class Work>
void for_rows(int64_t rows, Work&& work) {
  Region region;
#pragma omp parallel for schedule(static) num_threads(threads())
  for (int64_t begin = 0; begin < rows; begin += kChunk)
    region.run([&] {
      for (int64_t row = begin; row < std::min(begin + kChunk, rows); ++row) work(row);
    });
  region.finish();
}

// The row's logits, ready: behind the last one stands -inf.
template <class T>
T* ready(const LmTile<T>& tile, int64_t row, const LmRowKernel<T>& rows) {
  T* z = tile.logits + row * tile.stride;
  if (tile.bias || tile.scale != 1 || tile.softcap > 0)
    rows.transform(z, tile.stride, tile.bias, static_cast<T>(tile.scale), static_cast<T>(tile.softcap));
  std::fill(z + tile.columns, z + tile.stride, static_cast<T>(-kInfinity));
  return z;
}

template <class T>
struct Peaks {
  T blocks[kTileColumns / kPeakBlock];
  T largest;
  int64_t above;
};

template <class T>
Peaks<T> survey(const T* z, int64_t length, T pivot, const LmRowKernel<T>& rows) {
  Peaks<T> out;
  out.above = rows.survey(z, length, pivot, out.blocks);
  out.largest = out.blocks[0];
  for (int64_t b = 1; b * kPeakBlock < length; ++b)
    if (out.blocks[b] > out.largest || std::isnan(out.blocks[b])) out.largest = out.blocks[b];
  return out;
}

// Inserts what is larger than the smallest of the list; later indices lose ties.
template <class T>
void take_largest(const T* z, int64_t columns, const Peaks<T>& peaks, int64_t first, int64_t topk, T* values,
                  int64_t* indices) {
  for (int64_t c = 0; c < columns; ++c) {
    if (c % kPeakBlock == 0 && !(peaks.blocks[c / kPeakBlock] > values[topk - 1])) {
      c += kPeakBlock - 1;
      continue;
    }
    if (!(z[c] > values[topk - 1])) continue;
    int64_t at = topk - 1;
    for (; at > 0 && z[c] > values[at - 1]; --at) values[at] = values[at - 1], indices[at] = indices[at - 1];
    values[at] = z[c], indices[at] = first + c;
  }
}

template <class T>
void merge(const RowSums& found, double peak, int64_t row, const LmParts<T>& parts) {
  const double weight = found.tops + found.rest, before = parts.tops[row] + parts.rest[row];
  const double shift = peak - parts.peak[row];  // inf for the first tile
  const double mean = found.slope / weight, mean_before = before > 0 ? parts.slope[row] / before : 0;
  if (shift > 0) {  // what was there is scaled to the new peak
    const double f = std::exp(-shift), old = f * before;
    const double apart = old > 0 ? mean - (mean_before - shift) : 0;
    parts.spread[row] = f * parts.spread[row] + found.spread + old * weight / (old + weight) * apart * apart;
    parts.slope[row] = found.slope + (old > 0 ? f * (parts.slope[row] - shift * before) : 0);
    parts.rest[row] = found.rest + old;
    parts.tops[row] = found.tops;
    parts.peak[row] = peak;
  } else {
    const double f = std::exp(shift), now = f * weight, apart = now > 0 ? (mean + shift) - mean_before : 0;
    parts.spread[row] += f * found.spread + now * before / (now + before) * apart * apart;
    parts.slope[row] += now > 0 ? f * (found.slope + shift * weight) : 0;
    parts.rest[row] += shift == 0 ? found.rest : now;
    parts.tops[row] += shift == 0 ? found.tops : 0;
  }
}

// The new peak; old and found become what the sums that are relative to them are multiplied by.
double common_peak(double& old, double& found) {
  const double peak = std::max(old, found);
  old = old == -kInfinity ? 0 : std::exp(old - peak);
  found = found == -kInfinity ? 0 : std::exp(found - peak);
  return peak;
}

}  // namespace

template <class T>
void lm_transform(const LmTile<T>& tile) {
  const LmRowKernel<T>& rows = kernel<T>();
  for (int64_t row = 0; row < tile.rows; ++row) ready(tile, row, rows);
}

template <class T>
void lm_stats_tile(const LmTile<T>& tile, int64_t first, const int64_t* targets, const T* target_logits,
                   const LmParts<T>& parts) {
  const LmRowKernel<T>& rows = kernel<T>();
  for_rows(tile.rows, [&](int64_t row) {
    alignas(64) T work[kTileColumns];
    T* z = ready(tile, row, rows);
    const int64_t target = targets[row] - first;
    if (target >= 0 && target < tile.columns) z[target] = target_logits[row];
    const Peaks<T> peaks = survey(z, tile.stride, target_logits[row], rows);
    const double peak = peaks.largest;
    if (std::isnan(parts.peak[row])) return;
    if (!(peak < kInfinity)) {  // no distribution
      parts.peak[row] = std::numeric_limits<double>::quiet_NaN();
      return;
    }
    parts.above[row] += peaks.above;
    if (peak > parts.peak[row]) parts.top[row] = first + (std::find(z, z + tile.columns, peaks.largest) - z);
    if (parts.topk > 0)
      take_largest(z, tile.columns, peaks, first, parts.topk, parts.values + row * parts.topk,
                   parts.indices + row * parts.topk);
    if (peak > -kInfinity) merge(rows.sums(z, tile.stride, peaks.largest, work), peak, row, parts);
  });
}

template <class T>
void lm_kl_tile(const LmTile<T>& model, const LmTile<T>& reference, const LmDivergence& sums) {
  const LmRowKernel<T>& rows = kernel<T>();
  for_rows(model.rows, [&](int64_t row) {
    T *z = ready(model, row, rows), *r = ready(reference, row, rows);
    const T peak = survey(z, model.stride, T{0}, rows).largest, ref_peak = survey(r, model.stride, T{0}, rows).largest;
    if (!(peak < kInfinity && ref_peak < kInfinity) || std::isnan(sums.peak[row])) {
      sums.peak[row] = std::numeric_limits<double>::quiet_NaN();
      return;
    }
    const T lowest = std::numeric_limits<T>::lowest();  // where every logit is -inf: its terms are 0
    const CrossSums found = rows.cross(z, r, model.stride, std::max(peak, lowest), std::max(ref_peak, lowest));
    double old = sums.peak[row], add = peak, ref_old = sums.ref_peak[row], ref_add = ref_peak;
    sums.peak[row] = common_peak(old, add);
    sums.ref_peak[row] = common_peak(ref_old, ref_add);
    sums.sum[row] = old * sums.sum[row] + add * found.sum;
    sums.ref_sum[row] = ref_old * sums.ref_sum[row] + ref_add * found.ref_sum;
    sums.gap[row] = (ref_old > 0 ? ref_old * sums.gap[row] : 0) + (ref_add > 0 ? ref_add * found.gap : 0);
  });
}

template <class T>
void lm_logprob_grad_tile(const LmTile<T>& tile, const T* sums, int64_t first, const int64_t* targets, const T* grad) {
  const LmRowKernel<T>& rows = kernel<T>();
  const T softcap = static_cast<T>(tile.softcap);
  for_rows(tile.rows, [&](int64_t row) {
    T* z = ready(tile, row, rows);
    const T factor = -grad[row] * static_cast<T>(tile.scale);  // of p_v - [v = target]
    const int64_t target = targets[row] - first;
    const bool here = target >= 0 && target < tile.columns;
    const T share = here && softcap > 0 ? z[target] / softcap : 0;
    rows.gradient(z, nullptr, tile.stride, sums + 2 * row, nullptr, factor, softcap);
    if (here) z[target] -= factor * (1 - share * share);
  });
}

template <class T>
void lm_kl_grad_tile(const LmTile<T>& model, const T* sums, const LmTile<T>& reference, const T* ref_sums,
                     const T* grad) {
  const LmRowKernel<T>& rows = kernel<T>();
  for_rows(model.rows, [&](int64_t row) {
    T *z = ready(model, row, rows), *r = ready(reference, row, rows);
    rows.gradient(z, r, model.stride, sums + 2 * row, ref_sums + 2 * row, grad[row] * static_cast<T>(model.scale),
                  static_cast<T>(model.softcap));
  });
}

#define CWFAST_INSTANTIATE(T)                                                                          \
  template void lm_transform(const LmTile<T>&);                                                        \
  template void lm_stats_tile(const LmTile<T>&, int64_t, const int64_t*, const T*, const LmParts<T>&); \
  template void lm_kl_tile(const LmTile<T>&, const LmTile<T>&, const LmDivergence&);                   \
  template void lm_logprob_grad_tile(const LmTile<T>&, const T*, int64_t, const int64_t*, const T*);   \
  template void lm_kl_grad_tile(const LmTile<T>&, const T*, const LmTile<T>&, const T*, const T*)
CWFAST_INSTANTIATE(float);
CWFAST_INSTANTIATE(double);

}  // namespace cwfast
