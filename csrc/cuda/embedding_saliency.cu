// out[v,d] += scale * |factor[v,d]|^power * sum_b |G_b[v,d]|^power,  grad[v,d] += sum_b G_b[v,d],
// G_b[v] = sum of grad_outputs[r] over the rows r of sample b with token v.
// Reference: cwfast/reference.py, accumulate_embedding_saliency_; called by cwfast/ops/_embedding_device.py.
// Bytes: each row of grad_outputs once, and of the tokens that occur out and grad twice and the factor once; 16 a row
// for its place and sample, for every 128 columns, of which the cache holds most; of a token cut into pieces 32 * D a
// piece (float32).
// Rows come sorted by (token, sample). A token's are cut into pieces of at most piece_rows, so that one token with
// most of the rows keeps a whole GPU busy; up to 32 lanes walk a piece in order, 4 columns each: no atomics, no
// shared memory, the same bits on every run. The longest walks are piece_rows rows, then a token's pieces.
// Not yet run on a GPU: compiled for sm_80 and sm_90 (docs/gates-cuda.md), run on the CPU by
// tests/test_cuda_embedding_saliency.py.
#include "cuda/embedding_saliency_rows.h"

namespace cwfast {
namespace {

constexpr int kThreads = 256;
constexpr int kMostLanes = 32;  // that share a piece: neighbours in a warp read neighbouring columns
enum Kind { kHead, kTotal, kTail, kSum, kKinds };

// Rows whose loads are under way before the first is added: 64 bytes a thread, whatever the type.
template <class In>
constexpr int kAtOnce = 64 / (kColumns * static_cast<int>(sizeof(In)));

struct Args {
  Matrix out, grad, grad_outputs, factor, partial;
  const int64_t *order, *samples, *tokens, *firsts, *first_pieces, *piece_tokens, *cut, *slots;  // see launchers.h
  int64_t pieces, cut_count, piece_rows, columns;
  unsigned tiles;  // across the columns
  int lanes;       // of a tile, as a power of two
  int power;
  double scale;
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

// What a piece gives. Its first and last samples may reach into the pieces beside it.
template <class T>
struct Sums {
  Quad<T> head = {};   // sum of the rows of its first sample
  Quad<T> total = {};  // sum of |G_b|^power over the samples between the first and the last
  Quad<T> tail = {};   // sum of the rows of its last sample; 0 if that is the first
  Quad<T> sum = {};    // of all rows
};

// Walks the rows of a piece in order.
template <class T, class In, bool kQuads>
struct Walk {
  const Args& args;
  const Place& at;
  int64_t owner;  // of the row before
  Quad<T> sample = {};
  Sums<T> sums = {};
  bool first = true;

  // The next `count` rows; kFull: kAtOnce of them, without a branch between their loads.
  template <bool kFull>
  __device__ __forceinline__ void step(int64_t begin, int64_t count) {
    int64_t order[kAtOnce<In>];
    Quad<In> row[kAtOnce<In>];
    unsigned next = 0;  // bit u: row u is of another sample than the one before
#pragma unroll
    for (int u = 0; u < kAtOnce<In>; ++u)
      if (kFull || u < count) order[u] = args.order[begin + u];
#pragma unroll
    for (int u = 0; u < kAtOnce<In>; ++u)
      if (kFull || u < count) row[u] = load<kQuads, In>(args.grad_outputs, order[u], at);
#pragma unroll
    for (int u = 0; u < kAtOnce<In>; ++u) {
      if (!kFull && u >= count) continue;
      const int64_t mine = args.samples[begin + u];
      next |= static_cast<unsigned>(mine != owner) << u;
      owner = mine;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce<In>; ++u) {
      if (!kFull && u >= count) continue;
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

  __device__ __forceinline__ Sums<T> all(const Rows& rows) {
    int64_t begin = rows.begin;
    for (; begin + kAtOnce<In> <= rows.end; begin += kAtOnce<In>) step<true>(begin, kAtOnce<In>);
    if (begin < rows.end) step<false>(begin, rows.end - begin);
    add(sums.sum, sample);
    if (first)
      sums.head = sample;
    else
      sums.tail = sample;
    return sums;
  }
};

template <class T, class In, bool kQuads>
__device__ __forceinline__ Sums<T> walk(const Args& args, const Rows& rows, const Place& at) {
  return Walk<T, In, kQuads>{args, at, args.samples[rows.begin]}.all(rows);
}

// Adds what all samples of a token gave; total is changed.
template <class T>
__device__ __forceinline__ void finish(const Args& args, int64_t which, const Place& at, Quad<T>& total,
                                       const Quad<T>& sum) {
  const int64_t token = args.tokens[which];
  if (args.factor.data) {
    const Quad<T> factor = read_any<T>(args.factor, token, at);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) total.element[c] *= powered(factor.element[c], args.power);
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) total.element[c] *= static_cast<T>(args.scale);
  add(total, read<T, T>(args.out, token, at));
  write(args.out, token, at, total);
  if (!args.grad.data) return;
  Quad<T> entries = read<T, T>(args.grad, token, at);
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
  Sums<T> sums = args.grad_outputs.quads && at.count == kColumns ? walk<T, In, true>(args, rows, at)
                                                                 : walk<T, In, false>(args, rows, at);
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
