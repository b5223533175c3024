// What a chunk of the vocabulary knows of p = softmax(z), z = softcap(scale * (hidden weight^T + bias)), per token; the
// same for KL(q || p); tiles of z or of the loss's gradient. Reference: cwfast/reference.py; called by
// cwfast/ops/_lm_token_stats_device.py, which merges the chunks. Bytes: weight once per group of kGroup blocks of
// tokens, hidden once; nothing of tokens * vocabulary but the tiles that are asked for. Not yet run on a GPU: compiled
// for sm_80 and sm_90 (docs/gates-cuda.md), run on the CPU by tests/test_cuda_lm_token_stats.py.
#include "cuda/launchers.h"
#include "cuda/lm_token_stats_tile.h"

namespace cwfast {
namespace {

constexpr int kGroup =
    16;  // blocks of tokens that share a tile of words in the L2 cache; 16 MB of hidden at width 4096
constexpr int kStrip = 64;  // words of a tile that are folded at once; a thread folds half of them for one token
constexpr int kStripPitch = kStrip + 1;  // neighbouring tokens lie in different banks

struct Args {
  Rows hidden, weight, ref_hidden, ref_weight;
  const float *bias, *ref_bias;  // [words] or null
  int64_t tokens, words, chunks, chunk;
  const int64_t* targets;
  float *logit, *partial;
  int* counts;
  void* out;
  const float *grad, *logsumexp, *ref_logsumexp;
  float scale, softcap;  // softcap 0: none
};

__device__ __forceinline__ float finished(const Args& args, const float* bias, int64_t word, float z) {
  if (bias) z += bias[word];
  z *= args.scale;
  return args.softcap > 0.0f ? args.softcap * tanhf(z / args.softcap) : z;
}

// The block of tokens and the part of the words: kGroup blocks of tokens go through the parts together.
__device__ __forceinline__ void place(const Args& args, int64_t parts, int64_t& token, int64_t& part) {
  const int64_t blocks = (args.tokens + kTile - 1) / kTile, first = blockIdx.x / (kGroup * parts) * kGroup;
  const int64_t height = blocks - first < kGroup ? blocks - first : kGroup, inside = blockIdx.x % (kGroup * parts);
  token = (first + inside % height) * kTile;
  part = inside / height;
}

struct From {  // consecutive rows
  int64_t first, count;
  __device__ int64_t operator()(int r) const { return first + r < count ? first + r : -1; }
};

// A strip of a tile to shared memory, from the threads that hold it.
template <class Tile>
__device__ __forceinline__ void spread(float* strip, int which, const float (&acc)[kEntries]) {
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const Place at = Tile::place_of(e);
    if (at.word / kStrip == which) strip[at.token * kStripPitch + at.word % kStrip] = acc[e];
  }
}

// A tile of words of which the diagonal is wanted: the sums of the tiles, so that equal logits compare equal.
template <class Tile>
__global__ void __launch_bounds__(kThreads, 1) target_kernel(const Args args) {
  CW_DYNAMIC_SHARED(shared);
  const int64_t token = int64_t{blockIdx.x} * kTile;
  const auto word_of = [&](int r) {
    const int64_t y = token + r < args.tokens ? args.targets[token + r] : -1;
    return y < args.words ? y : -1;
  };
  float acc[kEntries];
  product<Tile>(reinterpret_cast<typename Tile::Element*>(shared), args.hidden, args.weight, From{token, args.tokens},
                word_of, acc);
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const Place at = Tile::place_of(e);
    if (at.token != at.word || token + at.token >= args.tokens) continue;
    const int64_t y = args.targets[token + at.token];
    if (y >= 0 && y < args.words) args.logit[token + at.token] = finished(args, args.bias, y, acc[e]);
  }
}

// What a thread knows of one token and its words so far; see Parts, whose slope over the sum is mean.
struct Sums {
  float peak = -INFINITY, tops = 0.0f, rest = 0.0f, mean = 0.0f, spread = 0.0f;
  int above = 0, top = 0;
};

// z: of `count` words, unfinished; overwritten. own: the target's logit, at word `target` of these.
__device__ __forceinline__ void fold(const Args& args, Sums& s, float* z, int64_t word, int count, int64_t target,
                                     float own) {
  float peak = -INFINITY;
  int top = 0;
  for (int c = 0; c < count; ++c) {
    const float x = c == target ? own : finished(args, args.bias, word + c, z[c]);
    z[c] = x;
    s.above += x > own;
    if (x > peak) peak = x, top = c;
  }
  const bool record = peak > s.peak;
  const float step = record ? s.peak - peak : 0.0f, factor = expf(step), sum = (s.tops + s.rest) * factor;
  if (record) {
    s.peak = peak, s.top = static_cast<int>(word) + top;
    s.rest = sum, s.tops = 0.0f;
    if (sum > 0.0f) s.mean += step;
  }
  // Moments about a place near the mean of these words, or digits cancel: the largest logit where it is new, for it may
  // have most of the probability; else the mean so far, whose distance to theirs is part of the variance.
  const float about = record ? 0.0f : s.mean, shift = s.peak > -INFINITY ? s.peak : 0.0f;
  float tops = 0.0f, rest = 0.0f, moment = 0.0f, square = 0.0f;
  for (int c = 0; c < count; ++c) {
    const float u = z[c] - shift, w = expf(u), e = fmaxf(u - about, -1e10f);  // -inf times 0 is not 0
    tops += u == 0.0f ? 1.0f : 0.0f;
    rest += u == 0.0f ? 0.0f : w;
    moment += w * e;
    square += w * e * e;
  }
  const float more = tops + rest, off = more > 0.0f ? moment / more : 0.0f;
  const float both = sum + more > 0.0f ? sum + more : 1.0f, d = sum > 0.0f ? about + off - s.mean : 0.0f;
  s.mean = sum > 0.0f ? (sum * s.mean + more * (about + off)) / both : about + off;
  s.spread = s.spread * factor + fmaxf(square - moment * off, 0.0f) + d * d * sum * (more / both);
  s.tops += tops;
  s.rest += rest;
}

// partial [5, 2 chunks, tokens], counts [2, 2 chunks, tokens]: two threads share the words of a token.
template <class Tile>
__global__ void __launch_bounds__(kThreads, 1) stats_kernel(const Args args) {
  using T = typename Tile::Element;
  CW_DYNAMIC_SHARED(shared);  // [kStages][kStage] T, then [kTile][kStripPitch] float
  T* const staged = reinterpret_cast<T*>(shared);
  float* const strip = reinterpret_cast<float*>(staged + kStages * kStage<T>);
  int64_t token, part;
  place(args, args.chunks, token, part);
  const int mine = threadIdx.x % kTile, half = threadIdx.x / kTile;
  const int64_t n = token + mine, begin = part * args.chunk;
  const int64_t end = begin + args.chunk < args.words ? begin + args.chunk : args.words;
  const int64_t target = n < args.tokens ? args.targets[n] : -1;
  const float own = n < args.tokens ? args.logit[n] : 0.0f;
  Sums sums;
  for (int64_t word = begin; word < end; word += kTile) {
    float acc[kEntries];
    product<Tile>(staged, args.hidden, args.weight, From{token, args.tokens}, From{word, args.words}, acc);
    for (int which = 0; which < kTile / kStrip; ++which) {
      spread<Tile>(strip, which, acc);
      __syncthreads();  // the strip is complete
      const int c = half * (kStrip / 2);
      const int64_t first = word + which * kStrip + c, left = args.words - first;
      const int count = left < kStrip / 2 ? static_cast<int>(left > 0 ? left : 0) : kStrip / 2;
      if (n < args.tokens) fold(args, sums, strip + mine * kStripPitch + c, first, count, target - first, own);
      __syncthreads();  // all have left the strip
    }
  }
  if (n >= args.tokens) return;
  const int64_t field = 2 * args.chunks * args.tokens, at = (2 * part + half) * args.tokens + n;
  const float values[] = {sums.peak, sums.tops, sums.rest, sums.mean, sums.spread};
  for (int f = 0; f < 5; ++f) args.partial[f * field + at] = values[f];
  args.counts[at] = sums.above;
  args.counts[field + at] = sums.top;
}

struct KlSums {  // of the model, of the reference, and the mean of (r - its peak) - (z - its peak) under q
  float peak = -INFINITY, sum = 0.0f, ref_peak = -INFINITY, ref_sum = 0.0f, gap = 0.0f;
};

__device__ __forceinline__ void fold_kl(const Args& args, KlSums& s, float* z, float* r, int64_t word, int count) {
  float peak = s.peak, ref_peak = s.ref_peak;
  for (int c = 0; c < count; ++c) {
    z[c] = finished(args, args.bias, word + c, z[c]);
    r[c] = finished(args, args.ref_bias, word + c, r[c]);
    peak = fmaxf(peak, z[c]);
    ref_peak = fmaxf(ref_peak, r[c]);
  }
  const float shift = peak > -INFINITY ? peak : 0.0f, ref_shift = ref_peak > -INFINITY ? ref_peak : 0.0f;
  const float step = s.peak > -INFINITY ? s.peak - shift : 0.0f;
  const float ref_step = s.ref_peak > -INFINITY ? s.ref_peak - ref_shift : 0.0f;
  s.sum *= expf(step);
  s.ref_sum *= expf(ref_step);
  s.gap += ref_step - step;
  s.peak = peak, s.ref_peak = ref_peak;
  float more = 0.0f, gap = 0.0f;
  for (int c = 0; c < count; ++c) {
    const float u = z[c] - shift, t = r[c] - ref_shift, q = expf(t);
    s.sum += expf(u);
    more += q;
    gap += q > 0.0f ? q * (t - u) : 0.0f;  // -inf times 0 is not 0
  }
  const float theirs = more > 0.0f ? gap / more : 0.0f;
  const float share = s.ref_sum + more > 0.0f ? more / (s.ref_sum + more) : 0.0f;
  if (s.ref_sum > 0.0f)
    s.gap = (share < 1.0f ? s.gap * (1.0f - share) : 0.0f) + (share > 0.0f ? share * theirs : 0.0f);
  else
    s.gap = theirs;
  s.ref_sum += more;
}

// partial [5, 2 chunks, tokens].
template <class Tile>
__global__ void __launch_bounds__(kThreads, 1) kl_kernel(const Args args) {
  using T = typename Tile::Element;
  CW_DYNAMIC_SHARED(shared);
  T* const staged = reinterpret_cast<T*>(shared);
  float* const strip = reinterpret_cast<float*>(staged + kStages * kStage<T>);
  float* const ref_strip = strip + kTile * kStripPitch;
  int64_t token, part;
  place(args, args.chunks, token, part);
  const int mine = threadIdx.x % kTile, half = threadIdx.x / kTile;
  const int64_t n = token + mine, begin = part * args.chunk;
  const int64_t end = begin + args.chunk < args.words ? begin + args.chunk : args.words;
  KlSums sums;
  for (int64_t word = begin; word < end; word += kTile) {
    float acc[kEntries], ref[kEntries];
    product<Tile>(staged, args.ref_hidden, args.ref_weight, From{token, args.tokens}, From{word, args.words}, ref);
    product<Tile>(staged, args.hidden, args.weight, From{token, args.tokens}, From{word, args.words}, acc);
    for (int which = 0; which < kTile / kStrip; ++which) {
      spread<Tile>(strip, which, acc);
      spread<Tile>(ref_strip, which, ref);
      __syncthreads();  // the strips are complete
      const int c = half * (kStrip / 2), at = mine * kStripPitch + c;
      const int64_t first = word + which * kStrip + c, left = args.words - first;
      const int count = left < kStrip / 2 ? static_cast<int>(left > 0 ? left : 0) : kStrip / 2;
      fold_kl(args, sums, strip + at, ref_strip + at, first, count);
      __syncthreads();  // all have left the strips
    }
  }
  if (n >= args.tokens) return;
  const int64_t field = 2 * args.chunks * args.tokens, at = (2 * part + half) * args.tokens + n;
  const float values[] = {sums.peak, sums.sum, sums.ref_peak, sums.ref_sum, sums.gap};
  for (int f = 0; f < 5; ++f) args.partial[f * field + at] = values[f];
}

__device__ __forceinline__ float probability(const float* logsumexp, int64_t token, float z) {
  return expf((z - logsumexp[2 * token]) - logsumexp[2 * token + 1]);
}

// out [tokens, words] of Out: z, or the gradient of the loss at hidden weight^T + bias.
template <class Tile, class Out, int kKind>
__global__ void __launch_bounds__(kThreads, 1) tile_kernel(const Args args) {
  CW_DYNAMIC_SHARED(shared);
  auto* const staged = reinterpret_cast<typename Tile::Element*>(shared);
  int64_t token, word;
  place(args, (args.words + kTile - 1) / kTile, token, word);
  word *= kTile;
  float acc[kEntries], ref[kKind == kLmKlGrad ? kEntries : 1];
  if constexpr (kKind == kLmKlGrad)
    product<Tile>(staged, args.ref_hidden, args.ref_weight, From{token, args.tokens}, From{word, args.words}, ref);
  product<Tile>(staged, args.hidden, args.weight, From{token, args.tokens}, From{word, args.words}, acc);
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const Place at = Tile::place_of(e);
    const int64_t n = token + at.token, v = word + at.word;
    if (n >= args.tokens || v >= args.words) continue;
    float z = finished(args, args.bias, v, acc[e]);
    if constexpr (kKind == kLmLogits) {
      if (v == args.targets[n]) z = args.logit[n];
    } else {
      float d = probability(args.logsumexp, n, z);
      if constexpr (kKind == kLmLogprobGrad)
        d = (v == args.targets[n] ? 1.0f : 0.0f) - d;
      else
        d -= probability(args.ref_logsumexp, n, finished(args, args.ref_bias, v, ref[e]));
      d *= args.grad[n] * args.scale;
      if (args.softcap > 0.0f) {
        z /= args.softcap;
        d *= 1.0f - z * z;
      }
      z = d;
    }
    static_cast<Out*>(args.out)[n * args.words + v] = Out(z);
  }
}

template <class T>
Rows rows(const void* data, int64_t stride, int64_t width) {
  const int size = static_cast<int>(sizeof(T));
  return {data, stride, width, reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size % 16 == 0};
}

template <class Tile>
int launch(int what, const CwfastLmTokens& x, cudaStream_t stream) {
  using T = typename Tile::Element;
  const CwfastLmHead &model = x.model, &ref = x.reference;
  const Args args{rows<T>(model.hidden, model.hidden_stride, model.width),
                  rows<T>(model.weight, model.weight_stride, model.width),
                  rows<T>(ref.hidden, ref.hidden_stride, ref.width),
                  rows<T>(ref.weight, ref.weight_stride, ref.width),
                  model.bias,
                  ref.bias,
                  x.tokens,
                  x.words,
                  x.chunks,
                  x.chunk,
                  x.targets,
                  x.logit,
                  x.partial,
                  x.counts,
                  x.out,
                  x.grad,
                  x.logsumexp,
                  x.ref_logsumexp,
                  static_cast<float>(x.scale),
                  static_cast<float>(x.softcap)};
  const int64_t blocks = (x.tokens + kTile - 1) / kTile, tiles = (x.words + kTile - 1) / kTile;
  const int staged = kStages * kStage<T> * static_cast<int>(sizeof(T));
  const int strips = what == kLmStats ? 1 : what == kLmKl ? 2 : 0;
  const int bytes = staged + strips * kTile * kStripPitch * static_cast<int>(sizeof(float));
  const auto run = [&](auto kernel, int64_t grid) {
    if (const int status = allow_shared(kernel, bytes)) return status;
    CW_LAUNCH(kernel, static_cast<unsigned>(grid), kThreads, bytes, stream, args);
    return launch_status();
  };
  switch (what) {
    case kLmTarget:
      return run(target_kernel<Tile>, blocks);
    case kLmStats:
      return run(stats_kernel<Tile>, blocks * x.chunks);
    case kLmKl:
      return run(kl_kernel<Tile>, blocks * x.chunks);
    case kLmLogits:
      return run(tile_kernel<Tile, float, kLmLogits>, blocks * tiles);
    case kLmLogprobGrad:
      return run(tile_kernel<Tile, T, kLmLogprobGrad>, blocks * tiles);
    default:
      return run(tile_kernel<Tile, T, kLmKlGrad>, blocks * tiles);
  }
}

}  // namespace
}  // namespace cwfast

extern "C" int cwfast_cuda_lm_tokens(int what, const CwfastLmTokens* tokens, int device, void* stream) {
  using namespace cwfast;
  if (tokens->tokens == 0 || tokens->words == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.status) return guard.status;
  const auto on = static_cast<cudaStream_t>(stream);
  if (tokens->dtype == kBfloat16) return launch<MmaTile<__nv_bfloat16>>(what, *tokens, on);
  if (tokens->dtype == kFloat16) return launch<MmaTile<__half>>(what, *tokens, on);
  return launch<FmaTile>(what, *tokens, on);
}
