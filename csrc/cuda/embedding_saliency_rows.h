// Four columns of a row at once: how the embedding kernels read and write matrices of any dtype and strides.
#pragma once
#include "common/device.h"
#include "cuda/launchers.h"

namespace cwfast {
namespace {

constexpr int kColumns = 4;  // of a thread: 16 bytes of float32 at once

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

inline Matrix matrix(const CwfastMatrix& x) {
  const int quad = kColumns * (x.dtype == kFloat64 ? 8 : x.dtype == kFloat32 ? 4 : 2);
  const bool quads =
      x.column_stride == 1 && reinterpret_cast<uintptr_t>(x.data) % quad == 0 && x.row_stride % kColumns == 0;
  return {x.data, x.row_stride, x.column_stride, static_cast<int>(x.dtype), quads};
}

struct Place {  // what a thread works on: columns `column` to column + count of an item, none if count is 0
  int64_t item, column;
  int count;
};

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
__device__ __forceinline__ Quad<T> read_any(const Matrix& x, int64_t row, const Place& at) {
  switch (x.dtype) {
    case kFloat32:
      return read<T, float>(x, row, at);
    case kBfloat16:
      return read<T, __nv_bfloat16>(x, row, at);
    case kFloat16:
      return read<T, __half>(x, row, at);
    default:
      return read<T, double>(x, row, at);
  }
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

}  // namespace
}  // namespace cwfast
