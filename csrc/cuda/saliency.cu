// out[o,i] += scale * |factor[o,i]|^power * sum_b |G_b[o,i]|^power,  G_b = sum of grad_outputs[r,o] * inputs[r,i]
// over the rows r of sample b. Reference: cwfast/reference.py; called by cwfast/ops/saliency.py.
// Bytes: rows * (O + I) elements once per tile row and column, out twice, factor once; nothing of samples * O * I.
// Not yet run on a GPU: compiled for sm_80 and sm_90 (docs/gates-cuda.md), run on the CPU by
// tests/test_cuda_saliency.py.
#include "cuda/launchers.h"
#include "cuda/saliency_tile.h"

namespace cwfast {
namespace {

constexpr int kStages = 4;  // 3 copies under way cover the latency of global memory; 70 KB fit every sm_80 and later
constexpr int kGroup = 8;   // blocks of 8 tile rows share the columns that they read in the L2 cache

struct Args {
  float* out;                  // [O, I]
  const void *inputs, *grads;  // [rows, I], [rows, O] of Element
  const int64_t* row_offsets;  // [samples + 1]; null: every row is a sample
  const void* factor;          // [O, I] of factor_dtype, or null
  float* grad;                 // [O, I], or null
  int64_t input_stride, grad_stride, samples, rows, out_features, in_features;
  float scale;
  int power, factor_dtype;
  bool aligned;  // every row starts at 16 bytes
};

// Walks the rows in stages that never cross a sample: row .. min(row + depth, end).
struct Cursor {
  const int64_t* ends;
  int64_t left, row, end;  // samples behind this one; the next row; the end of this sample

  __device__ explicit Cursor(const Args& args)
      : ends(args.row_offsets ? args.row_offsets + 1 : nullptr),
        left(args.samples),
        row(0),
        end(args.row_offsets ? 0 : args.rows) {
    if (!args.row_offsets) left = 0;
    skip_empty();
  }
  __device__ bool valid() const { return row < end; }
  __device__ int rows(int depth) const { return static_cast<int>(end - row < depth ? end - row : depth); }
  __device__ void advance(int depth) {
    row += rows(depth);
    skip_empty();
  }

 private:
  __device__ void skip_empty() {
    for (; row == end && left > 0; --left) end = *ends++;
  }
};

// Stages `rows` rows of 128 columns from `column` on; what lies past the rows or columns becomes zero.
template <class T>
__device__ __forceinline__ void stage(T* to, const T* from, int64_t stride, int64_t row, int rows, int64_t column,
                                      int64_t columns, bool aligned) {
  constexpr int kPerRow = kTile / kChunk<T>;
#pragma unroll
  for (int part = 0; part < kDepth<T> * kPerRow / kThreads; ++part) {
    const int chunk = part * kThreads + static_cast<int>(threadIdx.x);
    const int r = chunk / kPerRow, c = chunk % kPerRow * kChunk<T>;
    const int64_t there = columns - (column + c);
    const int count = r < rows && there > 0 ? static_cast<int>(there < kChunk<T> ? there : kChunk<T>) : 0;
    const T* source = from + (count ? (row + r) * stride + column + c : 0);
    T* target = to + r * kPitch<T> + c;
    if (aligned) {
      copy_async_16(target, source, count * static_cast<int>(sizeof(T)));
    } else {
      for (int e = 0; e < kChunk<T>; ++e) target[e] = e < count ? source[e] : T(0.0f);
    }
  }
}

__device__ __forceinline__ float factor_at(const Args& args, int64_t index) {
  if (!args.factor) return 1.0f;
  if (args.factor_dtype == kFloat32) return static_cast<const float*>(args.factor)[index];
  if (args.factor_dtype == kBfloat16) return to_float(static_cast<const __nv_bfloat16*>(args.factor)[index]);
  return to_float(static_cast<const __half*>(args.factor)[index]);
}

// The tile of this block: columns of tiles in groups of kGroup rows.
__device__ __forceinline__ void tile_of(const Args& args, int64_t& o, int64_t& i) {
  const int64_t down = (args.out_features + kTile - 1) / kTile, across = (args.in_features + kTile - 1) / kTile;
  const int64_t group = blockIdx.x / (kGroup * across), first = group * kGroup, inside = blockIdx.x % (kGroup * across);
  const int64_t height = down - first < kGroup ? down - first : kGroup;
  o = (first + inside % height) * kTile;
  i = inside / height * kTile;
}

// kRows: every row is a sample, so that sum_b |d x|^p is one product of |d|^p and |x|^p. Else a second tile of
// registers, total, takes |acc|^p whenever a sample ends. One block, one tile, all samples in order: same bits always.
template <class Tile, bool kRows, bool kGrad>
__global__ void __launch_bounds__(kThreads, 1) saliency_kernel(const Args args) {
  using T = typename Tile::Element;
  constexpr int kOperand = kDepth<T> * kPitch<T>;
  CW_DYNAMIC_SHARED(shared);  // [kStages][grad_outputs, inputs][kDepth][kPitch]
  T* const staged = reinterpret_cast<T*>(shared);
  int64_t tile_o, tile_i;
  tile_of(args, tile_o, tile_i);
  const auto load = [&](int slot, const Cursor& at) {
    T* const to = staged + slot * 2 * kOperand;
    stage(to, static_cast<const T*>(args.grads), args.grad_stride, at.row, at.rows(kDepth<T>), tile_o,
          args.out_features, args.aligned);
    stage(to + kOperand, static_cast<const T*>(args.inputs), args.input_stride, at.row, at.rows(kDepth<T>), tile_i,
          args.in_features, args.aligned);
  };
  float acc[kRows ? 1 : kEntries] = {}, total[kEntries] = {}, grad[kGrad ? kEntries : 1] = {};
  Cursor ahead(args), here(args);
  for (int slot = 0; slot < kStages - 1; ++slot) {
    if (ahead.valid()) {
      load(slot, ahead);
      ahead.advance(kDepth<T>);
    }
    close_copies();
  }
  for (int slot = 0; here.valid(); slot = (slot + 1) % kStages) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // this stage has arrived for all, and all have left the one before, which is filled now
    if (ahead.valid()) {
      load((slot + kStages - 1) % kStages, ahead);
      ahead.advance(kDepth<T>);
    }
    close_copies();
    const T* const at = staged + slot * 2 * kOperand;
    const int rows = here.rows(kDepth<T>);
    Tile::template multiply<kRows, kGrad>(at, at + kOperand, rows, args.power, acc, total, grad);
    if constexpr (!kRows) {
      if (here.row + rows == here.end) {
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
          total[e] = args.power == 1 ? total[e] + fabsf(acc[e]) : __fmaf_rn(acc[e], acc[e], total[e]);
          if constexpr (kGrad) grad[e] += acc[e];
          acc[e] = 0.0f;
        }
      }
    }
    here.advance(kDepth<T>);
  }
  wait_for_copies<0>();
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const Offset at = Tile::offset_of(e);
    const int64_t o = tile_o + at.o, i = tile_i + at.i;
    if (o < args.out_features && i < args.in_features) {
      const int64_t index = o * args.in_features + i;
      const float factor = fabsf(factor_at(args, index));
      const float weight = args.power == 1 ? factor : factor * factor;
      args.out[index] = __fmaf_rn(args.scale, weight * total[e], args.out[index]);
      if constexpr (kGrad) args.grad[index] += grad[e];
    }
  }
}

template <class Tile, bool kRows, bool kGrad>
int launch(const Args& args, cudaStream_t stream) {
  constexpr int kBytes = kStages * 2 * kDepth<typename Tile::Element> * kPitch<typename Tile::Element> *
                         static_cast<int>(sizeof(typename Tile::Element));
  const auto kernel = saliency_kernel<Tile, kRows, kGrad>;
  if (const int status = allow_shared(kernel, kBytes)) return status;
  const int64_t tiles = ((args.out_features + kTile - 1) / kTile) * ((args.in_features + kTile - 1) / kTile);
  CW_LAUNCH(kernel, static_cast<unsigned>(tiles), kThreads, kBytes, stream, args);
  return launch_status();
}

template <class Tile, bool kRows>
int launch(const Args& args, cudaStream_t stream) {
  return args.grad ? launch<Tile, kRows, true>(args, stream) : launch<Tile, kRows, false>(args, stream);
}

template <class T>
int launch_16_bit(const Args& args, cudaStream_t stream) {
  if (args.row_offsets) return launch<MmaTile<T>, false>(args, stream);
  // The squares of 16-bit entries are not 16-bit entries: no tensor cores for them.
  return args.power == 1 ? launch<MmaTile<T>, true>(args, stream) : launch<FmaTile<T>, true>(args, stream);
}

bool starts_at_16_bytes(const void* data, int64_t stride, int element) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element % 16 == 0;
}

}  // namespace
}  // namespace cwfast

extern "C" int cwfast_cuda_saliency(float* out, const void* inputs, int64_t input_stride, const void* grad_outputs,
                                    int64_t grad_stride, const int64_t* row_offsets, int64_t samples, int64_t rows,
                                    int64_t out_features, int64_t in_features, int dtype, int power, float scale,
                                    const void* factor, int factor_dtype, float* grad, int device, void* stream) {
  using namespace cwfast;
  if (rows == 0 || out_features == 0 || in_features == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.status) return guard.status;
  const int element = dtype == kFloat32 ? 4 : 2;
  const bool aligned =
      starts_at_16_bytes(inputs, input_stride, element) && starts_at_16_bytes(grad_outputs, grad_stride, element);
  const Args args{out,     inputs, grad_outputs, row_offsets, factor, grad,  input_stride, grad_stride,
                  samples, rows,   out_features, in_features, scale,  power, factor_dtype, aligned};
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == kBfloat16) return launch_16_bit<__nv_bfloat16>(args, on);
  if (dtype == kFloat16) return launch_16_bit<__half>(args, on);
  return row_offsets ? launch<FmaTile<float>, false>(args, on) : launch<FmaTile<float>, true>(args, on);
}
