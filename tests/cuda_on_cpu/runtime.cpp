// Runtime of csrc/common/cuda_on_cpu.h: fibers, scheduler, warp collectives, shadow memory, race detector. Compiled
// without -fsanitize=thread, also where the kernels are compiled with it.
#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <map>
#include <set>
#include <unordered_map>
#include <vector>

#include "common/cuda_on_cpu.h"
#if !defined(__x86_64__) || defined(COC_UCONTEXT)
#include <ucontext.h>
#define COC_UC 1
#else
#define COC_UC 0
extern "C" void coc_switch(void** save, void* to);
asm(".text\n.globl coc_switch\n.type coc_switch,@function\ncoc_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\nmov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n.size coc_switch,.-coc_switch\n");
#endif
namespace coc {
Config config;
Ctx* ctx = nullptr;
static thread_local volatile unsigned tls_anchor;  // makes sure this module has a TLS segment
static std::string err;
static int nerr;
static std::set<std::string> seen;
static uint64_t rng_s;
static inline uint32_t rnd() {
  rng_s ^= rng_s << 13;
  rng_s ^= rng_s >> 7;
  rng_s ^= rng_s << 17;
  return (uint32_t)(rng_s >> 32);
}
enum { READY, WARP, BAR, DONE };
struct Rec {
  uint32_t blk, be;
  uint16_t tid, we;
};  // access record: block serial, barrier epoch, thread, warp epoch
struct Shadow {
  Rec w, r;
};  // per byte; tid bit15: atomic (w) / several readers (r)
struct Rel {
  uint32_t be;
  std::vector<uint16_t> tids;
};
using Clock = std::map<uint32_t, Rel>;
struct Cp {
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
static char *stk, *dynbase;
static Shadow *sh_tls, *sh_dyn;
static unsigned char* tls0;
static size_t tlsn;
static Block* slots[MAXSLOT];
static Block* active;
static void (*body)(const void*);
static const void* closure;
static size_t nclosure;
static bool abort_;
static uint32_t serial = 1, launch_first;
static size_t dynn;
static const char* kname;
static std::unordered_map<void*, Clock> rel;
#if COC_UC
static ucontext_t sched_uc;
static void to_sched() { swapcontext(&((Thread*)ctx)->uc, &sched_uc); }
#else
static void* sched_sp;
static void to_sched() { coc_switch(&((Thread*)ctx)->sp, sched_sp); }
#endif
static inline Thread* me() { return (Thread*)ctx; }
std::string errors(bool clear) {
  std::string e = err;
  if (clear) {
    err.clear();
    nerr = 0;
    seen.clear();
  }
  return e;
}
static void note(const std::string& key, const std::string& m) {
  if (!seen.insert(key).second) return;
  if (++nerr <= 20) err += std::string("[") + kname + "] " + m + "\n";
}
static std::string who(const Thread* t) {
  char s[96];
  snprintf(s, sizeof s, "block %u thread %u (warp %u lane %u)", t->bid.x, t->t, t->wi, t->lane);
  return s;
}
void fail(const char* f, ...) {
  char s[512];
  va_list a;
  va_start(a, f);
  vsnprintf(s, sizeof s, f, a);
  va_end(a);
  note(s, me() ? who(me()) + ": " + s : s);
  abort_ = true;
  if (ctx) to_sched();
}
// ---------------------------------------------------------------- memory regions
struct Region {
  uintptr_t a, e;
  Shadow* sh;
  size_t map;
};
static std::map<uintptr_t, Region> regions;
static Region* last;
static uintptr_t mod_a = ~0ul, mod_e;
static Shadow* mkshadow(size_t n) {
  return (Shadow*)mmap(0, n * sizeof(Shadow), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                       0);
}
void register_memory(void* p, size_t n) {
  regions[(uintptr_t)p] = Region{(uintptr_t)p, (uintptr_t)p + n, mkshadow(n ? n : 1), 0};
  last = nullptr;
}
void unregister_memory(void* p) {
  auto i = regions.find((uintptr_t)p);
  if (i == regions.end()) return;
  auto& r = i->second;
  munmap(r.sh, std::max<size_t>(1, r.e - r.a) * sizeof(Shadow));
  regions.erase(i);
  last = nullptr;
}
static Region* find(uintptr_t a) {
  if (last && a >= last->a && a < last->e) return last;
  auto i = regions.upper_bound(a);
  if (i == regions.begin()) return nullptr;
  --i;
  return a < i->second.e ? last = &i->second : nullptr;
}
static std::string where(void* pc) {
  Dl_info d;
  if (!dladdr(pc, &d) || !d.dli_fname) return "?";
  char c[600], o[300] = "";
  snprintf(c, sizeof c, "addr2line -s -e '%s' %#lx 2>/dev/null", d.dli_fname,
           (unsigned long)((char*)pc - 1 - (char*)d.dli_fbase));
  if (FILE* f = popen(c, "r")) {
    if (!fgets(o, sizeof o, f)) o[0] = 0;
    pclose(f);
  }
  std::string s = o;
  while (!s.empty() && s.back() == '\n') s.pop_back();
  return s;
}
struct Sym {
  size_t off, n;
  std::string name;
};
static std::vector<Sym> syms;
static std::set<size_t> guards;  // static __shared__ variables of this module
static std::string sym(uintptr_t a) {
  size_t o = a - (uintptr_t)tls0;
  for (auto& s : syms)
    if (o - s.off < s.n) return " in " + s.name + "+" + std::to_string(o - s.off);
  return "";
}
static void read_syms(const char* file) {
  FILE* f = fopen(file, "rb");
  if (!f) return;
  ElfW(Ehdr) h;
  if (fread(&h, sizeof h, 1, f) != 1) {
    fclose(f);
    return;
  }
  std::vector<ElfW(Shdr)> sh(h.e_shnum);
  auto rd = [&](void* p, size_t o, size_t n) { return !fseek(f, (long)o, SEEK_SET) && fread(p, 1, n, f) == n; };
  if (rd(sh.data(), h.e_shoff, sh.size() * sizeof(ElfW(Shdr))))
    for (auto& s : sh)
      if (s.sh_type == SHT_SYMTAB) {
        std::vector<ElfW(Sym)> v(s.sh_size / sizeof(ElfW(Sym)));
        std::vector<char> st(sh[s.sh_link].sh_size);
        rd(v.data(), s.sh_offset, s.sh_size);
        rd(st.data(), sh[s.sh_link].sh_offset, st.size());
        for (auto& y : v)
          if (ELF64_ST_TYPE(y.st_info) == STT_TLS && y.st_shndx) {
            std::string nm = &st[y.st_name];
            int e;
            if (nm.rfind("_ZGV", 0) == 0)
              guards.insert(y.st_value);  // gcc guards thread_local class types
            else {
              char* d = abi::__cxa_demangle(nm.c_str(), 0, 0, &e);
              std::string q = d ? d : nm;
              free(d);
              auto k = q.rfind("::");
              syms.push_back({(size_t)y.st_value, (size_t)y.st_size, k == std::string::npos ? q : q.substr(k + 2)});
            }
          }
      }
  fclose(f);
}
static bool hb(const Rec& r, Thread* t, bool shared) {  // does record r happen before now (thread t)?
  Block* b = t->b;
  unsigned rt = r.tid & 0x3fff;
  if (r.blk == b->serial)
    return r.be < b->be || (rt == t->t && !(r.tid & 0x4000)) ||
           (rt / 32 == t->wi && (int16_t)(b->wp[t->wi].we - r.we) > 0);
  if (shared || r.blk < launch_first) return true;
  auto i = b->acq.find(r.blk);
  if (i == b->acq.end()) return false;
  return r.be < i->second.be ||
         (r.be == i->second.be && std::count(i->second.tids.begin(), i->second.tids.end(), (uint16_t)rt));
}
static void access(uintptr_t a, size_t n, int kind, void* pc) {  // kind 0 read, 1 write, 2 atomic, 3 volatile read
  Thread* t = me();
  Block* b = t->b;
  Shadow* s;
  bool shared = true;
  static const char* K[] = {"read", "write", "atomic", "volatile read"};
  if (a - (uintptr_t)stk < STK * 1024ul * MAXSLOT || a - (uintptr_t)t < sizeof(Thread))
    return;  // local memory, threadIdx & co
  auto bad = [&](const char* m) {
    if (!seen.insert(std::string(m) + std::to_string((uintptr_t)pc)).second) return;
    std::string w = where(pc) + sym(a);
    char x[200];
    snprintf(x, sizeof x, "%s: %zu-byte %s", m, n, K[kind]);
    note(m + w, who(t) + ": " + x + " at " + w);
  };
  if (a - (uintptr_t)tls0 < tlsn) {
    if (n == 1 && guards.count(a - (uintptr_t)tls0)) return;
    s = sh_tls + (size_t)b->slot * tlsn + (a - (uintptr_t)tls0);
  } else if (a - (uintptr_t)dynbase < DYN * MAXSLOT) {
    size_t o = a - (uintptr_t)b->dyn;
    if (o + n > dynn) {
      bad("dynamic shared memory out of bounds");
      abort_ = true;
      to_sched();
    }
    s = sh_dyn + (size_t)b->slot * DYN + o;
  } else {
    Region* r = find(a);
    shared = false;
    if (!r) {
      if ((a >= mod_a && a < mod_e) || a - (uintptr_t)closure < nclosure) return;
      bad("global memory out of bounds");
      abort_ = true;
      to_sched();
      return;
    }
    if (a + n > r->e) {
      bad("global memory out of bounds (tail)");
      abort_ = true;
      to_sched();
      return;
    }
    s = r->sh + (a - r->a);
    if (kind) t->dirty = true, t->fenced = kind == 2 ? t->fenced : false;
    if (config.preempt_mem && rnd() % config.preempt_mem == 0) yield();
  }
  if ((n & (n - 1)) == 0 && (a & (n - 1))) {
    bad("misaligned access");
    abort_ = true;
    to_sched();
    return;
  }
  if (!config.races) return;
  Rec now{b->serial, b->be, (uint16_t)t->t, b->wp[t->wi].we};
  for (size_t i = 0; i < n; ++i) {
    Shadow& q = s[i];
    if (shared && (kind == 0 || kind > 1) && q.w.blk != b->serial) {
      bad("uninitialised shared memory");
      q.w = now;
    }
    bool watom = q.w.tid & 0x8000;
    if (q.w.blk && !(kind >= 2 && watom) && !hb(q.w, t, shared)) {
      if (!seen.insert("r" + std::to_string((uintptr_t)pc)).second) {
        q.w.blk = q.r.blk = 0;
        if (kind) q.w = now;
        continue;
      }
      std::string w = where(pc) + sym(a);
      char x[200];
      snprintf(x, sizeof x, " after %s by block #%u thread %u%s", watom ? "atomic" : "write", q.w.blk - launch_first,
               q.w.tid & 0x3fff, q.w.blk == b->serial ? " (same block)" : " (other block)");
      note("race" + w, who(t) + ": RACE on " + (shared ? "shared" : "global") + " memory: " + K[kind] + x + " at " + w);
      q.w.blk = 0;
    }
    if (kind && kind < 3 && q.r.blk && !hb(q.r, t, shared)) {
      if (!seen.insert("r" + std::to_string((uintptr_t)pc)).second) {
        q.r.blk = 0;
        q.w = now;
        continue;
      }
      std::string w = where(pc) + sym(a);
      char x[200];
      snprintf(x, sizeof x, " after read by block #%u thread %u", q.r.blk - launch_first, q.r.tid & 0x3fff);
      note("race" + w, who(t) + ": RACE on " + (shared ? "shared" : "global") + " memory: " + K[kind] + x + " at " + w);
      q.r.blk = 0;
    }
    if (kind == 1 || kind == 2) {
      q.w = now;
      if (kind == 2) q.w.tid |= 0x8000;
    } else if (kind == 0) {
      bool multi = q.r.blk == now.blk && q.r.be == now.be && ((q.r.tid & 0x3fff) != t->t || (q.r.tid & 0x4000));
      q.r = now;
      if (multi) q.r.tid |= 0x4000;
    }
  }
}
static bool instrumented;
void touch(const void* p, size_t n, int kind, void* pc);
static void touch_bytes(const void* p, size_t n, int kind, void* pc) {
  for (size_t i = 0; i < n; ++i) touch((const char*)p + i, 1, kind, pc);
}
void touch(const void* p, size_t n, int kind, void* pc) {
  if (ctx && instrumented) access((uintptr_t)p, n, kind, pc);
}
// ---------------------------------------------------------------- collectives, barriers, fences
void yield() {
  Thread* t = me();
  t->st = READY;
  t->b->ready.push_back(t);
  to_sched();
}
static void complete(Block* b, unsigned wi, int gi, Thread* self) {
  Warp& w = b->wp[wi];
  Group g = w.g[gi];
  w.g[gi] = w.g[--w.ng];
  Lane* L[32] = {};
  for (unsigned i = 0; i < 32; ++i)
    if (g.arrived >> i & 1) L[i] = &b->th[wi * 32 + i].io;
  g.fn(L, g.arrived);
  if (g.fn == on_sync) {
    ++w.we;
  }
  for (unsigned i = 0; i < 32; ++i)
    if (g.arrived >> i & 1) {
      Thread* t = &b->th[wi * 32 + i];
      t->st = READY;
      if (t != self) b->ready.push_back(t);
    }
}
void warp(const char* op, WarpFn fn, unsigned mask, const void* in, size_t nin, void* out, size_t nout, int line) {
  Thread* t = me();
  Block* b = t->b;
  Warp& w = b->wp[t->wi];
  if (!(mask >> t->lane & 1)) fail("%s line %d: calling lane not in mask %08x", op, line, mask);
  memcpy(t->io.in, in, nin);
  t->op = op;
  t->line = line;
  t->st = WARP;
  t->pred = (int)mask;
  int gi = 0;
  for (; gi < w.ng; ++gi)
    if (w.g[gi].mask == mask && w.g[gi].fn == fn) break;
  if (gi == w.ng) w.g[w.ng++] = Group{mask, 0, fn};
  w.g[gi].arrived |= 1u << t->lane;
  if (w.g[gi].arrived == (mask & ~w.exited))
    complete(b, t->wi, gi, t);
  else
    to_sched();
  memcpy(out, t->io.out, nout);
}
static void bar_done(Block* b, Thread* self) {
  if (b->alive < b->n && !config.allow_exit_before_barrier) {
    ctx = nullptr;
    char s[160];
    snprintf(s, sizeof s, "divergent barrier: %u of %u threads exited before the barrier at line %d", b->n - b->alive,
             b->n, b->bline);
    note(s, s);
    abort_ = true;
    if (self) {
      ctx = self;
      to_sched();
    }
    return;
  }
  unsigned cnt = b->bcnt, n = b->nbar;
  b->bcnt = b->nbar = 0;
  for (auto& t : b->th)
    if (t.st == BAR) {
      if (t.dirty && !t.fenced) {
        b->unfenced = true;
        b->unfenced_be = b->be;
      }
      t.res = t.pred == 1 ? (int)cnt : t.pred == 2 ? cnt == n : cnt != 0;
      t.st = READY;
      if (&t != self) b->ready.push_back(&t);
    }
  ++b->be;
}
int barrier(int pred, int what, int line) {
  Thread* t = me();
  Block* b = t->b;
  t->op = "syncthreads";
  t->line = line;
  t->pred = what;
  t->st = BAR;
  if (b->nbar++ == 0)
    b->bline = line;
  else if (b->bline != line)
    fail("divergent barrier: threads of one block wait at line %d and line %d", b->bline, line);
  b->bcnt += pred != 0;
  if (b->nbar == b->alive)
    bar_done(b, t);
  else
    to_sched();
  return t->res;
}
void fence(int scope) {
  Thread* t = me();
  if (scope) {
    t->fenced = true;
    t->dirty = false;
    t->fence_be = t->b->be;
    if (t->b->unfenced && t->b->be > t->b->unfenced_be) t->b->unfenced = false;
    if (config.preempt && rnd() % config.preempt == 0) yield();
  }
}
static bool is_shared(uintptr_t a) { return a - (uintptr_t)tls0 < tlsn || a - (uintptr_t)dynbase < DYN * MAXSLOT; }
__attribute__((noinline)) void atomic_access(void* p, size_t n) {
  Thread* t = me();
  if (!t) return;
  bool sh = is_shared((uintptr_t)p);
  if (!sh && config.preempt && rnd() % config.preempt == 0) yield();
  if (!instrumented) return;
  bool f = t->fenced;
  touch(p, n, 2, __builtin_return_address(0));
  if (sh) return;
  Block* b = t->b;
  auto it = rel.find(p);
  if (it != rel.end())
    for (auto& k : it->second)
      if (k.first != b->serial) {
        auto& q = b->acq[k.first];
        if (k.second.be > q.be)
          q = k.second;
        else if (k.second.be == q.be)
          q.tids.insert(q.tids.end(), k.second.tids.begin(), k.second.tids.end());
      }
  if (f) {
    auto& c = rel[p];
    for (auto& k : b->acq) {
      auto& q = c[k.first];
      if (k.second.be >= q.be) q = k.second;
    }
    uint32_t e = b->be;
    if (t->fence_be != e && b->unfenced) e = b->unfenced_be;
    auto& q = c[b->serial];
    if (e > q.be || q.tids.empty()) q = Rel{e, {}};
    q.tids.push_back((uint16_t)t->t);
  }
}
void copy_async(void* d, const void* s, size_t size, size_t n) {
  Thread* t = me();
  if ((uintptr_t)d % size || (n && (uintptr_t)s % size))
    fail("cp.async needs addresses that are multiples of %zu", size);
  if (n) touch_bytes(s, n, 0, __builtin_return_address(0));
  touch(d, size, 1, __builtin_return_address(0));
  memset(d, 0xCD, size);  // until it is waited for
  t->cp.push_back({d, s, size, n, t->grp});
}
void close_copies() { ++me()->grp; }
void wait_for_copies(int keep) {
  Thread* t = me();
  size_t k = 0;
  for (auto& c : t->cp)
    if (c.grp < t->grp - keep) {
      touch(c.d, c.size, 1, __builtin_return_address(0));
      memcpy(c.d, c.s, c.n);
      memset((char*)c.d + c.n, 0, c.size - c.n);
    } else
      t->cp[k++] = c;
  t->cp.resize(k);
}
unsigned char* dynamic_shared() { return me()->b->dyn; }
template <class T>
static T& as(unsigned char* p) {
  return *(T*)p;
}
void on_sync(Lane* const*, unsigned) {}
void on_shfl(Lane* const* L, unsigned m) {
  for (int i = 0; i < 32; ++i)
    if (m >> i & 1) {
      auto& s = as<Shuffle>(L[i]->in);
      if (!(m >> s.src & 1)) {
        fail("shfl reads lane %d which is not taking part (mask %08x)", s.src, m);
        return;
      }
      as<unsigned long long>(L[i]->out) = as<Shuffle>(L[s.src]->in).v;
    }
}
void on_ballot(Lane* const* L, unsigned m) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i)
    if (m >> i & 1) r |= (as<int>(L[i]->in) ? 1u : 0u) << i;
  for (int i = 0; i < 32; ++i)
    if (m >> i & 1) as<unsigned>(L[i]->out) = r;
}
void on_match(Lane* const* L, unsigned m) {
  for (int i = 0; i < 32; ++i)
    if (m >> i & 1) {
      unsigned r = 0;
      for (int j = 0; j < 32; ++j)
        if (m >> j & 1) r |= (as<unsigned long long>(L[i]->in) == as<unsigned long long>(L[j]->in) ? 1u : 0u) << j;
      as<unsigned>(L[i]->out) = r;
    }
}
// PTX ISA, fragments of m16n8k16: g = lane / 4, t = lane % 4.
template <class ToFloat>
static void mma_lanes(Lane* const* L, unsigned m, ToFloat f) {
  if (m != ~0u) {
    fail("mma with missing lanes");
    return;
  }
  float A[16][16], B[16][8];
  for (int l = 0; l < 32; ++l) {
    const MmaIn& x = as<MmaIn>(L[l]->in);
    int g = l / 4, t = l % 4;
    for (int v = 0; v < 8; ++v)
      A[g + (v / 2 % 2 ? 8 : 0)][2 * t + v % 2 + (v >= 4 ? 8 : 0)] = f(x.a[v / 2] >> (v % 2 * 16));
    for (int v = 0; v < 4; ++v) B[2 * t + v % 2 + (v >= 2 ? 8 : 0)][g] = f(x.b[v / 2] >> (v % 2 * 16));
  }
  for (int l = 0; l < 32; ++l) {
    const MmaIn x = as<MmaIn>(L[l]->in);
    int g = l / 4, t = l % 4;
    MmaOut& out = as<MmaOut>(L[l]->out);
    for (int v = 0; v < 4; ++v) {
      int r = g + (v >= 2 ? 8 : 0), c = 2 * t + v % 2;
      float s = 0;
      for (int k = 0; k < 16; ++k) s += A[r][k] * B[k][c];
      out.d[v] = x.c[v] + s;
    }
  }
}
void on_mma_bf16(Lane* const* L, unsigned m) {
  mma_lanes(L, m, [](unsigned x) { return bits<float>(x << 16); });
}
void on_mma_fp16(Lane* const* L, unsigned m) {
  mma_lanes(L, m, [](unsigned x) {
    __half_raw h;
    h.x = (unsigned short)x;
    return __half2float(__half(h));
  });
}
void on_ldmatrix(Lane* const* L, unsigned m) {
  if (m != ~0u) {
    fail("ldmatrix with missing lanes");
    return;
  }
  for (int l = 0; l < 32; ++l) {
    unsigned r[4];
    for (int j = 0; j < 4; ++j) {
      unsigned short e[2];
      for (int h = 0; h < 2; ++h) memcpy(&e[h], as<const unsigned char*>(L[j * 8 + l % 4 * 2 + h]->in) + l / 4 * 2, 2);
      r[j] = e[0] | (unsigned)e[1] << 16;
    }
    memcpy(L[l]->out, r, 16);
  }
}
void ldmatrix_transposed(unsigned (&r)[4], const void* row, int line) {
  touch(row, 16, 0, __builtin_return_address(0));
  auto out = warp_call<const void*, LdmatrixOut>("ldmatrix", on_ldmatrix, ~0u, row, line);
  memcpy(r, out.r, sizeof r);
}
// ---------------------------------------------------------------- scheduler
static void entry() {
  for (;;) {
    body(closure);
    Thread* t = me();
    Block* b = t->b;
    t->st = DONE;
    --b->alive;
    Warp& w = b->wp[t->wi];
    w.exited |= 1u << t->lane;
    if (!t->cp.empty()) note("cp", who(t) + ": exits with cp.async not waited for");
    for (int g = 0; g < w.ng; ++g)
      if (w.g[g].arrived == (w.g[g].mask & ~w.exited)) {
        complete(b, t->wi, g, nullptr);
        g = -1;
      }
    if (b->nbar && b->nbar == b->alive) bar_done(b, nullptr);
    ctx = t;
    to_sched();
  }
}
static void setup() {
  if (stk) return;
  stk =
      (char*)mmap(0, STK * 1024 * MAXSLOT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  dynbase = (char*)mmap(0, DYN * MAXSLOT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  tls_anchor = 1;
  dl_iterate_phdr(
      [](dl_phdr_info* i, size_t, void*) -> int {
        size_t tn = 0;
        bool mine = false;
        uintptr_t a = ~0ul, e = 0;
        for (int k = 0; k < i->dlpi_phnum; ++k) {
          auto& p = i->dlpi_phdr[k];
          uintptr_t s = i->dlpi_addr + p.p_vaddr;
          if (p.p_type == PT_TLS) tn = p.p_memsz;
          if (p.p_type == PT_LOAD) {
            a = std::min(a, s);
            e = std::max(e, s + p.p_memsz);
            if ((uintptr_t)&setup >= s && (uintptr_t)&setup < s + p.p_memsz) mine = true;
          }
        }
        if (mine) {
          tls0 = (unsigned char*)i->dlpi_tls_data;
          tlsn = tn;
          mod_a = a;
          mod_e = e;
          read_syms(*i->dlpi_name ? i->dlpi_name : "/proc/self/exe");
        }
        return mine;
      },
      nullptr);
  sh_tls = mkshadow(tlsn * MAXSLOT);
  sh_dyn = mkshadow(DYN * MAXSLOT);
}
static void activate(Block* b) {
  if (active == b) return;
  if (active && active->live) memcpy(active->tls.data(), tls0, tlsn);
  memcpy(tls0, b->tls.data(), tlsn);
  active = b;
}
static void start(Block* b, uint64_t id, dim3 g, dim3 d) {
  b->serial = serial++;
  b->n = b->alive = d.x * d.y * d.z;
  b->nbar = b->bcnt = 0;
  b->be = 1;
  b->live = true;
  b->unfenced = false;
  b->acq.clear();
  b->tls.assign(tlsn, 0);
  b->dyn = (unsigned char*)dynbase + (size_t)b->slot * DYN;
  if (config.poison) {
    memset(b->tls.data(), 0xCD, tlsn);
    memset(b->dyn, 0xCD, dynn);
  }
  if (b->th.size() != b->n) b->th.resize(b->n);
  b->wp.assign((b->n + 31) / 32, Warp());
  b->ready.clear();
  if (b->n % 32) b->wp.back().exited = ~0u << (b->n % 32);
  for (unsigned i = 0; i < b->n; ++i) {
    Thread& t = b->th[i];
    t.b = b;
    t.t = i;
    t.wi = i / 32;
    t.lane = i % 32;
    t.st = READY;
    t.dirty = t.fenced = false;
    t.fence_be = 0;
    t.grp = 0;
    t.cp.clear();
    t.tid = make_uint3(i % d.x, i / d.x % d.y, i / d.x / d.y);
    t.bid = make_uint3((unsigned)(id % g.x), (unsigned)(id / g.x % g.y), (unsigned)(id / g.x / g.y));
    t.bdim = d;
    t.gdim = g;
    t.stack = stk + ((size_t)b->slot * 1024 + i) * STK;
#if COC_UC
    getcontext(&t.uc);
    t.uc.uc_stack.ss_sp = t.stack;
    t.uc.uc_stack.ss_size = STK;
    t.uc.uc_link = nullptr;
    makecontext(&t.uc, entry, 0);
#else
    void** s = (void**)(t.stack + STK);
    *--s = nullptr;
    *--s = (void*)entry;
    for (int k = 0; k < 6; ++k) *--s = nullptr;
    t.sp = s;
#endif
    b->ready.push_back(&t);
  }
  if (!config.seed) std::reverse(b->ready.begin(), b->ready.end());
}
extern "C" __attribute__((weak)) void coc_instrumented_marker();
void launch(const char* name, dim3 g, dim3 d, size_t smem, void (*f)(const void*), const void* cl, size_t ncl) {
  setup();
  kname = name;
  body = f;
  closure = cl;
  nclosure = ncl;
  dynn = smem;
  abort_ = false;
  rng_s = config.seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  rel.clear();
  launch_first = serial;
  if (!d.x || d.x * d.y * d.z > 1024 || d.x * d.y * d.z == 0 || smem > 227 * 1024 || !g.x || !g.y || !g.z ||
      g.y > 65535 || g.z > 65535 || g.x > 2147483647u) {
    note("cfg", "invalid launch configuration");
    return;
  }
  std::vector<unsigned char> keep(tls0, tls0 + tlsn);
  uint64_t nb = config.n_only ? config.n_only : (uint64_t)g.x * g.y * g.z;
  std::vector<uint64_t> order(nb);
  for (uint64_t i = 0; i < nb; ++i) order[i] = config.n_only ? config.only_blocks[i] : i;
  if (config.seed)
    for (uint64_t i = nb; i > 1; --i) std::swap(order[i - 1], order[rnd() % i]);
  int R = (int)std::min<uint64_t>(nb, std::max(1, std::min(config.resident, MAXSLOT)));
  uint64_t next = 0;
  active = nullptr;
  std::vector<Block*> live;
  for (int i = 0; i < R; ++i) {
    if (!slots[i]) {
      slots[i] = new Block;
      slots[i]->slot = i;
    }
    start(slots[i], order[next++], g, d);
    live.push_back(slots[i]);
  }
  while (!live.empty() && !abort_) {
    size_t li = live.size() > 1 ? rnd() % live.size() : 0;
    Block* b = live[li];
    activate(b);
    for (int q = live.size() > 1 ? 1 + rnd() % 64 : 1 << 30; q > 0 && !b->ready.empty() && !abort_; --q) {
      if (config.seed) std::swap(b->ready.back(), b->ready[rnd() % b->ready.size()]);
      Thread* t = b->ready.back();
      b->ready.pop_back();
      ctx = t;
#if COC_UC
      swapcontext(&sched_uc, &t->uc);
#else
      coc_switch(&sched_sp, t->sp);
#endif
      ctx = nullptr;
    }
    if (b->ready.empty() && !abort_) {
      if (b->alive) {
        std::map<std::string, int> h;
        for (auto& t : b->th)
          if (t.st == WARP || t.st == BAR) {
            char s[120];
            snprintf(s, sizeof s, t.st == WARP ? "%s line %d mask %08x" : "%s line %d", t.op, t.line, (unsigned)t.pred);
            ++h[s];
          }
        std::string m = "DEADLOCK in block " + std::to_string(b->th[0].bid.x) + ":";
        for (auto& k : h) m += " " + std::to_string(k.second) + " threads in " + k.first + ";";
        m += " " + std::to_string(b->n - b->alive) + " exited";
        note(m, m);
        abort_ = true;
        break;
      }
      b->live = false;
      if (next < nb)
        start(b, order[next++], g, d);
      else
        live.erase(live.begin() + li);
      if (active == b) active = nullptr;
    }
  }
  for (auto* s : slots)
    if (s) s->live = false;
  memcpy(tls0, keep.data(), tlsn);
  ctx = nullptr;
  active = nullptr;
}
}  // namespace coc
// ---------------------------------------------------------------- our own "tsan runtime"
extern "C" {
#define H(name, n, k)                                                           \
  void name(void* p) {                                                          \
    if (coc::ctx) coc::access((uintptr_t)p, n, k, __builtin_return_address(0)); \
  }
#define HH(n)                                                                  \
  H(__tsan_read##n, n, 0)                                                      \
  H(__tsan_write##n, n, 1)                                                     \
  H(__tsan_unaligned_read##n, n, 0)                                            \
  H(__tsan_unaligned_write##n, n, 1)                                           \
  H(__tsan_volatile_read##n, n, 3)                                             \
  H(__tsan_volatile_write##n, n, 2) H(__tsan_unaligned_volatile_read##n, n, 3) \
      H(__tsan_unaligned_volatile_write##n, n, 2)
HH(1) HH(2) HH(4) HH(8) HH(16) void __tsan_read_range(void* p, unsigned long n) {
  if (coc::ctx) coc::access((uintptr_t)p, n, 0, __builtin_return_address(0));
}
void __tsan_write_range(void* p, unsigned long n) {
  if (coc::ctx) coc::access((uintptr_t)p, n, 1, __builtin_return_address(0));
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_init() { coc::instrumented = true; }
}

// ---------------------------------------------------------------- for ctypes
extern "C" {
void coc_configure(unsigned long long seed, int resident, const unsigned* only_blocks, unsigned n_only) {
  coc::config.seed = seed;
  coc::config.resident = resident;
  coc::config.only_blocks = only_blocks;
  coc::config.n_only = n_only;
}
void coc_register(void* p, size_t n) { coc::register_memory(p, n); }
void coc_unregister(void* p) { coc::unregister_memory(p); }
const char* coc_errors() {
  static std::string last;
  last = coc::errors();
  return last.c_str();
}
}
