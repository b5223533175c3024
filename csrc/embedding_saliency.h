// out[v,d] += scale * |factor[v,d]|^power * sum_b |G_b[v,d]|^power,  G_b[v] = sum of grad_outputs[r] over the rows r of
// sample b with tokens[r] = v. One pass over the rows; nothing of the size of the vocabulary but what is written.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace cwfast {

struct Strided {  // a matrix that is read; strides in entries
  const void* data;
  Dtype dtype;
  int64_t row_stride, column_stride;
};

template <class T>
struct Written {  // a matrix that is changed
  T* data;
  int64_t row_stride, column_stride;
};

template <class T>
struct EmbeddingSaliencyArgs {
  Written<T> out;         // [vocabulary, columns]
  Written<T> grad;        // [vocabulary, columns], data may be null; += sum_b G_b
  bool overwrite;         // grad = sum_b G_b instead, whatever it holds
  const int64_t* owner;   // [rows] ascending: the sample of each row
  const int64_t* tokens;  // [rows], each in 0 .. vocabulary - 1
  Strided grad_outputs;   // [rows, columns]
  Strided factor;         // [vocabulary, columns], data may be null
  int64_t rows, vocabulary, columns;
  int64_t padding;  // rows of this token are left out; -1: none are
  int power;        // 1 or 2
  double scale;     // >= 0, applied to the sum
};

void accumulate_embedding_saliency(const EmbeddingSaliencyArgs<float>& args);
void accumulate_embedding_saliency(const EmbeddingSaliencyArgs<double>& args);

}  // namespace cwfast
