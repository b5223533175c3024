#include "runtime.h"

#include <omp.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

namespace cwfast {
namespace {

// libgomp's threads do not survive fork(): a forked child that starts a parallel region hangs, so it runs serially.
std::atomic<bool> forked{false};
const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });

const char* name_of(Isa value) { return value == Isa::avx512 ? "avx512" : value == Isa::avx2 ? "avx2" : "scalar"; }

std::vector<Isa> detect() {
  std::vector<Isa> found{Isa::scalar};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    found.push_back(Isa::avx2);
  if (found.back() == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    found.push_back(Isa::avx512);
#endif
  return found;
}

std::atomic<Isa> chosen{detect().back()};

}  // namespace

bool (*interrupt_check)() = nullptr;

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa value : detect()) names.push_back(name_of(value));
  return names;
}

std::string current_isa() { return name_of(isa()); }

void set_isa(const std::string& name) {
  const std::vector<Isa> have = detect();
  const auto hit = std::find_if(have.begin(), have.end(), [&](Isa value) { return name == name_of(value); });
  if (hit == have.end()) {
    std::string list;
    for (Isa value : have) list += std::string(list.empty() ? "" : ", ") + name_of(value);
    throw std::invalid_argument("the instruction set must be one that this processor runs (" + list + "); got '" +
                                name + "'");
  }
  chosen = *hit;
}

Isa isa() { return chosen; }

int threads() { return forked ? 1 : omp_get_max_threads(); }

void set_threads(int count) { omp_set_num_threads(count); }

void prefer_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

bool Region::stopped() {
  if (stop_) return true;
  if (omp_get_thread_num() != 0 || interrupt_check == nullptr) return false;  // thread 0 is the one that called
  const auto now = std::chrono::steady_clock::now();
  if (now - last_ < std::chrono::milliseconds(100)) return false;
  last_ = now;
  if (interrupt_check()) stop_ = true;
  return stop_;
}

}  // namespace cwfast
