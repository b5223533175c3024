// One fiber per CUDA thread; blocks in a random order, several interleaved; barriers; what Python calls.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>

#include "runtime.h"

#if !COC_UC
asm(".text\n.globl coc_switch\n.type coc_switch,@function\ncoc_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\nmov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n.size coc_switch,.-coc_switch\n");
#endif
namespace coc {
Config config;
Ctx* ctx = nullptr;
static thread_local volatile unsigned tls_anchor;  // makes sure this module has a TLS segment
uint64_t rng_s;
char *stk, *dynbase;
unsigned char* tls0;
size_t tlsn, dynn, nclosure;
uintptr_t mod_a = ~0ul, mod_e;
const void* closure;
bool abort_;
uint32_t launch_first;
const char* kname;
#if COC_UC
ucontext_t sched_uc;
#else
void* sched_sp;
#endif
static Block* slots[MAXSLOT];
static Block* active;
static void (*body)(const void*);
static uint32_t serial = 1;
void yield() {
  Thread* t = me();
  t->st = READY;
  t->b->ready.push_back(t);
  to_sched();
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
