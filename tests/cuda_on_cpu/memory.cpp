// Memory that kernels may touch, its shadow, and copies under way from global to shared memory.
#include <sys/mman.h>

#include <algorithm>

#include "runtime.h"

namespace coc {
Shadow *sh_tls, *sh_dyn;
static std::map<uintptr_t, Region> regions;
static Region* last;
Shadow* mkshadow(size_t n) {
  return (Shadow*)mmap(0, n * sizeof(Shadow), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                       0);
}
void register_memory(void* p, size_t n) {
  regions[(uintptr_t)p] = Region{(uintptr_t)p, (uintptr_t)p + n, mkshadow(n ? n : 1)};
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
Region* find(uintptr_t a) {
  if (last && a >= last->a && a < last->e) return last;
  auto i = regions.upper_bound(a);
  if (i == regions.begin()) return nullptr;
  --i;
  return a < i->second.e ? last = &i->second : nullptr;
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
}  // namespace coc
