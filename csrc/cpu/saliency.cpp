// accumulate_saliency_ on the CPU: output tiles in cache, a loop over samples inside, folded by |.| or square.
// Reference: cwfast.reference.accumulate_saliency_. Called by cwfast/ops/saliency.py. Arithmetic: that of the weight
// gradient, plus one add per sample and weight. Where each sample is one row, sum_b |d a| is sum_b |d| |a|: one product
// of absolute values, and a second one for grad. Each entry of out is summed by one thread in sample order: the same
// bits for any number of threads.
#include "saliency.h"

#include <omp.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "cpu/saliency_step.h"
#include "runtime.h"

namespace cwfast {
namespace {

// Packing costs 1 / rows + 1 / columns of the products. With its panels a float tile takes 1.4 MB of a second-level
// cache.
constexpr int64_t kTileRows = 448, kTileColumns = 512;
// Rows packed at once, so that a panel stays in the first-level cache. Longer samples take several rounds, each summed
// by itself: rounding errors then grow with the root of their length.
constexpr int64_t kDepth = 128;
// Products below which waking other threads takes longer than computing alone.
constexpr int64_t kAlone = 1 << 20;

// Sixteen bytes by the compiler's own vectors: whatever the processor has.
template <class T>
struct Portable {
  using Scalar = T;
  static constexpr int kWidth = 16 / sizeof(T);
  typedef T Vec __attribute__((vector_size(16)));
  static Vec zero() { return Vec{}; }
  static Vec set(T x) { return x - Vec{}; }
  static Vec load(const T* p) { return load_n(p, kWidth); }
  static Vec load_n(const T* p, int n) {
    Vec v{};
    memcpy(&v, p, n * sizeof(T));
    return v;
  }
  static void store(T* p, Vec v) { memcpy(p, &v, sizeof v); }
  static void store_n(T* p, Vec v, int n) { memcpy(p, &v, n * sizeof(T)); }
  static Vec broadcast(const T* p) { return set(*p); }
  static Vec fma(Vec x, Vec y, Vec z) { return x * y + z; }
  static Vec add(Vec x, Vec y) { return x + y; }
  static Vec mul(Vec x, Vec y) { return x * y; }
  static Vec abs(Vec x) {
    for (int i = 0; i < kWidth; ++i) x[i] = __builtin_fabs(x[i]);
    return x;
  }
};

template <class T>
TileKernel<T> tile_kernel() {
#if defined(__x86_64__)
  constexpr bool single = std::is_same_v<T, float>;
  if constexpr (single) {
    if (isa() == Isa::avx512) return tile_avx512_float;
    if (isa() == Isa::avx2) return tile_avx2_float;
  } else {
    if (isa() == Isa::avx512) return tile_avx512_double;
    if (isa() == Isa::avx2) return tile_avx2_double;
  }
#endif
  return tile_kernel_of<Portable<T>, 4, 2>();
}

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t round_up(int64_t n, int64_t multiple) { return divide_up(n, multiple) * multiple; }

constexpr std::align_val_t kCacheLine{64};
struct Free {
  void operator()(void* p) const { ::operator delete(p, kCacheLine); }
};

// Rows that are packed at once: whole samples, or a part of a long one.
struct Round {
  int64_t begin, rows;     // in the batch
  int64_t first, samples;  // in Accumulator::ends_
  bool begins, complete;
};

// What one pass over the rows adds to.
template <class T>
struct Pass {
  Fold packed, folded;
  T* out;
  const T* factor;
  T* grad;
  T scale;
  bool new_out, new_grad;
};

template <class T>
class Accumulator {
 public:
  explicit Accumulator(const SaliencyArgs<T>& args) : x_(args), kernel_(tile_kernel<T>()) {
    tile_rows_ = round_up(std::min(kTileRows, x_.out_features), kernel_.rows);
    tile_columns_ = round_up(std::min(kTileColumns, x_.in_features), kernel_.columns);
    const int64_t rows = x_.samples == 0 ? 0 : x_.row_offsets[x_.samples];
    workers_ = rows < kAlone / (x_.out_features * x_.in_features) ? 1 : threads();
    // Small layers: smaller tiles, so that every thread has some.
    while (tiles() < 2 * workers_ && workers_ > 1 && tile_columns_ > 2 * kernel_.columns)
      tile_columns_ = round_up(tile_columns_ / 2, kernel_.columns);
    bool one_row_each = true;
    for (int64_t b = 0; b < x_.samples; ++b) one_row_each &= x_.row_offsets[b + 1] - x_.row_offsets[b] <= 1;
    const Fold fold = x_.power == 1 ? Fold::abs : Fold::square;
    const T scale = static_cast<T>(x_.scale);
    if (one_row_each) {
      add_sample(0, rows);
      passes_.push_back({fold, Fold::sum, x_.out, x_.factor, nullptr, scale, false, false});
      if (x_.grad) passes_.push_back({Fold::sum, Fold::sum, x_.grad, nullptr, nullptr, T{1}, x_.overwrite, false});
    } else {
      for (int64_t b = 0; b < x_.samples; ++b) add_sample(x_.row_offsets[b], x_.row_offsets[b + 1]);
      passes_.push_back({Fold::sum, fold, x_.out, x_.factor, x_.grad, scale, false, x_.overwrite});
    }
    if (rounds_.empty()) rounds_.push_back({0, 0, 0, 0, true, true});  // no rows: zeros are added
  }

  void run() {
    Region region;
#pragma omp parallel num_threads(workers_)
    {
      std::unique_ptr<T, Free> workspace;
      region.run([&] {
        workspace.reset(static_cast<T*>(::operator new(static_cast<size_t>(workspace_size()) * sizeof(T), kCacheLine)));
      });
#pragma omp for schedule(dynamic, 1)
      for (int64_t tile = 0; tile < tiles(); ++tile)
        for (const Pass<T>& pass : passes_) run_tile(tile, pass, workspace.get(), region);
    }
    region.finish();
  }

 private:
  int64_t tiles_across() const { return divide_up(x_.in_features, tile_columns_); }
  int64_t tiles() const { return divide_up(x_.out_features, tile_rows_) * tiles_across(); }
  int64_t tile_size() const { return tile_rows_ * tile_columns_; }
  int64_t panels_size(int64_t n, int64_t width) const { return n / width * panel_size(depth_, width, kernel_.spare); }
  int64_t workspace_size() const {
    return 3 * tile_size() + panels_size(tile_columns_, kernel_.columns) + panels_size(tile_rows_, kernel_.rows);
  }

  // Appends to the last round as long as it has room.
  void add_sample(int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t rows = std::min(kDepth, end - at);
      const bool whole = rows == end - begin;
      if (!whole || rounds_.empty() || !rounds_.back().complete || rounds_.back().rows + rows > kDepth)
        rounds_.push_back({at, 0, static_cast<int64_t>(ends_.size()), 0, at == begin, at + rows == end});
      Round& round = rounds_.back();
      round.rows += rows;
      round.samples += 1;
      ends_.push_back(round.rows);
      depth_ = std::max(depth_, round.rows);
      at += rows;
    }
  }

  void run_tile(int64_t tile, const Pass<T>& pass, T* workspace, Region& region) {
    const int64_t row = tile / tiles_across() * tile_rows_, column = tile % tiles_across() * tile_columns_;
    const int64_t rows = std::min(tile_rows_, x_.out_features - row);
    const int64_t columns = std::min(tile_columns_, x_.in_features - column);
    T *sum = workspace, *total = sum + tile_size(), *partial = total + tile_size();
    T *packed_a = partial + tile_size(), *packed_d = packed_a + panels_size(tile_columns_, kernel_.columns);
    for (size_t i = 0; i < rounds_.size(); ++i)
      region.run([&] {  // here too: one tile of a large batch, or of one long sample, may take seconds
        const Round& round = rounds_[i];
        const int64_t t = round.begin, n = round.rows;
        kernel_.pack_rows(x_.grad_outputs + t * x_.grad_stride + row, x_.grad_stride, n, rows, pass.packed, packed_d);
        kernel_.pack_columns(x_.inputs + t * x_.input_stride + column, x_.input_stride, n, columns, pass.packed,
                             packed_a);
        TileStep<T> step{};
        step.ends = ends_.data() + round.first, step.samples = round.samples;
        step.begins = round.begins, step.complete = round.complete, step.fresh = i == 0;
        step.fold = pass.folded, step.power = x_.power, step.scale = pass.scale, step.stride = x_.in_features;
        const bool last = i + 1 == rounds_.size();
        for (int64_t r = 0; r < rows; r += kernel_.rows)  // columns inside: the out that is written lies together
          for (int64_t c = 0; c < columns; c += kernel_.columns) {
            const int64_t mine = r * tile_columns_ + c * kernel_.rows, at = (row + r) * x_.in_features + column + c;
            step.d = packed_d + r / kernel_.rows * panel_size(n, kernel_.rows, kernel_.spare);
            step.a = packed_a + c / kernel_.columns * panel_size(n, kernel_.columns, kernel_.spare);
            step.partial = partial + mine, step.sum = sum + mine, step.total = pass.grad ? total + mine : nullptr;
            if (last) {
              step.out = pass.out + at, step.factor = pass.factor ? pass.factor + at : nullptr;
              step.grad = pass.grad ? pass.grad + at : nullptr;
              step.new_out = pass.new_out, step.new_grad = pass.new_grad;
              step.rows = std::min(kernel_.rows, rows - r), step.columns = std::min(kernel_.columns, columns - c);
            }
            kernel_.step(step);
          }
      });
  }

  const SaliencyArgs<T>& x_;
  const TileKernel<T> kernel_;
  int workers_ = 1;
  int64_t tile_rows_ = 0, tile_columns_ = 0;
  int64_t depth_ = 0;  // the most rows of a round
  std::vector<Round> rounds_;
  std::vector<int64_t> ends_;  // of samples, in their round
  std::vector<Pass<T>> passes_;
};

template <class T>
void accumulate(const SaliencyArgs<T>& args) {
  if (args.out_features > 0 && args.in_features > 0) Accumulator<T>(args).run();  // an empty layer has no tiles
}

}  // namespace

void accumulate_saliency(const SaliencyArgs<float>& args) { accumulate(args); }
void accumulate_saliency(const SaliencyArgs<double>& args) { accumulate(args); }

}  // namespace cwfast
