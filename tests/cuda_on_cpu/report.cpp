// Errors as text: each once, with its place in the source and the name of the shared variable.
#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>

#include <cstdarg>
#include <set>

#include "runtime.h"

namespace coc {
static std::string err;
static int nerr;
static std::set<std::string> seen;
std::string errors(bool clear) {
  std::string e = err;
  if (clear) {
    err.clear();
    nerr = 0;
    seen.clear();
  }
  return e;
}
bool unseen(const std::string& key) { return seen.insert(key).second; }
void note(const std::string& key, const std::string& m) {
  if (!unseen(key)) return;
  if (++nerr <= 20) err += std::string("[") + kname + "] " + m + "\n";
}
std::string who(const Thread* t) {
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
std::string where(void* pc) {
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
bool is_guard(size_t offset) { return guards.count(offset) != 0; }
std::string sym(uintptr_t a) {
  size_t o = a - (uintptr_t)tls0;
  for (auto& s : syms)
    if (o - s.off < s.n) return " in " + s.name + "+" + std::to_string(o - s.off);
  return "";
}
void read_syms(const char* file) {
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
}  // namespace coc
