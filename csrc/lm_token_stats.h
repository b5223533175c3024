// Tiles of logits z = W h, made by a matrix product: what a tile adds to the sums of each token, and the gradients at
// its logits. Formulas: cwfast/ops/lm_token_stats.py and lm_token_kl.py; what is summed: cwfast/ops/_lm_token_parts.py.
// Traffic: each logit once, from a cache that holds the tile. T is float or double.
#pragma once
#include <cstdint>

namespace cwfast {

constexpr int64_t kTileColumns = 2048;  // at most; a tile's rows lie a multiple of 16 entries apart

template <class T>
struct LmTile {
  T* logits;  // [rows, stride], 64-byte aligned, stride a multiple of 16 and at least columns; overwritten
  int64_t rows, columns, stride;
  const T* bias;          // [stride], aligned, or null; z = softcap * tanh(scale * (logits + bias) / softcap)
  double scale, softcap;  // softcap 0: none
};

// bias, scale and softcap, in place; the other functions begin with it.
template <class T>
void lm_transform(const LmTile<T>& tile);

// Parts of cwfast/ops/_lm_token_parts.py, row r of each at [r].
template <class T>
struct LmParts {
  double *peak, *tops, *rest, *slope, *spread;
  int64_t *above, *top;
  T* values;         // [rows, topk]
  int64_t* indices;  // [rows, topk]
  int64_t topk;
};

// Merges the tile into the parts. Column c is token first + c; a target's logit replaces the tile's.
template <class T>
void lm_stats_tile(const LmTile<T>& tile, int64_t first, const int64_t* targets, const T* target_logits,
                   const LmParts<T>& parts);

// Of a model (z) and its reference (r), row i of each at [i].
struct LmDivergence {
  double *peak, *sum;          // of z; sum of e^(z - peak)
  double *ref_peak, *ref_sum;  // of r
  double* gap;                 // sum of e^(r - ref_peak) (r - z)
};

template <class T>
void lm_kl_tile(const LmTile<T>& model, const LmTile<T>& reference, const LmDivergence& sums);

// Overwrite the logits by the gradients of sum_i grad[i] log p_i[target], or sum_i grad[i] KL_i, at them before scale
// and bias. sums [rows, 2]: each logsumexp as rounded, and what that lost.
template <class T>
void lm_logprob_grad_tile(const LmTile<T>& tile, const T* sums, int64_t first, const int64_t* targets, const T* grad);

template <class T>
void lm_kl_grad_tile(const LmTile<T>& model, const T* sums, const LmTile<T>& reference, const T* ref_sums,
                     const T* grad);

}  // namespace cwfast
