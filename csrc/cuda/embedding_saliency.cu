// out[v,d] += scale * |factor[v,d]|^power * sum_b |G_b[v,d]|^power,  grad[v,d] += sum_b G_b[v,d],
// G_b[v] = sum of grad_outputs[r] over the rows r of sample b with token v.
// Reference: cwfast/reference.py, accumulate_embedding_saliency_; called by cwfast/ops/_embedding_device.py.
// Bytes: each row of grad_outputs once; out and grad twice and the factor once, of the tokens that occur; 16 a row of
// order and samples for each 512 bytes (float32) of it; for tokens cut into pieces 32 * D a piece (float32).
// Rows come sorted by (token, sample). A token's are cut into pieces of at most piece_rows, so that one token with
// most of the rows keeps a whole GPU busy; few lanes of a warp walk a piece in order, 4 columns each: no atomics, no
// shared memory, the same bits on every run. The longest walks are piece_rows rows, then a token's pieces.
// Not yet run on a GPU: compiled for sm_80 and sm_90 (docs/gates-cuda.md), run on the CPU by
// tests/test_cuda_embedding_saliency.py.
#include "common/device.h"
#include "cuda/launchers.h"

namespace cwfast {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 4;     // of a thread: 16 bytes of float32 at once
constexpr int kMostLanes = 32;  // that share a piece: neighbours in a warp read neighbouring columns
enum Kind { kHead, kTotal, kTail, kSum, kKinds };

// Rows whose loads are under way before the first is added: 64 bytes a thread, whatever the type.
template <class In>
constexpr int kAtOnce = 64 / (kColumns * static_cast<int>(sizeof(In)));

template <class T>
struct alignas(kColumns * sizeof(T)) Quad {
  T element[kColumns];
};

struct Matrix {
  void* data;
  int64_t row_stride, column_stride;  // in entries
  int dtype;
  bool quads;  // four columns from a multiple of four on are one aligned load
};

struct Args {
  Matrix out, grad, grad_outputs, factor, partial;
  const int64_t *order, *samples, *tokens, *firsts, *first_pieces, *piece_tokens, *cut, *slots;  // see launchers.h
  int64_t pieces, cut_count, piece_rows, columns;
  unsigned tiles;  // across the columns
  int lanes;       // of a tile, as a power of two
  int power;
  double scale;
};

struct Place {  // what a thread works on: columns `column` to column + count of an item, none if count is 0
  int64_t item, column;
  int count;
};

__device__ __forceinline__ Place place_of(const Args& args, int64_t items) {
  const unsigned tile = blockIdx.x % args.tiles, block = blockIdx.x / args.tiles;
  const unsigned in_tile = threadIdx.x & ((1u << args.lanes) - 1), in_block = threadIdx.x >> args.lanes;
  const int64_t item = int64_t{block} * (kThreads >> args.lanes) + in_block;
  const int64_t column = ((int64_t{tile} << args.lanes) + in_tile) * kColumns, left = args.columns - column;
  if (item >= items || left <= 0) return {item, column, 0};
  return {item, column, static_cast<int>(left < kColumns ? left : kColumns)};
}

// The rows of piece `piece` of token number `which`, as positions in order.
struct Rows {
  int64_t begin, end;
};

__device__ __forceinline__ Rows rows_of(const Args& args, int64_t which, int64_t piece) {
  const int64_t begin = args.firsts[which] + (piece - args.first_pieces[which]) * args.piece_rows;
  const int64_t end = begin + args.piece_rows, last = args.firsts[which + 1];
  return {begin, end < last ? end : last};
}

template <class T, class In>
__device__ __forceinline__ T number(In x) {
  if constexpr (std::is_arithmetic_v<In>)
    return static_cast<T>(x);
  else
    return static_cast<T>(to_float(x));
}

template <class T>
__device__ __forceinline__ T powered(T x, int power) {
  if constexpr (std::is_same_v<T, float>)
    return power == 1 ? fabsf(x) : x * x;
  else
    return power == 1 ? fabs(x) : x * x;
}

template <class In>
__device__ __forceinline__ In* address(const Matrix& x, int64_t row, int64_t column) {
  return static_cast<In*>(x.data) + row * x.row_stride + column * x.column_stride;
}

template <bool kQuads, class In>
__device__ __forceinline__ Quad<In> load(const Matrix& x, int64_t row, const Place& at) {
  const In* const from = address<In>(x, row, at.column);
  if constexpr (kQuads) {
    return *reinterpret_cast<const Quad<In>*>(from);
  } else {
    Quad<In> quad;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) quad.element[c] = c < at.count ? from[c * x.column_stride] : In(0.0f);
    return quad;
  }
}

template <class T, class In>
__device__ __forceinline__ Quad<T> read(const Matrix& x, int64_t row, const Place& at) {
  const Quad<In> quad = x.quads && at.count == kColumns ? load<true, In>(x, row, at) : load<false, In>(x, row, at);
  Quad<T> numbers;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) numbers.element[c] = number<T>(quad.element[c]);
  return numbers;
}

template <class T>
__device__ __forceinline__ void write(const Matrix& x, int64_t row, const Place& at, const Quad<T>& quad) {
  T* const to = address<T>(x, row, at.column);
  if (x.quads && at.count == kColumns) {
    *reinterpret_cast<Quad<T>*>(to) = quad;
  } else {
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (c < at.count) to[c * x.column_stride] = quad.element[c];
  }
}

template <class T>
__device__ __forceinline__ void add(Quad<T>& to, const Quad<T>& more) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c) to.element[c] += more.element[c];
}

template <class T>
__device__ __forceinline__ void add_powered(Quad<T>& to, const Quad<T>& more, int power) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c) to.element[c] += powered(more.element[c], power);
}

// What a piece gives. Its first and last samples may reach into the pieces beside it.
template <class T>
struct Sums {
  Quad<T> head = {};   // sum of the rows of its first sample
  Quad<T> total = {};  // sum of |G_b|^power over the samples between the first and the last
  Quad<T> tail = {};   // sum of the rows of its last sample; 0 if that is the first
  Quad<T> sum = {};    // of all rows
};

template <bool kQuads, class T, class In>
__device__ __forceinline__ Sums<T> walk(const Args& args, const Rows& rows, const Place& at) {
  Sums<T> sums;
  Quad<T> sample = {};
  int64_t owner = args.samples[rows.begin];
  bool first = true;
  for (int64_t begin = rows.begin; begin < rows.end; begin += kAtOnce<In>) {
    Quad<In> row[kAtOnce<In>];
    unsigned next = 0;  // bit u: row u is of another sample than the one before
#pragma unroll
    for (int u = 0; u < kAtOnce<In>; ++u) {
      if (begin + u >= rows.end) continue;
      row[u] = load<kQuads, In>(args.grad_outputs, args.order[begin + u], at);
      const int64_t mine = args.samples[begin + u];
      next |= static_cast<unsigned>(mine != owner) << u;
      owner = mine;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce<In>; ++u) {
      if (begin + u >= rows.end) continue;
      if (next >> u & 1) {
        add(sums.sum, sample);
        if (first)
          sums.head = sample;
        else
          add_powered(sums.total, sample, args.power);
        sample = {};
        first = false;
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sample.element[c] += number<T>(row[u].element[c]);
    }
  }
  add(sums.sum, sample);
  if (first)
    sums.head = sample;
  else
    sums.tail = sample;
  return sums;
}

template <class T>
__device__ __forceinline__ Quad<T> factor_at(const Args& args, int64_t token, const Place& at) {
  switch (args.factor.dtype) {
    case kFloat32:
      return read<T, float>(args.factor, token, at);
    case kBfloat16:
      return read<T, __nv_bfloat16>(args.factor, token, at);
    case kFloat16:
      return read<T, __half>(args.factor, token, at);
    default:
      return read<T, double>(args.factor, token, at);
  }
}

// Adds what all samples of a token gave.
template <class T>
__device__ __forceinline__ void finish(const Args& args, int64_t which, const Place& at, Quad<T> total,
                                       const Quad<T>& sum) {
  const int64_t token = args.tokens[which];
  if (args.factor.data) {
    const Quad<T> factor = factor_at<T>(args, token, at);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) total.element[c] *= powered(factor.element[c], args.power);
  }
  Quad<T> entries = read<T, T>(args.out, token, at);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) entries.element[c] += static_cast<T>(args.scale) * total.element[c];
  write(args.out, token, at, entries);
  if (!args.grad.data) return;
  entries = read<T, T>(args.grad, token, at);
  add(entries, sum);
  write(args.grad, token, at, entries);
}

// A piece that is all of its token goes to out and grad, others to partial.
template <class T, class In>
__global__ void __launch_bounds__(kThreads) piece_kernel(const Args args) {
  const Place at = place_of(args, args.pieces);
  if (at.count == 0) return;
  const int64_t which = args.piece_tokens[at.item], first = args.first_pieces[which];
  const Rows rows = rows_of(args, which, at.item);
  Sums<T> sums = args.grad_outputs.quads && at.count == kColumns ? walk<true, T, In>(args, rows, at)
                                                                 : walk<false, T, In>(args, rows, at);
  if (args.first_pieces[which + 1] - first == 1) {
    add_powered(sums.total, sums.head, args.power);
    add_powered(sums.total, sums.tail, args.power);
    finish(args, which, at, sums.total, sums.sum);
    return;
  }
  const int64_t slot = (args.slots[which] + at.item - first) * kKinds;
  write(args.partial, slot + kHead, at, sums.head);
  write(args.partial, slot + kTotal, at, sums.total);
  write(args.partial, slot + kTail, at, sums.tail);
  write(args.partial, slot + kSum, at, sums.sum);
}

// Joins the pieces of each token that was cut, in order: a sample ends where the next one begins.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) cut_kernel(const Args args) {
  const Place at = place_of(args, args.cut_count);
  if (at.count == 0) return;
  const int64_t which = args.cut[at.item], first = args.first_pieces[which];
  const int64_t pieces = args.first_pieces[which + 1] - first;
  Quad<T> total = {}, sum = {}, sample = {};
#pragma unroll 4
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const Rows rows = rows_of(args, which, first + piece);
    const int64_t slot = (args.slots[which] + piece) * kKinds;
    if (piece > 0 && args.samples[rows.begin] != args.samples[rows.begin - 1]) {
      add_powered(total, sample, args.power);
      sample = {};
    }
    add(sample, read<T, T>(args.partial, slot + kHead, at));
    if (args.samples[rows.begin] != args.samples[rows.end - 1]) {
      add_powered(total, sample, args.power);
      add(total, read<T, T>(args.partial, slot + kTotal, at));
      sample = read<T, T>(args.partial, slot + kTail, at);
    }
    add(sum, read<T, T>(args.partial, slot + kSum, at));
  }
  add_powered(total, sample, args.power);
  finish(args, which, at, total, sum);
}

// Below 2^31 for any out that fits a memory: there are at most tokens + rows / piece_rows items.
unsigned blocks_for(const Args& args, int64_t items) {
  const int64_t per_block = kThreads >> args.lanes;
  return static_cast<unsigned>((items + per_block - 1) / per_block * args.tiles);
}

template <class T, class In>
int launch(const Args& args, cudaStream_t stream) {
  CW_LAUNCH((piece_kernel<T, In>), blocks_for(args, args.pieces), kThreads, 0, stream, args);
  if (args.cut_count) CW_LAUNCH((cut_kernel<T>), blocks_for(args, args.cut_count), kThreads, 0, stream, args);
  return launch_status();
}

template <class T>
int launch(const Args& args, cudaStream_t stream) {
  switch (args.grad_outputs.dtype) {
    case kFloat32:
      return launch<T, float>(args, stream);
    case kBfloat16:
      return launch<T, __nv_bfloat16>(args, stream);
    case kFloat16:
      return launch<T, __half>(args, stream);
    default:
      return launch<T, double>(args, stream);
  }
}

Matrix matrix(const CwfastMatrix& x) {
  const int quad = kColumns * (x.dtype == kFloat64 ? 8 : x.dtype == kFloat32 ? 4 : 2);
  const bool quads =
      x.column_stride == 1 && reinterpret_cast<uintptr_t>(x.data) % quad == 0 && x.row_stride % kColumns == 0;
  return {x.data, x.row_stride, x.column_stride, static_cast<int>(x.dtype), quads};
}

}  // namespace
}  // namespace cwfast

extern "C" int cwfast_cuda_embedding_saliency(const CwfastEmbedding* embedding, int device, void* stream) {
  using namespace cwfast;
  const CwfastEmbedding& x = *embedding;
  if (x.pieces == 0 || x.columns == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.status) return guard.status;
  const int64_t quads = (x.columns + kColumns - 1) / kColumns;
  int lanes = 0;
  while ((1 << lanes) < kMostLanes && (1 << lanes) < quads) ++lanes;
  const auto tiles = static_cast<unsigned>(((quads - 1) >> lanes) + 1);
  const Args args{matrix(x.out),
                  matrix(x.grad),
                  matrix(x.grad_outputs),
                  matrix(x.factor),
                  matrix(x.partial),
                  x.order,
                  x.samples,
                  x.tokens,
                  x.firsts,
                  x.first_pieces,
                  x.piece_tokens,
                  x.cut,
                  x.slots,
                  x.pieces,
                  x.cut_count,
                  x.piece_rows,
                  x.columns,
                  tiles,
                  lanes,
                  static_cast<int>(x.power),
                  x.scale};
  const auto on = static_cast<cudaStream_t>(stream);
  return x.out.dtype == kFloat64 ? launch<double>(args, on) : launch<float>(args, on);
}
