// What the embedding kernel asks of rows: their order, and some of their entries as numbers that it can sum.
#pragma once
#include <type_traits>
#include <vector>

#include "cpu/numbers.h"
#include "embedding_saliency.h"

namespace cwfast {
namespace {

constexpr int kDigit = 16;  // bits sorted by at once

// `kept` rows in the order of their tokens, equal ones in the order they had. Work follows the rows, not the
// vocabulary.
std::vector<int64_t> sorted(std::vector<int64_t> kept, const int64_t* tokens, int64_t vocabulary) {
  std::vector<int64_t> next(kept.size());
  for (int shift = 0; shift < 63 && (vocabulary - 1) >> shift; shift += kDigit) {
    std::vector<int64_t> place((size_t{1} << kDigit) + 1);
    const auto digit = [&](int64_t row) { return (tokens[row] >> shift) & ((1 << kDigit) - 1); };
    for (int64_t row : kept) ++place[digit(row) + 1];
    for (size_t d = 1; d < place.size(); ++d) place[d] += place[d - 1];
    for (int64_t row : kept) next[place[digit(row)]++] = row;
    kept.swap(next);
  }
  return kept;
}

template <class In, class T>
void convert(const Strided& x, int64_t row, int64_t column, int64_t n, T* to) {
  const In* from = static_cast<const In*>(x.data) + row * x.row_stride + column * x.column_stride;
  if (x.column_stride == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(number(from[i]));
  else
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(number(from[i * x.column_stride]));
}

// Some entries of a row as T: where they lie, or converted into `buffer`.
template <class T>
const T* read(const Strided& x, int64_t row, int64_t column, int64_t n, T* buffer) {
  if (x.dtype == (std::is_same_v<T, float> ? Dtype::float32 : Dtype::float64) && x.column_stride == 1)
    return static_cast<const T*>(x.data) + row * x.row_stride + column;
  switch (x.dtype) {
    case Dtype::float32:
      convert<float>(x, row, column, n, buffer);
      break;
    case Dtype::float64:
      convert<double>(x, row, column, n, buffer);
      break;
    case Dtype::bfloat16:
      convert<Bfloat16>(x, row, column, n, buffer);
      break;
    case Dtype::float16:
      convert<Float16>(x, row, column, n, buffer);
      break;
  }
  return buffer;
}

// work(entry, i) for some entries of a row.
template <class T, class Work>
void change(const Written<T>& x, int64_t row, int64_t column, int64_t n, Work work) {
  T* at = x.data + row * x.row_stride + column * x.column_stride;
  if (x.column_stride == 1)
    for (int64_t i = 0; i < n; ++i) work(at[i], i);
  else
    for (int64_t i = 0; i < n; ++i) work(at[i * x.column_stride], i);
}

void fetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

void fetch(const Strided& x, int64_t row, int64_t column, int64_t n) {
  const int64_t size = x.dtype == Dtype::float64 ? 8 : x.dtype == Dtype::float32 ? 4 : 2;
  if (x.column_stride == 1) fetch(static_cast<const char*>(x.data) + (row * x.row_stride + column) * size, n * size);
}

}  // namespace
}  // namespace cwfast
