// What the saliency kernel asks of an instruction set: packing panels, and the micro-tile. Plain C inside (see
// select_scan.h).
#pragma once
#include <stdint.h>

namespace cwfast {

enum class Fold { sum, abs, square };  // what is added of a sample's gradient, or of an entry that is packed

// One [rows, columns] micro-tile over the packed rows of several samples. First sums G = D^T A per sample into
// registers and folds it; then, unless out is null, adds the sums to the layer's weights that they belong to.
template <class T>
struct TileStep {
  const T *d, *a;                 // panels [depth, rows] and [depth, columns]
  const int64_t* ends;            // [samples] the packed rows' ends, each behind the one before
  int64_t samples;                //
  bool begins, complete;          // whether the first one has its first row here, and the last one its last
  bool fresh;                     // sum and total hold nothing yet
  Fold fold;                      //
  T *partial, *sum, *total;       // [rows, columns] of this micro-tile; partial: of a sample that is not complete;
                                  // total: sum of G, or null
  T* out;                         // += scale * |factor|^power * sum, rows `stride` apart
  const T* factor;                // or null
  T* grad;                        // += total, where not null
  bool new_out, new_grad;         // 0 instead of what out or grad holds
  int64_t stride, rows, columns;  // the part of the micro-tile that lies within the layer
  int power;
  T scale;
};

// Entries from one panel to the next: `spare` behind each may be written to.
static inline int64_t panel_size(int64_t depth, int64_t width, int64_t spare) { return depth * width + spare; }

template <class T>
struct TileKernel {
  int64_t rows, columns, spare;  // of a micro-tile; entries behind the last panel that packing may write to
  void (*step)(const TileStep<T>& step);
  // [depth, n], rows `stride` apart -> panels [depth, rows] (or columns), zero-padded, entries folded.
  void (*pack_rows)(const T* from, int64_t stride, int64_t depth, int64_t n, Fold fold, T* to);
  void (*pack_columns)(const T* from, int64_t stride, int64_t depth, int64_t n, Fold fold, T* to);
};

extern const TileKernel<float> tile_avx2_float;
extern const TileKernel<double> tile_avx2_double;
extern const TileKernel<float> tile_avx512_float;
extern const TileKernel<double> tile_avx512_double;

}  // namespace cwfast
