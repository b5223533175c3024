// What a .cu file includes. nvcc compiles it for a GPU; g++ compiles the same file for the tests, which run it on the
// CPU (cuda_on_cpu.h). The only place with inline PTX: every wrapper has a host twin of the same meaning.
#pragma once
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define CW_ON_CPU 0
#define CW_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
#define CW_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#define CW_ON_CPU 1
#include "cuda_on_cpu.h"
#define CW_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                             \
  ::coc::launch_closure(#kernel, ::coc::as_dim3(grid), ::coc::as_dim3(block), (shared_bytes), \
                        [=]() { (kernel)(__VA_ARGS__); })
#define CW_DYNAMIC_SHARED(name) unsigned char* name = ::coc::dynamic_shared()
#endif

namespace cwfast {

#if CW_ON_CPU
template <class Kernel>
int allow_shared(Kernel*, int) {
  return 0;
}
inline int launch_status() { return 0; }
struct DeviceGuard {
  explicit DeviceGuard(int) {}
  int status = 0;
};
#else
// More than 48 KB of shared memory are had on request only.
template <class Kernel>
int allow_shared(Kernel* kernel, int bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              bytes);
}
inline int launch_status() { return cudaGetLastError(); }
// Makes a device current and puts the caller's back: torch keeps its own idea of which is.
struct DeviceGuard {
  explicit DeviceGuard(int device) : status(cudaGetDevice(&before)) {
    if (status == 0) status = cudaSetDevice(device);
  }
  ~DeviceGuard() { cudaSetDevice(before); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  int before = 0, status;
};
#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// d += a b for one warp: a [16, 16], b [16, 8], d [16, 8]; mma.sync.aligned.m16n8k16.row.col.f32.T.T.f32.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if CW_ON_CPU
  coc::mma<T>(d, a, b, __builtin_LINE());
#else
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8 x 8 matrices of 16-bit entries, each transposed: lane l gives the address of row l % 8 of matrix l / 8 and
// gets rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4; ldmatrix.sync.aligned.m8n8.x4.trans.
__device__ __forceinline__ void ldmatrix_x4_transposed(unsigned (&r)[4], const void* row) {
#if CW_ON_CPU
  coc::ldmatrix_transposed(r, row, __builtin_LINE());
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

// The same, not transposed: lane l gets entries 2 (l % 4) and 2 (l % 4) + 1 of row l / 4;
// ldmatrix.sync.aligned.m8n8.x4.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
#if CW_ON_CPU
  coc::ldmatrix(r, row, __builtin_LINE());
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

// Starts to copy the first `bytes` of 16 (the rest becomes zero) from global to shared memory, both 16-byte aligned.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes) {
#if CW_ON_CPU
  coc::copy_async(shared, global, 16, bytes);
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
#endif
}

// Closes the group of copies started since the last close; it may be empty.
__device__ __forceinline__ void close_copies() {
#if CW_ON_CPU
  coc::close_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kKeep groups of this thread's copies are still under way.
template <int kKeep>
__device__ __forceinline__ void wait_for_copies() {
#if CW_ON_CPU
  coc::wait_for_copies(kKeep);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kKeep) : "memory");
#endif
}

}  // namespace cwfast
