// The CUDA kernels as bindings.cpp and the tests see them: raw pointers to device memory, checked by cwfast/ops.
// Every launcher returns a cudaError_t (0: launched) and does not wait for the kernel.
#pragma once
#include <cstdint>

extern "C" {

enum CwfastDtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3 };  // the last: embeddings alone

// Devices that this process can use; an error (35: no driver) where there are none.
int cwfast_cuda_device_count(int* count);
const char* cwfast_cuda_error(int error);

// out += scale * |factor|^power * sum_b |G_b|^power, grad += sum_b G_b; see csrc/saliency.h.
int cwfast_cuda_saliency(float* out,                                     // [O, I]
                         const void* inputs, int64_t input_stride,       // [rows, I] of dtype, rows input_stride apart
                         const void* grad_outputs, int64_t grad_stride,  // [rows, O] of dtype, rows grad_stride apart
                         const int64_t* row_offsets,                     // [samples + 1]; null: every row is a sample
                         int64_t samples, int64_t rows, int64_t out_features, int64_t in_features, int dtype, int power,
                         float scale, const void* factor, int factor_dtype,  // [O, I] contiguous, or null
                         float* grad,                                        // [O, I], or null
                         int device, void* stream);

// Up to 64K entries of one score tensor; `start` is a multiple of 64.
struct CwfastChunk {
  const void* data;  // [numel] of the whole tensor
  uint32_t* bits;    // [(numel + 63) / 64 * 2] of the whole tensor, written
  int64_t start, length, tensor;
};

// The k largest of all chunks' entries, ties to the first; see csrc/select.h. chunks are in (tensor, start) order.
int cwfast_cuda_select_topk(const CwfastChunk* chunks, int64_t chunk_count, int dtype, int abs,
                            int64_t* state,       // [2]: k and 0; then ties to take and key of the threshold
                            uint64_t* histogram,  // [2048] zero, and left zero
                            int64_t* ties,        // [chunk_count + 1]
                            int64_t* tallies,     // [tensors, 3] zero; += selected, NaN, negative entries
                            int device, void* stream);

// Where the entries of a tensor lie.
struct CwfastView {
  void* data;
  int64_t dims;    // 0: contiguous; -1: compact, only the selected entries, in flat order; else of the layout
  int64_t layout;  // where its (size, stride) pairs begin among `layouts`, the innermost dimension first
};

// A tensor and its selected entries; one row of the table that cwfast/ops/_rewind_device.py builds.
struct CwfastSelected {
  int64_t first;  // blocks of 64K entries of the tensors before it; each has at least one, which may be empty
  int64_t numel;
  const void* picks;      // packed bits, uint32 [(numel + 63) / 64 * 2], or positions in a list's blocks, uint16 [k]
  const int64_t* offset;  // [blocks + 1] of a list: where each block's positions begin; null: packed bits
  int64_t k;
  const int64_t* ranks;  // [8 blocks] bits before each slice of 8192 entries, but for a constant; null: not needed
  CwfastView target, source;
};

enum CwfastWrongPicks { kWrongPadding = 1, kWrongEnds = 2, kWrongOffsets = 4, kWrongPositions = 8 };

// blocks: of all tensors together. counts [blocks, 8]: bits set in each slice; wrong [tensors]: |= CwfastWrongPicks.
int cwfast_cuda_rewind_survey(const CwfastSelected* tensors, int64_t tensor_count, int64_t blocks, int64_t* counts,
                              int* wrong, int device, void* stream);

// target[i] = source[i] for the selected entries, of item_size bytes (1, 2, 4 or 8); the picks were surveyed.
int cwfast_cuda_rewind_move(const CwfastSelected* tensors, int64_t tensor_count, int64_t blocks, const int64_t* layouts,
                            int item_size, int device, void* stream);

struct CwfastMatrix {
  void* data;                         // null: there is none
  int64_t dtype;                      // CwfastDtype
  int64_t row_stride, column_stride;  // in entries
};

// out and grad [V, D] of float32 or float64, changed; grad_outputs [rows, D]; factor [V, D].
// Rows in the order of (token, sample), those that are left out apart: n of them. Each token that occurs is cut into
// pieces of piece_rows rows, the last one shorter.
struct CwfastEmbedding {
  CwfastMatrix out, grad, grad_outputs, factor;
  CwfastMatrix partial;         // [4 slots, D] of out's dtype, written
  const int64_t* order;         // [n] rows of grad_outputs
  const int64_t* samples;       // [n] whose they are
  const int64_t* tokens;        // [tokens] that occur
  const int64_t* firsts;        // [tokens + 1] where in order the rows of each begin
  const int64_t* first_pieces;  // [tokens + 1] pieces of the tokens before
  const int64_t* piece_tokens;  // [pieces] which of tokens each belongs to
  const int64_t* cut;           // [cut_count] which of tokens have more than one piece
  const int64_t* slots;         // [tokens] pieces of such tokens before
  int64_t pieces, cut_count, piece_rows, columns, power;
  double scale;  // applied to the sum
};

// out += scale * |factor|^power * sum_b |G_b|^power, grad += sum_b G_b by token; see csrc/embedding_saliency.h.
int cwfast_cuda_embedding_saliency(const CwfastEmbedding* embedding, int device, void* stream);

// What cwfast_cuda_lm_tokens does.
enum CwfastLmTask { kLmTarget = 0, kLmStats = 1, kLmKl = 2, kLmLogits = 3, kLmLogprobGrad = 4, kLmKlGrad = 5 };

struct CwfastLmHead {
  const void *hidden, *weight;           // [tokens, width], [words, width]; entries of a row are adjacent
  const float* bias;                     // [words], or null
  int64_t hidden_stride, weight_stride;  // between rows, in entries
  int64_t width;
};

// z = softcap(scale * (hidden weight^T + bias)) of the words, a part of the vocabulary. What a task does not need is 0.
struct CwfastLmTokens {
  CwfastLmHead model, reference;
  int64_t tokens, words, dtype;  // dtype: of hidden and weight, not float64
  double scale, softcap;         // softcap 0: none
  const int64_t* targets;        // [tokens] relative to the first word; may lie outside of them
  float* logit;                  // [tokens] of the targets: kLmTarget writes those that are among the words
  int64_t chunks, chunk;         // words of a chunk, a multiple of 128
  float* partial;     // kLmStats [5, 2 chunks, tokens]: peak, tops, rest, mean, spread; kLmKl: both peaks and sums, gap
  int* counts;        // kLmStats [2, 2 chunks, tokens]: logits above the target's, first index of the largest
  void* out;          // [tokens, words]: float32 for kLmLogits, of dtype for gradients at hidden weight^T + bias
  const float* grad;  // [tokens], of the loss at logprob or KL
  const float *logsumexp, *ref_logsumexp;  // [tokens, 2]: rounded, and what rounding lost
};

int cwfast_cuda_lm_tokens(int what, const CwfastLmTokens* tokens, int device, void* stream);
}
