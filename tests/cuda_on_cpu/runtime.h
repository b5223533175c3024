// What the files of this runtime share; csrc/common/cuda_on_cpu.h is what kernels see of it. Compiled without
// -fsanitize=thread, also where the kernels are compiled with it.
//   scheduler.cpp  fibers, blocks in a random order, barriers, launches; what Python calls
//   warps.cpp      warp collectives: shuffles, votes, and the tensor-core instructions
//   memory.cpp     registered memory, its shadow, cp.async
//   races.cpp      checks of each access: bounds, alignment, initialisation, order
//   report.cpp     the text of errors: where in the source, which variable
#pragma once
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "common/cuda_on_cpu.h"
#if !defined(__x86_64__) || defined(COC_UCONTEXT)
#include <ucontext.h>
#define COC_UC 1
#else
#define COC_UC 0
extern "C" void coc_switch(void** save, void* to);
#endif

#pragma GCC visibility push(hidden)
namespace coc {
enum { READY, WARP, BAR, DONE };  // states of a thread
// One access: block serial, barrier epoch of the block, thread (bits 14 and 15: see Shadow), warp epoch.
struct Rec {
  uint32_t blk, be;
  uint16_t tid, we;
};
struct Shadow {  // of each byte: the last write (bit 15: atomic) and the last read (bit 14: by several threads)
  Rec w, r;
};
// What a block released (or another acquired) by fence and atomic: everything before a barrier epoch, and all of these
// threads in it.
struct Rel {
  uint32_t be;
  std::vector<uint16_t> tids;
};
using Clock = std::map<uint32_t, Rel>;  // by block serial
struct Cp {                             // a cp.async under way
  void* d;
  const void* s;
  size_t size, n;
  int grp;
};
struct Block;
struct Thread : Ctx {
  Block* b;
  unsigned t, wi;
  int st, line, pred, res;
  const char* op;
  bool dirty, fenced;
  uint32_t fence_be;
  Lane io;
  std::vector<Cp> cp;
  int grp;
#if COC_UC
  ucontext_t uc;
#else
  void* sp;
#endif
  char* stack;
};
struct Group {
  unsigned mask, arrived;
  WarpFn fn;
};
struct Warp {
  unsigned exited;
  uint16_t we;
  Group g[32];
  int ng;
};
struct Block {
  int slot;
  uint32_t serial;
  unsigned n, alive, nbar, bcnt;
  int bline;
  uint32_t be;
  bool live = false, unfenced;
  uint32_t unfenced_be;
  std::vector<Thread> th;
  std::vector<Warp> wp;
  std::vector<Thread*> ready;
  std::vector<unsigned char> tls;
  unsigned char* dyn;
  Clock acq;
};
constexpr size_t STK = 64 << 10, DYN = 256 << 10;
constexpr int MAXSLOT = 64;

extern uint64_t rng_s;
inline uint32_t rnd() {
  rng_s ^= rng_s << 13;
  rng_s ^= rng_s >> 7;
  rng_s ^= rng_s << 17;
  return (uint32_t)(rng_s >> 32);
}
inline Thread* me() { return (Thread*)ctx; }

// scheduler.cpp
extern char *stk, *dynbase;     // stacks of all fibers; dynamic shared memory of all resident blocks
extern unsigned char* tls0;     // this module's thread-local image: the shared memory of the running block
extern size_t tlsn, dynn;       // its bytes; bytes of dynamic shared memory asked for
extern uintptr_t mod_a, mod_e;  // where this module's code and constants lie
extern const void* closure;     // the kernel's parameters
extern size_t nclosure;
extern bool abort_;            // the launch is over
extern uint32_t launch_first;  // serial of the launch's first block
extern const char* kname;
#if COC_UC
extern ucontext_t sched_uc;
inline void to_sched() { swapcontext(&((Thread*)ctx)->uc, &sched_uc); }
#else
extern void* sched_sp;
inline void to_sched() { coc_switch(&((Thread*)ctx)->sp, sched_sp); }
#endif

// warps.cpp
void complete(Block* b, unsigned wi, int gi, Thread* self);  // all lanes of a collective are there

// memory.cpp
struct Region {
  uintptr_t a, e;
  Shadow* sh;
};
extern Shadow *sh_tls, *sh_dyn;
Shadow* mkshadow(size_t n);
Region* find(uintptr_t a);  // the registered memory that holds the address, or null

// races.cpp
extern bool instrumented;  // the kernels were compiled with the checks
extern std::unordered_map<void*, Clock> rel;
void touch_bytes(const void* p, size_t n, int kind, void* pc);

// report.cpp
bool unseen(const std::string& key);                      // true once
void note(const std::string& key, const std::string& m);  // one error per key
std::string who(const Thread* t);
std::string where(void* pc);   // file and line
std::string sym(uintptr_t a);  // the shared variable at this address
bool is_guard(size_t offset);  // of a thread_local class type, which gcc adds; not the kernel's
void read_syms(const char* file);
}  // namespace coc
#pragma GCC visibility pop
