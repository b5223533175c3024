// The innermost loop of the saliency kernel, one per instruction set. Plain C inside (see select_scan.h).
#pragma once
#include <stdint.h>

namespace cwfast {

// One [rows, columns] micro-tile of G += D^T A over `depth` rows of packed panels:
//   d [depth, rows], a [depth, columns], partial and sum tiles [rows, columns] with row stride `stride`.
// Unless first, the rows before left their sum in `partial`, which is added at the end: rounding errors then grow with
// the root of a sample's length. last: sum += |G| or G^2 (and total += G where not null), else partial = G.
template <class T>
struct TileStep {
  int64_t depth;
  const T *d, *a;
  T *partial, *sum, *total;
  int64_t stride;
  bool first, last;
  int power;
};

template <class T>
struct TileKernel {
  int rows, columns;  // of a micro-tile
  void (*step)(const TileStep<T>& step);
};

extern const TileKernel<float> tile_avx2_float;
extern const TileKernel<double> tile_avx2_double;

}  // namespace cwfast
