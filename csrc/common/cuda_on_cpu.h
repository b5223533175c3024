// Kernels on the CPU: what g++ includes in place of CUDA's device headers. One fiber per CUDA thread, blocks
// interleaved on one OS thread in an order drawn from a seed; the runtime is tests/cuda_on_cpu/. Built for tests only.
// Compiled with -fsanitize=thread, but linked without its library, every load and store goes through the runtime's own
// __tsan_* functions: races in shared and global memory, bounds, misalignment, uninitialised shared memory.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>  // toolkit's own host paths
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>
#undef __shared__
#define __shared__ thread_local  // block-scope thread_local is static; the TLS image is swapped per block
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
using cudaStream_t = struct CUstream_st*;

namespace coc {
struct Config {         // all knobs of one run; tests sweep seed / resident
  uint64_t seed = 1;    // 0 = in-order, no shuffling
  int resident = 2;     // blocks interleaved
  int preempt = 8;      // 1/preempt chance to yield at a global atomic or fence (0 = never)
  int preempt_mem = 0;  // same at every instrumented global access
  bool poison = true, races = true, allow_exit_before_barrier = false;
  const unsigned* only_blocks = nullptr;
  unsigned n_only = 0;  // run a few blocks of a huge grid
};
extern Config config;
void launch(const char* name, dim3 grid, dim3 block, size_t smem, void (*body)(const void*), const void* closure,
            size_t nclosure);
template <class F>
void launch_closure(const char* name, dim3 g, dim3 b, size_t smem, const F& f) {  // closure = the kernel parameters
  launch(name, g, b, smem, [](const void* p) { (*(const F*)p)(); }, &f, sizeof(F));
}
std::string errors(bool clear = true);    // "" if clean
void register_memory(void* p, size_t n);  // let a torch tensor / host vector count as device memory
void unregister_memory(void* p);
unsigned char* dynamic_shared();
inline dim3 as_dim3(dim3 d) { return d; }
inline dim3 as_dim3(long long n) { return dim3((unsigned)n, 1, 1); }
struct Ctx {
  uint3 tid, bid;
  dim3 bdim, gdim;
  unsigned lane;
};
extern Ctx* ctx;  // current CUDA thread
// warp collective: the last arriving lane of `mask` runs fn over all lanes. Open for project PTX wrappers.
struct Lane {
  alignas(16) unsigned char in[96], out[96];
};
using WarpFn = void (*)(Lane* const lanes[32], unsigned mask);
void warp(const char* op, WarpFn fn, unsigned mask, const void* in, size_t nin, void* out, size_t nout, int line);
int barrier(int pred, int what, int line);                // 0 plain 1 count 2 and 3 or
void atomic_access(void* p, size_t n);                    // hook before an atomic
void touch(const void* p, size_t n, int kind, void* pc);  // check an access made by a PTX wrapper (0 read, 1 write)
void fence(int scope);                                    // 0 block 1 gpu
void fail(const char* fmt, ...);                          // record; kills the launch
void yield();
void copy_async(void* shared, const void* global, size_t size, size_t bytes);  // the first bytes of size; zero behind
void close_copies();
void wait_for_copies(int keep);
template <class I, class O>
O warp_call(const char* op, WarpFn fn, unsigned m, const I& in, int line) {
  O o;
  warp(op, fn, m, &in, sizeof(I), &o, sizeof(O), line);
  return o;
}
template <class T>
struct id {
  using type = T;
};
struct Shuffle {
  unsigned long long v;
  int src;
};
void on_shfl(Lane* const*, unsigned);
void on_ballot(Lane* const*, unsigned);
void on_match(Lane* const*, unsigned);
void on_sync(Lane* const*, unsigned);
// a warp's matrix product and transposed loads; types: see device.h
void on_mma_bf16(Lane* const*, unsigned);
void on_mma_fp16(Lane* const*, unsigned);
void on_ldmatrix(Lane* const*, unsigned);
void on_ldmatrix_transposed(Lane* const*, unsigned);
struct MmaIn {
  unsigned a[4], b[2];
  float c[4];
};
struct MmaOut {
  float d[4];
};
struct LdmatrixOut {
  unsigned r[4];
};
template <class T>
void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], int line) {
  MmaIn in;
  MmaOut out;
  memcpy(in.a, a, sizeof in.a);
  memcpy(in.b, b, sizeof in.b);
  memcpy(in.c, d, sizeof in.c);
  warp("mma", std::is_same<T, __half>::value ? on_mma_fp16 : on_mma_bf16, ~0u, &in, sizeof in, &out, sizeof out, line);
  memcpy(d, out.d, sizeof out.d);
}
void ldmatrix(unsigned (&r)[4], const void* row, int line);
void ldmatrix_transposed(unsigned (&r)[4], const void* row, int line);
template <class T>
T shfl(unsigned m, T v, int src, int line) {
  static_assert(sizeof(T) <= 8, "");
  Shuffle s{0, src};
  memcpy(&s.v, &v, sizeof(T));
  auto r = warp_call<Shuffle, unsigned long long>("shfl", on_shfl, m, s, line);
  T o;
  memcpy(&o, &r, sizeof(T));
  return o;
}
template <class To, class From>
To bits(From f) {
  To t;
  static_assert(sizeof(To) == sizeof(From), "");
  memcpy(&t, &f, sizeof t);
  return t;
}
}  // namespace coc

#define threadIdx (::coc::ctx->tid)
#define blockIdx (::coc::ctx->bid)
#define blockDim (::coc::ctx->bdim)
#define gridDim (::coc::ctx->gdim)
constexpr int warpSize = 32;
#define COC_LINE int line_ = __builtin_LINE()
inline void __syncthreads(COC_LINE) { coc::barrier(0, 0, line_); }
inline int __syncthreads_count(int p, COC_LINE) { return coc::barrier(p, 1, line_); }
inline int __syncthreads_and(int p, COC_LINE) { return coc::barrier(p, 2, line_); }
inline int __syncthreads_or(int p, COC_LINE) { return coc::barrier(p, 3, line_); }
inline void __syncwarp(unsigned m = ~0u, COC_LINE) {
  int z = 0;
  coc::warp("syncwarp", coc::on_sync, m, &z, 4, &z, 4, line_);
}
inline void __threadfence() { coc::fence(1); }
inline void __threadfence_block() { coc::fence(0); }
inline void __threadfence_system() { coc::fence(1); }
inline unsigned __ballot_sync(unsigned m, int p, COC_LINE) {
  return coc::warp_call<int, unsigned>("ballot", coc::on_ballot, m, p != 0, line_);
}
inline int __any_sync(unsigned m, int p, COC_LINE) {
  return coc::warp_call<int, unsigned>("any", coc::on_ballot, m, p != 0, line_) != 0;
}
inline int __all_sync(unsigned m, int p, COC_LINE) {
  return coc::warp_call<int, unsigned>("all", coc::on_ballot, m, p == 0, line_) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned m, T v, COC_LINE) {
  unsigned long long b = 0;
  memcpy(&b, &v, sizeof v);
  return coc::warp_call<unsigned long long, unsigned>("match_any", coc::on_match, m, b, line_);
}
template <class T>
unsigned __match_all_sync(unsigned m, T v, int* p, COC_LINE) {
  unsigned r = __match_any_sync(m, v, line_);
  *p = __all_sync(m, r == m, line_);
  return *p ? m : 0;
}
template <class T>
T __shfl_sync(unsigned m, T v, int src, int w = 32, COC_LINE) {
  int l = coc::ctx->lane;
  return coc::shfl(m, v, (l & ~(w - 1)) | (src & (w - 1)), line_);
}
template <class T>
T __shfl_xor_sync(unsigned m, T v, int x, int w = 32, COC_LINE) {
  int l = coc::ctx->lane, s = l ^ x;
  return coc::shfl(m, v, s < (l & ~(w - 1)) + w ? s : l, line_);
}
template <class T>
T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32, COC_LINE) {
  int l = coc::ctx->lane, s = l + (int)d;
  return coc::shfl(m, v, s < (l & ~(w - 1)) + w ? s : l, line_);
}
template <class T>
T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32, COC_LINE) {
  int l = coc::ctx->lane, s = l - (int)d;
  return coc::shfl(m, v, s >= (l & ~(w - 1)) ? s : l, line_);
}
namespace coc {
template <class T, class F>
T warp_reduce(unsigned m, T v, F f, int ln) {  // sm_80 redux.sync
  T a = v;
  bool first = true;
  for (int i = 0; i < 32; ++i)
    if (m >> i & 1) {
      T x = shfl(m, v, i, ln);
      a = first ? x : f(a, x);
      first = false;
    }
  return a;
}
}  // namespace coc
template <class T>
T __reduce_add_sync(unsigned m, T v, COC_LINE) {
  return coc::warp_reduce(m, v, [](T a, T b) { return T(a + b); }, line_);
}
template <class T>
T __reduce_min_sync(unsigned m, T v, COC_LINE) {
  return coc::warp_reduce(m, v, [](T a, T b) { return a < b ? a : b; }, line_);
}
template <class T>
T __reduce_max_sync(unsigned m, T v, COC_LINE) {
  return coc::warp_reduce(m, v, [](T a, T b) { return a < b ? b : a; }, line_);
}
template <class T>
T __reduce_or_sync(unsigned m, T v, COC_LINE) {
  return coc::warp_reduce(m, v, [](T a, T b) { return T(a | b); }, line_);
}
template <class T>
T __reduce_and_sync(unsigned m, T v, COC_LINE) {
  return coc::warp_reduce(m, v, [](T a, T b) { return T(a & b); }, line_);
}
#define COC_NOT_INSTRUMENTED __attribute__((no_sanitize("thread")))
#define COC_ATOMIC(name, expr)                                            \
  template <class T>                                                      \
  COC_NOT_INSTRUMENTED inline T name(T* p, typename coc::id<T>::type v) { \
    static_assert(sizeof(T) >= 4, "no 8/16-bit hardware form");           \
    coc::atomic_access((void*)p, sizeof(T));                              \
    T o = *p;                                                             \
    *p = (expr);                                                          \
    return o;                                                             \
  }
COC_ATOMIC(atomicAdd, o + v);
COC_ATOMIC(atomicSub, o - v);
COC_ATOMIC(atomicMax, o < v ? v : o);
COC_ATOMIC(atomicMin, v < o ? v : o);
COC_ATOMIC(atomicExch, v);
COC_ATOMIC(atomicOr, o | v);
COC_ATOMIC(atomicAnd, o& v);
COC_ATOMIC(atomicXor, o ^ v);
COC_ATOMIC(atomicInc, o >= v ? 0 : o + 1);
COC_ATOMIC(atomicDec, (o == 0 || o > v) ? v : o - 1);
template <class T>
COC_NOT_INSTRUMENTED inline T atomicCAS(T* p, typename coc::id<T>::type c, typename coc::id<T>::type v) {
  coc::atomic_access((void*)p, sizeof(T));
  T o = *p;
  if (o == c) *p = v;
  return o;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned s) {
  s &= 31;
  return s ? hi << s | lo >> (32 - s) : hi;
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned s) {
  s &= 31;
  return s ? lo >> s | hi << (32 - s) : lo;
}
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline void __stcs(T* p, typename coc::id<T>::type v) {
  *p = v;
}
template <class T>
inline void __stcg(T* p, typename coc::id<T>::type v) {
  *p = v;
}
inline unsigned __float_as_uint(float f) { return coc::bits<unsigned>(f); }
inline int __float_as_int(float f) { return coc::bits<int>(f); }
inline float __uint_as_float(unsigned u) { return coc::bits<float>(u); }
inline float __int_as_float(int u) { return coc::bits<float>(u); }
inline long long __double_as_longlong(double d) { return coc::bits<long long>(d); }
inline double __longlong_as_double(long long d) { return coc::bits<double>(d); }
inline float __fmul_rn(float a, float b) { return a * b; }  // build with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }  // NOT bit-equal to the GPU's approximation
inline void __trap() { coc::fail("__trap()"); }
inline void __nanosleep(unsigned) { coc::yield(); }
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
