// The two ways to multiply staged rows into 128 x 128 tiles of registers: tensor cores (16-bit) and FMA (any type).
// 256 threads hold 64 entries of a tile each; which, `offset_of` says. Staged rows lie kPitch elements apart.
#pragma once
#include "common/device.h"

namespace cwfast {

constexpr int kTile = 128;  // rows (O) and columns (I) of the tile of out that a block owns
constexpr int kThreads = 256;
constexpr int kEntries = kTile * kTile / kThreads;

// Elements of T in 16 bytes, rows in one stage (512 copies of 16 bytes per operand, two per thread), and their pitch:
// 16 bytes more than a row, so that 8 rows of one column lie in different banks.
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kDepth = 64 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kPitch = kTile + kChunk<T>;

struct Offset {
  int o, i;
};

// Tensor cores: 8 warps as 2 (O) x 4 (I), a warp owns 64 x 32 as 4 x 4 products of 16 x 8.
template <class T>
struct MmaTile {
  using Element = T;
  static constexpr int kStep = 16;

  static __device__ Offset offset_of(int entry) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = entry / 4, c = entry % 4;
    return {warp / 4 * 64 + block / 4 * 16 + lane / 4 + c / 2 * 8,
            warp % 4 * 32 + block % 4 * 8 + lane % 4 * 2 + c % 2};
  }

  // acc (samples) or total (rows: of absolute values) and grad += d^T x over the first `depth` staged rows.
  template <bool kRows, bool kGrad, int kAcc, int kSum>
  static __device__ __forceinline__ void multiply(const T* d, const T* x, int depth, int, float (&acc)[kAcc],
                                                  float (&total)[kEntries], float (&grad)[kSum]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Both operands are staged with their row t outermost, so both are read transposed. Matrices of the four:
    // d: (t, o) = (0, 0), (0, 8), (8, 0), (8, 8); x: (t, i) = (0, 0), (8, 0), (0, 8), (8, 8).
    d += (lane / 16 * 8 + lane % 8) * kPitch<T> + warp / 4 * 64 + lane / 8 % 2 * 8;
    x += (lane / 8 % 2 * 8 + lane % 8) * kPitch<T> + warp % 4 * 32 + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += kStep) {
      if (k >= depth) break;
      unsigned a[4][4], b[4][2];
#pragma unroll
      for (int m = 0; m < 4; ++m) ldmatrix_x4_transposed(a[m], d + k * kPitch<T> + m * 16);
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        unsigned pair[4];
        ldmatrix_x4_transposed(pair, x + k * kPitch<T> + n * 8);
        b[n][0] = pair[0], b[n][1] = pair[1], b[n + 1][0] = pair[2], b[n + 1][1] = pair[3];
      }
      if constexpr (!kRows) {
        multiply_all(acc, a, b);
      } else {
        if constexpr (kGrad) multiply_all(grad, a, b);
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
          for (int r = 0; r < 4; ++r) a[m][r] &= kNoSigns, b[m][r % 2] &= kNoSigns;
        multiply_all(total, a, b);
      }
    }
  }

 private:
  static constexpr unsigned kNoSigns = 0x7fff7fffu;  // of two 16-bit entries: exact absolute values

  static __device__ __forceinline__ void multiply_all(float (&tile)[kEntries], const unsigned (&a)[4][4],
                                                      const unsigned (&b)[4][2]) {
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n) mma_m16n8k16<T>(*reinterpret_cast<float (*)[4]>(&tile[(m * 4 + n) * 4]), a[m], b[n]);
  }
};

// FMA: 16 x 16 threads, each with rows 4 ty.. and 64 + 4 ty.., columns 4 tx.. and 64 + 4 tx..: reads without conflicts.
template <class T>
struct FmaTile {
  using Element = T;

  static __device__ Offset offset_of(int entry) {
    const int row = entry / 8, column = entry % 8, ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    return {row / 4 * 64 + ty * 4 + row % 4, column / 4 * 64 + tx * 4 + column % 4};
  }

  template <bool kRows, bool kGrad, int kAcc, int kSum>
  static __device__ __forceinline__ void multiply(const T* d, const T* x, int depth, int power, float (&acc)[kAcc],
                                                  float (&total)[kEntries], float (&grad)[kSum]) {
    d += threadIdx.x / 16 * 4;
    x += threadIdx.x % 16 * 4;
#pragma unroll 2
    for (int k = 0; k < depth; ++k) {
      float a[8], b[8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        read_4(d + k * kPitch<T> + half * 64, a + half * 4);
        read_4(x + k * kPitch<T> + half * 64, b + half * 4);
      }
      if constexpr (!kRows) {
        multiply_all(acc, a, b);
      } else {
        if constexpr (kGrad) multiply_all(grad, a, b);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          a[j] = power == 1 ? fabsf(a[j]) : a[j] * a[j];
          b[j] = power == 1 ? fabsf(b[j]) : b[j] * b[j];
        }
        multiply_all(total, a, b);
      }
    }
  }

 private:
  // Vectors of four elements, aligned as such: one load from shared memory.
  struct alignas(4 * sizeof(T)) Vector {
    T element[4];
  };

  static __device__ __forceinline__ void read_4(const T* from, float* to) {
    const Vector v = *reinterpret_cast<const Vector*>(from);
#pragma unroll
    for (int j = 0; j < 4; ++j) to[j] = to_float(v.element[j]);
  }

  static __device__ __forceinline__ void multiply_all(float (&tile)[kEntries], const float (&a)[8],
                                                      const float (&b)[8]) {
#pragma unroll
    for (int r = 0; r < 8; ++r)
#pragma unroll
      for (int c = 0; c < 8; ++c) tile[r * 8 + c] = __fmaf_rn(a[r], b[c], tile[r * 8 + c]);
  }
};

}  // namespace cwfast
