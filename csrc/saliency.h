// out[o,i] += scale * |factor[o,i]|^power * sum_b |G_b[o,i]|^power,  G_b = sum of grad_outputs[r,o] * inputs[r,i]
// over the rows r of sample b. One pass; no [samples, O, I] exists.
#pragma once
#include <cstdint>
#include <vector>

namespace cwfast {

template <class T>
struct SaliencyArgs {
  T* out;                 // [O, I] contiguous
  const T* inputs;        // [rows, I], rows input_stride apart
  const T* grad_outputs;  // [rows, O], rows grad_stride apart
  int64_t input_stride, grad_stride;
  const int64_t* row_offsets;  // [samples + 1] ascending: sample b owns rows row_offsets[b] .. row_offsets[b + 1]
  int64_t samples, out_features, in_features;
  int power;        // 1 or 2
  double scale;     // >= 0, applied to the sum
  const T* factor;  // [O, I] contiguous, or null
  T* grad;          // [O, I] contiguous, or null; += sum_b G_b
  bool overwrite;   // grad = sum_b G_b instead, whatever it holds
};

void accumulate_saliency(const SaliencyArgs<float>& args);
void accumulate_saliency(const SaliencyArgs<double>& args);

}  // namespace cwfast
