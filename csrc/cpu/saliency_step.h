// The micro-tile written once for every vector type V: kRows rows of kVectors vectors in registers. Plain C inside (see
// select_scan.h); each file that includes this has its own copy, in its own unnamed namespace.
#pragma once
#include "cpu/saliency_tile.h"

namespace cwfast {
namespace {

// The loops over a micro-tile must unroll entirely: only then do its sums live in registers.
#define CWFAST_UNROLL _Pragma("GCC unroll 16")

template <class V>
inline typename V::Vec folded(typename V::Vec x, Fold fold) {
  return fold == Fold::sum ? x : fold == Fold::abs ? V::abs(x) : V::mul(x, x);
}

template <class V, int kRows, int kVectors>
struct Tile {
  using T = typename V::Scalar;
  using Vec = typename V::Vec;
  static constexpr int kWidth = V::kWidth, kColumns = kVectors * kWidth;

  template <Fold fold>
  static void fold_in(const Vec (&g)[kRows][kVectors], T* sum) {
    CWFAST_UNROLL for (int r = 0; r < kRows; ++r) CWFAST_UNROLL for (int v = 0; v < kVectors; ++v) {
      T* at = sum + r * kColumns + v * kWidth;
      const Vec old = V::load(at);
      V::store(at, fold == Fold::square ? V::fma(g[r][v], g[r][v], old) : V::add(old, folded<V>(g[r][v], fold)));
    }
  }

  static void store(const Vec (&g)[kRows][kVectors], T* to) {
    CWFAST_UNROLL for (int r = 0; r < kRows; ++r) CWFAST_UNROLL for (int v = 0; v < kVectors; ++v)
        V::store(to + r * kColumns + v * kWidth, g[r][v]);
  }

  static void step(const TileStep<T>& s) {
    if (s.out)  // they arrive while the products run
      for (int64_t r = 0; r < s.rows; ++r)
        for (int64_t c = 0; c < s.columns; c += 64 / (int64_t)sizeof(T)) {
          __builtin_prefetch(s.out + r * s.stride + c, 1);
          if (s.factor) __builtin_prefetch(s.factor + r * s.stride + c);
          if (s.grad) __builtin_prefetch(s.grad + r * s.stride + c, 1);
        }
    if (s.fresh)
      for (int64_t i = 0; i < kRows * kColumns; ++i) s.sum[i] = 0;
    if (s.fresh && s.total)
      for (int64_t i = 0; i < kRows * kColumns; ++i) s.total[i] = 0;
    const T *d = s.d, *a = s.a;
    int64_t t = 0;
    for (int64_t b = 0; b < s.samples; ++b) {
      Vec g[kRows][kVectors];
      CWFAST_UNROLL for (int r = 0; r < kRows; ++r) CWFAST_UNROLL for (int v = 0; v < kVectors; ++v) g[r][v] =
          V::zero();
      for (; t < s.ends[b]; ++t, d += kRows, a += kColumns) {
        Vec row[kVectors];
        CWFAST_UNROLL for (int v = 0; v < kVectors; ++v) row[v] = V::load(a + v * kWidth);
        CWFAST_UNROLL for (int r = 0; r < kRows; ++r) {
          const Vec x = V::broadcast(d + r);
          CWFAST_UNROLL for (int v = 0; v < kVectors; ++v) g[r][v] = V::fma(x, row[v], g[r][v]);
        }
      }
      if (b == 0 && !s.begins)
        CWFAST_UNROLL for (int r = 0; r < kRows; ++r) CWFAST_UNROLL for (int v = 0; v < kVectors; ++v) g[r][v] =
            V::add(V::load(s.partial + r * kColumns + v * kWidth), g[r][v]);
      if (b + 1 == s.samples && !s.complete) {
        store(g, s.partial);
        break;
      }
      if (s.total) fold_in<Fold::sum>(g, s.total);
      if (s.fold == Fold::abs)
        fold_in<Fold::abs>(g, s.sum);
      else if (s.fold == Fold::square)
        fold_in<Fold::square>(g, s.sum);
      else
        fold_in<Fold::sum>(g, s.sum);
    }
    if (s.out) write(s);
  }

  static void write(const TileStep<T>& s) {
    const Vec scale = V::set(s.scale);
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t c = 0; c < s.columns; c += kWidth) {
        const int64_t at = r * s.stride + c, from = r * kColumns + c;
        const int n = s.columns - c < kWidth ? (int)(s.columns - c) : kWidth;
        Vec value = V::mul(V::load(s.sum + from), scale);
        if (s.factor)
          value = V::mul(value, folded<V>(V::load_n(s.factor + at, n), s.power == 1 ? Fold::abs : Fold::square));
        V::store_n(s.out + at, V::add(s.new_out ? V::zero() : V::load_n(s.out + at, n), value), n);
        if (s.grad) {
          const Vec old = s.new_grad ? V::zero() : V::load_n(s.grad + at, n);
          V::store_n(s.grad + at, V::add(old, V::load(s.total + from)), n);
        }
      }
  }
};

// Row by row, as they lie in memory. Each is stored in whole vectors, whose surplus the next row overwrites.
template <class V, int kPanel, Fold fold>
void pack_as(const typename V::Scalar* from, int64_t stride, int64_t depth, int64_t n, typename V::Scalar* to) {
  using T = typename V::Scalar;
  constexpr int64_t w = V::kWidth, whole = (kPanel + w - 1) / w * w, ahead = 8;
  const int64_t panel = panel_size(depth, kPanel, w);
  for (int64_t t = 0; t < depth; ++t, from += stride) {
    if (t + ahead < depth)  // rows lie too far apart for the processor to guess the next one
      for (int64_t c = 0; c < n; c += 64 / (int64_t)sizeof(T)) __builtin_prefetch(from + ahead * stride + c);
    T* at = to + t * kPanel;
    int64_t p = 0;
    for (; p + whole <= n; p += kPanel, at += panel)
      CWFAST_UNROLL for (int64_t c = 0; c < kPanel; c += w) V::store(at + c, folded<V>(V::load(from + p + c), fold));
    for (; p < n; p += kPanel, at += panel) CWFAST_UNROLL for (int64_t c = 0; c < kPanel; c += w) {
        const int64_t most = kPanel - c < w ? kPanel - c : w, left = n - p - c;
        const int64_t real = left < 0 ? 0 : left < most ? left : most;
        V::store(at + c, folded<V>(V::load_n(from + p + c, (int)real), fold));
      }
  }
}

template <class V, int kPanel>
void pack(const typename V::Scalar* from, int64_t stride, int64_t depth, int64_t n, Fold fold, typename V::Scalar* to) {
  (fold == Fold::sum   ? pack_as<V, kPanel, Fold::sum>
   : fold == Fold::abs ? pack_as<V, kPanel, Fold::abs>
                       : pack_as<V, kPanel, Fold::square>)(from, stride, depth, n, to);
}

template <class V, int kRows, int kVectors>
constexpr TileKernel<typename V::Scalar> tile_kernel_of() {
  return {kRows,          kVectors * V::kWidth,         V::kWidth, Tile<V, kRows, kVectors>::step,
          pack<V, kRows>, pack<V, kVectors * V::kWidth>};
}

}  // namespace
}  // namespace cwfast
