// Checks of every access that the kernels make: -fsanitize=thread has the compiler call the functions at the end.
#include <algorithm>

#include "runtime.h"

namespace coc {
bool instrumented;
std::unordered_map<void*, Clock> rel;
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
    if (!unseen(std::string(m) + std::to_string((uintptr_t)pc))) return;
    std::string w = where(pc) + sym(a);
    char x[200];
    snprintf(x, sizeof x, "%s: %zu-byte %s", m, n, K[kind]);
    note(m + w, who(t) + ": " + x + " at " + w);
  };
  if (a - (uintptr_t)tls0 < tlsn) {
    if (n == 1 && is_guard(a - (uintptr_t)tls0)) return;
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
      if (!unseen("r" + std::to_string((uintptr_t)pc))) {
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
      if (!unseen("r" + std::to_string((uintptr_t)pc))) {
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
void touch_bytes(const void* p, size_t n, int kind, void* pc) {
  for (size_t i = 0; i < n; ++i) touch((const char*)p + i, 1, kind, pc);
}
void touch(const void* p, size_t n, int kind, void* pc) {
  if (ctx && instrumented) access((uintptr_t)p, n, kind, pc);
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
}  // namespace coc

extern "C" {
#define H(name, n, k)                                                           \
  void name(void* p) {                                                          \
    if (coc::ctx) coc::access((uintptr_t)p, n, k, __builtin_return_address(0)); \
  }
#define HH(n)                        \
  H(__tsan_read##n, n, 0)            \
  H(__tsan_write##n, n, 1)           \
  H(__tsan_unaligned_read##n, n, 0)  \
  H(__tsan_unaligned_write##n, n, 1) \
  H(__tsan_volatile_read##n, n, 3)   \
  H(__tsan_volatile_write##n, n, 2)  \
  H(__tsan_unaligned_volatile_read##n, n, 3) H(__tsan_unaligned_volatile_write##n, n, 2)
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
