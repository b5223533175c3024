// accumulate_saliency_ on the CPU: output tiles in cache, a loop over samples inside, folded by |.| or square.
// Reference: cwfast.reference.accumulate_saliency_. Called by cwfast/ops/saliency.py for sequences (T > 1; T = 1 is one
// GEMM there). Arithmetic: that of the weight gradient, plus one add per sample and weight. Each entry of out is summed
// by one thread in sample order: the same bits for any number of threads.
#include "saliency.h"

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "cpu/saliency_tile.h"
#include "runtime.h"

namespace cwfast {
namespace {

constexpr int64_t kTileRows = 96, kTileColumns = 256;  // three float tiles of 96 KB and the panels: second-level cache
constexpr int64_t kDepth = 256;  // rows packed at once; longer samples take several rounds, each summed by itself

template <class T>
void step_scalar(const TileStep<T>& s) {
  constexpr int rows = 4, columns = 8;
  T g[rows][columns] = {};
  for (int64_t t = 0; t < s.depth; ++t)
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; ++c) g[r][c] += s.d[t * rows + r] * s.a[t * columns + c];
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) {
      const int64_t at = r * s.stride + c;
      const T value = s.first ? g[r][c] : s.partial[at] + g[r][c];
      if (!s.last) {
        s.partial[at] = value;
        continue;
      }
      s.sum[at] += s.power == 1 ? std::abs(value) : value * value;
      if (s.total) s.total[at] += value;
    }
}

template <class T>
TileKernel<T> tile_kernel() {
#if defined(__x86_64__)
  if (isa() == Isa::avx2) {
    if constexpr (std::is_same_v<T, float>)
      return tile_avx2_float;
    else
      return tile_avx2_double;
  }
#endif
  return {4, 8, step_scalar<T>};
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// [depth, n] with row stride -> panels of `width` columns, each [depth, width], zero-padded.
template <class T>
void pack(const T* from, int64_t stride, int64_t depth, int64_t n, int64_t width, T* to) {
  for (int64_t p = 0; p < n; p += width, to += depth * width) {
    const int64_t real = std::min(width, n - p);
    for (int64_t t = 0; t < depth; ++t) {
      const T* row = from + t * stride + p;
      std::copy(row, row + real, to + t * width);
      std::fill(to + t * width + real, to + (t + 1) * width, T{0});
    }
  }
}

template <class T>
class Accumulator {
 public:
  explicit Accumulator(const SaliencyArgs<T>& args) : x_(args), kernel_(tile_kernel<T>()) {
    tile_rows_ = round_up(std::min(kTileRows, x_.out_features), kernel_.rows);
    tile_columns_ = round_up(std::min(kTileColumns, x_.in_features), kernel_.columns);
    // Small layers: smaller tiles, so that every thread has some.
    while (tiles() < 2 * threads() && tile_columns_ > 2 * kernel_.columns)
      tile_columns_ = round_up(tile_columns_ / 2, kernel_.columns);
    for (int64_t b = 0; b < x_.samples; ++b) longest_ = std::max(longest_, x_.row_offsets[b + 1] - x_.row_offsets[b]);
  }

  void run() {
    Region region;
#pragma omp parallel num_threads(threads())
    {
      std::vector<T> workspace;
      region.run([&] { workspace.resize(static_cast<size_t>(workspace_size())); });
#pragma omp for schedule(dynamic, 1)
      for (int64_t tile = 0; tile < tiles(); ++tile)
        region.run([&, tile] { run_tile(tile, workspace.data(), region); });
    }
    region.finish();
  }

 private:
  int64_t tiles_across() const { return (x_.in_features + tile_columns_ - 1) / tile_columns_; }
  int64_t tiles() const { return (x_.out_features + tile_rows_ - 1) / tile_rows_ * tiles_across(); }
  int64_t depth() const { return std::min(kDepth, longest_); }
  int64_t tile_size() const { return tile_rows_ * tile_columns_; }
  int64_t workspace_size() const { return 3 * tile_size() + depth() * (tile_rows_ + tile_columns_); }

  void run_tile(int64_t tile, T* workspace, Region& region) {
    const int64_t row = tile / tiles_across() * tile_rows_, column = tile % tiles_across() * tile_columns_;
    const int64_t rows = std::min(tile_rows_, x_.out_features - row);
    const int64_t columns = std::min(tile_columns_, x_.in_features - column);
    T *sum = workspace, *total = sum + tile_size(), *partial = total + tile_size();
    T *packed_d = partial + tile_size(), *packed_a = packed_d + depth() * tile_rows_;
    std::fill(sum, partial, T{0});
    for (int64_t b = 0; b < x_.samples; ++b) {
      const int64_t begin = x_.row_offsets[b], end = x_.row_offsets[b + 1];
      for (int64_t t = begin; t < end; t += kDepth)
        region.run([&] {  // here too: one tile of a large batch, or of one long sample, may take seconds
          const int64_t n = std::min(kDepth, end - t);
          pack(x_.grad_outputs + t * x_.grad_stride + row, x_.grad_stride, n, rows, kernel_.rows, packed_d);
          pack(x_.inputs + t * x_.input_stride + column, x_.input_stride, n, columns, kernel_.columns, packed_a);
          TileStep<T> step{n,       nullptr,       nullptr,    nullptr,      nullptr,
                           nullptr, tile_columns_, t == begin, t + n == end, x_.power};
          for (int64_t c = 0; c < columns; c += kernel_.columns)
            for (int64_t r = 0; r < rows; r += kernel_.rows) {
              const int64_t at = r * tile_columns_ + c;
              step.d = packed_d + r * n, step.a = packed_a + c * n;
              step.partial = partial + at, step.sum = sum + at, step.total = x_.grad ? total + at : nullptr;
              kernel_.step(step);
            }
        });
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (row + r) * x_.in_features + column;
      write_row(sum + r * tile_columns_, total + r * tile_columns_, at, columns);
    }
  }

  void write_row(const T* sum, const T* total, int64_t at, int64_t columns) {
    const T scale = static_cast<T>(x_.scale);
    for (int64_t c = 0; c < columns; ++c) {
      T value = sum[c] * scale;
      if (x_.factor) value *= x_.power == 1 ? std::abs(x_.factor[at + c]) : x_.factor[at + c] * x_.factor[at + c];
      x_.out[at + c] += value;
    }
    if (!x_.grad) return;
    for (int64_t c = 0; c < columns; ++c) x_.grad[at + c] += total[c];
  }

  const SaliencyArgs<T>& x_;
  const TileKernel<T> kernel_;
  int64_t tile_rows_ = 0, tile_columns_ = 0, longest_ = 0;
};

template <class T>
void accumulate(const SaliencyArgs<T>& args) {
  if (args.out_features > 0 && args.in_features > 0) Accumulator<T>(args).run();  // an empty layer has no tiles
}

}  // namespace

void accumulate_saliency(const SaliencyArgs<float>& args) { accumulate(args); }
void accumulate_saliency(const SaliencyArgs<double>& args) { accumulate(args); }

}  // namespace cwfast
