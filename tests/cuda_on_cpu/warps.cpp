// Warp collectives: the last lane to arrive computes for all of them. Shuffles, votes, and tensor-core instructions.
#include "runtime.h"

namespace coc {
void complete(Block* b, unsigned wi, int gi, Thread* self) {
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
// Four 8 x 8 matrices of 16-bit entries; lane l gives row l % 8 of matrix l / 8.
static void ldmatrix_lanes(Lane* const* L, unsigned m, bool transposed) {
  if (m != ~0u) {
    fail("ldmatrix with missing lanes");
    return;
  }
  for (int l = 0; l < 32; ++l) {
    unsigned r[4];
    for (int j = 0; j < 4; ++j) {
      unsigned short e[2];
      for (int h = 0; h < 2; ++h) {
        const int row = transposed ? l % 4 * 2 + h : l / 4, column = transposed ? l / 4 : l % 4 * 2 + h;
        memcpy(&e[h], as<const unsigned char*>(L[j * 8 + row]->in) + column * 2, 2);
      }
      r[j] = e[0] | (unsigned)e[1] << 16;
    }
    memcpy(L[l]->out, r, 16);
  }
}
void on_ldmatrix(Lane* const* L, unsigned m) { ldmatrix_lanes(L, m, false); }
void on_ldmatrix_transposed(Lane* const* L, unsigned m) { ldmatrix_lanes(L, m, true); }
static void ldmatrix_call(unsigned (&r)[4], const void* row, WarpFn fn, int line) {
  auto out = warp_call<const void*, LdmatrixOut>("ldmatrix", fn, ~0u, row, line);
  memcpy(r, out.r, sizeof r);
}
void ldmatrix(unsigned (&r)[4], const void* row, int line) {
  touch(row, 16, 0, __builtin_return_address(0));
  ldmatrix_call(r, row, on_ldmatrix, line);
}
void ldmatrix_transposed(unsigned (&r)[4], const void* row, int line) {
  touch(row, 16, 0, __builtin_return_address(0));
  ldmatrix_call(r, row, on_ldmatrix_transposed, line);
}
}  // namespace coc
