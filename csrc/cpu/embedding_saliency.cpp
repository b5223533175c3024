// accumulate_embedding_saliency_ on the CPU. Reference: cwfast.reference.accumulate_embedding_saliency_. Called by
// cwfast/ops/embedding_saliency.py. Moves each row of grad_outputs once, and out, factor and grad of the tokens that
// occur: memory is the limit, so that the compiler's vectors of any processor do. Rows are sorted by (token, sample);
// each entry of out and grad is summed by one thread in the order of the rows: the same bits for any number of threads.
#include "embedding_saliency.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/embedding_rows.h"
#include "runtime.h"

namespace cwfast {
namespace {

constexpr int64_t kBlock = 256;      // columns summed at once: the sums stay in the first-level cache
constexpr int64_t kNarrow = 64;      // of a token whose rows alone are a chunk: threads share its columns
constexpr int64_t kWork = 1 << 16;   // entries of a chunk: well below a millisecond
constexpr int64_t kAlone = 1 << 15;  // entries below which waking other threads takes longer
constexpr int kAhead = 4;            // rows that are fetched before they are needed

struct Chunk {  // these columns of these rows of the vocabulary
  int64_t begin, end, first_column, last_column;
};

template <class T>
class Embedding {
 public:
  explicit Embedding(const EmbeddingSaliencyArgs<T>& args) : x_(args) {
    std::vector<int64_t> kept;
    kept.reserve(x_.rows);
    for (int64_t row = 0; row < x_.rows; ++row)
      if (x_.tokens[row] != x_.padding) kept.push_back(row);
    order_ = sorted(std::move(kept), x_.tokens, x_.vocabulary);
    for (size_t i = 0; i < order_.size(); ++i)
      if (i == 0 || token(i) != token(i - 1)) firsts_.push_back(i);
    firsts_.push_back(order_.size());
    cut();
  }

  void run() {
    const int64_t entries = (x_.overwrite && x_.grad.data ? x_.vocabulary : (int64_t)order_.size()) * x_.columns;
    Region region;
#pragma omp parallel for schedule(dynamic) num_threads(entries < kAlone ? 1 : threads())
    for (int64_t i = 0; i < (int64_t)chunks_.size(); ++i) region.run([&] { add(chunks_[i]); });
    region.finish();
  }

 private:
  int64_t token(int64_t i) const { return x_.tokens[order_[i]]; }
  int64_t found() const { return static_cast<int64_t>(firsts_.size()) - 1; }

  // Chunks of about as many rows each; columns of a frequent token apart.
  void cut() {
    const int64_t most = std::max<int64_t>(1, kWork / x_.columns);  // rows
    int64_t begin = 0, rows = 0;
    const auto close = [&](int64_t end) {
      for (; begin < end; begin += most) chunks_.push_back({begin, std::min(begin + most, end), 0, x_.columns});
      begin = end, rows = 0;
    };
    for (int64_t i = 0; i < found(); ++i) {
      const int64_t v = token(firsts_[i]), here = firsts_[i + 1] - firsts_[i];
      if (rows + here > most) close(v);
      rows += here;
      if (here <= most) continue;
      for (int64_t c = 0; c < x_.columns; c += kNarrow)
        chunks_.push_back({v, v + 1, c, std::min(c + kNarrow, x_.columns)});
      begin = v + 1, rows = 0;
    }
    close(x_.vocabulary);
  }

  void add(const Chunk& chunk) const {
    if (x_.overwrite && x_.grad.data) clear(chunk);
    const auto before = [&](int64_t first, int64_t v) { return token(first) < v; };
    auto first = std::lower_bound(firsts_.begin(), firsts_.end() - 1, chunk.begin, before);
    for (int64_t i = first - firsts_.begin(); i < found() && token(firsts_[i]) < chunk.end; ++i)
      for (int64_t c = chunk.first_column; c < chunk.last_column; c += kBlock)
        add_token(i, c, std::min(kBlock, chunk.last_column - c));
  }

  void clear(const Chunk& chunk) const {
    const Written<T>& grad = x_.grad;
    const int64_t rows = chunk.end - chunk.begin, n = chunk.last_column - chunk.first_column;
    if (grad.column_stride == 1 && grad.row_stride == n) {
      std::memset(grad.data + chunk.begin * n, 0, static_cast<size_t>(rows * n) * sizeof(T));
      return;
    }
    for (int64_t v = chunk.begin; v < chunk.end; ++v)
      change(grad, v, chunk.first_column, n, [](T& entry, int64_t) { entry = 0; });
  }

  void add_token(int64_t which, int64_t column, int64_t n) const {
    alignas(64) T total[kBlock], sum[kBlock], buffer[kBlock], sample[kBlock];
    const int64_t end = firsts_[which + 1], v = token(firsts_[which]);
    std::fill(total, total + n, T{0});
    if (x_.grad.data) std::fill(sum, sum + n, T{0});
    for (int64_t at = firsts_[which]; at < end;) {
      const int64_t owner = x_.owner[order_[at]];
      const T* g = rows_at(at, column, n, buffer);
      if (++at < end && x_.owner[order_[at]] == owner) {
        std::copy(g, g + n, sample);
        for (; at < end && x_.owner[order_[at]] == owner; ++at) {
          const T* more = rows_at(at, column, n, buffer);
          for (int64_t i = 0; i < n; ++i) sample[i] += more[i];
        }
        g = sample;
      }
      if (x_.power == 1)
        for (int64_t i = 0; i < n; ++i) total[i] += std::fabs(g[i]);
      else
        for (int64_t i = 0; i < n; ++i) total[i] += g[i] * g[i];
      if (x_.grad.data)
        for (int64_t i = 0; i < n; ++i) sum[i] += g[i];
    }
    if (x_.factor.data) {
      const T* factor = read(x_.factor, v, column, n, buffer);
      if (x_.power == 1)
        for (int64_t i = 0; i < n; ++i) total[i] *= std::fabs(factor[i]);
      else
        for (int64_t i = 0; i < n; ++i) total[i] *= factor[i] * factor[i];
    }
    const T scale = static_cast<T>(x_.scale);
    change(x_.out, v, column, n, [&](T& entry, int64_t i) { entry += scale * total[i]; });
    if (x_.grad.data) change(x_.grad, v, column, n, [&](T& entry, int64_t i) { entry += sum[i]; });
  }

  // Row `at` of the order; rows lie too far apart for the processor to guess the next one.
  const T* rows_at(int64_t at, int64_t column, int64_t n, T* buffer) const {
    if (at + kAhead < (int64_t)order_.size()) {
      const int64_t v = token(at + kAhead);
      fetch(x_.grad_outputs, order_[at + kAhead], column, n);
      if (v != token(at + kAhead - 1)) {
        if (x_.factor.data) fetch(x_.factor, v, column, n);
        if (x_.out.column_stride == 1)
          fetch(reinterpret_cast<const char*>(x_.out.data + v * x_.out.row_stride + column), n * (int64_t)sizeof(T));
      }
    }
    return read(x_.grad_outputs, order_[at], column, n, buffer);
  }

  EmbeddingSaliencyArgs<T> x_;
  std::vector<int64_t> order_;   // rows by (token, sample), padding left out
  std::vector<int64_t> firsts_;  // where in order_ the rows of each token that occurs begin, and the end
  std::vector<Chunk> chunks_;
};

template <class T>
void accumulate(const EmbeddingSaliencyArgs<T>& args) {
  if (args.vocabulary && args.columns) Embedding<T>(args).run();
}

}  // namespace

void accumulate_embedding_saliency(const EmbeddingSaliencyArgs<float>& args) { accumulate(args); }
void accumulate_embedding_saliency(const EmbeddingSaliencyArgs<double>& args) { accumulate(args); }

}  // namespace cwfast
