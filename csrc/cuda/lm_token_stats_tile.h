// hidden weight^T for 128 tokens and 128 words in the registers of a block: tensor cores (16-bit) or FMA (float32).
// 256 threads hold 64 entries each; which, `place_of` says. Rows of both operands are staged along the width.
#pragma once
#include "common/device.h"

namespace cwfast {

constexpr int kTile = 128;  // tokens and words of a tile
constexpr int kThreads = 256;
constexpr int kEntries = kTile * kTile / kThreads;
constexpr int kStages = 4;  // 3 copies under way cover the latency of global memory

// Elements of T in 16 bytes, columns of one stage (64 bytes of a row), and the pitch of staged rows: 80 bytes, so that
// 16 bytes of each of 8 rows lie in different banks.
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kDepth = 4 * kChunk<T>;
template <class T>
constexpr int kPitch = kDepth<T> + kChunk<T>;
template <class T>
constexpr int kStage = 2 * kTile * kPitch<T>;  // elements: hidden, then weight

struct Place {
  int token, word;
};

// 8 warps as 2 (tokens) x 4 (words); a warp owns 64 x 32 as 4 x 4 products of 16 x 8.
template <class T>
struct MmaTile {
  using Element = T;
  static constexpr int kStep = 16;

  static __device__ Place place_of(int entry) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = entry / 4, c = entry % 4;
    return {warp / 4 * 64 + block / 4 * 16 + lane / 4 + c / 2 * 8,
            warp % 4 * 32 + block % 4 * 8 + lane % 4 * 2 + c % 2};
  }

  static __device__ __forceinline__ void multiply(const T* h, const T* w, float (&acc)[kEntries]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Matrices of the four: h: (token, k) = (0, 0), (8, 0), (0, 8), (8, 8); w: (word, k) = (0, 0), (0, 8), (8, 0), (8,
    // 8).
    h += (warp / 4 * 64 + lane / 8 % 2 * 8 + lane % 8) * kPitch<T> + lane / 16 * 8;
    w += (warp % 4 * 32 + lane / 16 * 8 + lane % 8) * kPitch<T> + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += kStep) {
      unsigned a[4][4], b[4][2];
#pragma unroll
      for (int m = 0; m < 4; ++m) ldmatrix_x4(a[m], h + m * 16 * kPitch<T> + k);
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        unsigned pair[4];
        ldmatrix_x4(pair, w + n * 8 * kPitch<T> + k);
        b[n][0] = pair[0], b[n][1] = pair[1], b[n + 1][0] = pair[2], b[n + 1][1] = pair[3];
      }
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) mma_m16n8k16<T>(*reinterpret_cast<float (*)[4]>(&acc[(m * 4 + n) * 4]), a[m], b[n]);
    }
  }
};

// 16 x 16 threads, each with every 16th token and word: what 8 of them read at once lies in different banks.
struct FmaTile {
  using Element = float;

  static __device__ Place place_of(int entry) {
    return {entry / 8 * 16 + static_cast<int>(threadIdx.x) / 16, entry % 8 * 16 + static_cast<int>(threadIdx.x) % 16};
  }

  static __device__ __forceinline__ void multiply(const float* h, const float* w, float (&acc)[kEntries]) {
    h += threadIdx.x / 16 * kPitch<float>;
    w += threadIdx.x % 16 * kPitch<float>;
#pragma unroll 1
    for (int k = 0; k < kDepth<float>; k += 4) {
      Vector a[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const Vector*>(h + i * 16 * kPitch<float> + k);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const Vector b = *reinterpret_cast<const Vector*>(w + j * 16 * kPitch<float> + k);
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[i * 8 + j] = __fmaf_rn(a[i].element[e], b.element[e], acc[i * 8 + j]);
      }
    }
  }

 private:
  struct alignas(16) Vector {
    float element[4];
  };
};

struct Rows {  // of hidden or weight
  const void* data;
  int64_t stride, width;
  bool aligned;  // every row starts at 16 bytes
};

// Stages columns k .. k + kDepth of 128 rows, of which `row_of` tells the index (-1: none); what is missing is zero.
template <class T, class RowOf>
__device__ __forceinline__ void stage(T* to, const Rows& rows, int64_t k, const RowOf& row_of) {
#pragma unroll
  for (int part = 0; part < kTile * 4 / kThreads; ++part) {
    const int chunk = part * kThreads + static_cast<int>(threadIdx.x), r = chunk / 4, c = chunk % 4 * kChunk<T>;
    const int64_t row = row_of(r), there = rows.width - (k + c);
    const int count = row >= 0 && there > 0 ? static_cast<int>(there < kChunk<T> ? there : kChunk<T>) : 0;
    const T* const source = static_cast<const T*>(rows.data) + (count ? row * rows.stride + k + c : 0);
    T* const target = to + r * kPitch<T> + c;
    if (rows.aligned) {
      copy_async_16(target, source, count * static_cast<int>(sizeof(T)));
    } else {
      for (int e = 0; e < kChunk<T>; ++e) target[e] = e < count ? source[e] : T(0.0f);
    }
  }
}

// acc = hidden weight^T for the rows that `token_of` and `word_of` tell; uses kStages * kStage elements of `staged`.
template <class Tile, class TokenOf, class WordOf>
__device__ __forceinline__ void product(typename Tile::Element* staged, const Rows& hidden, const Rows& weight,
                                        const TokenOf& token_of, const WordOf& word_of, float (&acc)[kEntries]) {
  using T = typename Tile::Element;
#pragma unroll
  for (int e = 0; e < kEntries; ++e) acc[e] = 0.0f;
  const int64_t steps = (hidden.width + kDepth<T> - 1) / kDepth<T>;
  const auto load = [&](int64_t step) {
    T* const to = staged + step % kStages * kStage<T>;
    if (step < steps) {
      stage<T>(to, hidden, step * kDepth<T>, token_of);
      stage<T>(to + kTile * kPitch<T>, weight, step * kDepth<T>, word_of);
    }
    close_copies();
  };
  __syncthreads();  // all have left the product before
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int64_t step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // this stage has arrived for all, and all have left the one before, which is filled now
    load(step + kStages - 1);
    const T* const at = staged + step % kStages * kStage<T>;
    Tile::multiply(at, at + kTile * kPitch<T>, acc);
  }
  wait_for_copies<0>();
}

}  // namespace cwfast
