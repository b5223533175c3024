// What every kernel shares: the instruction set in use, the number of threads, Ctrl-C. Knows neither Python nor torch.
#pragma once
#include <atomic>
#include <chrono>
#include <cstddef>
#include <exception>
#include <mutex>
#include <string>
#include <vector>

namespace cwfast {

enum class Isa { scalar, avx2, avx512 };  // each runs what the ones before it run

std::vector<std::string> supported_isas();  // what this processor runs, best last
std::string current_isa();
void set_isa(const std::string& name);  // throws std::invalid_argument where this processor cannot run it
Isa isa();

// OpenMP's limit, which torch.set_num_threads also sets; 1 in a forked child. It is the calling thread's own, as are
// the changes made by set_threads, which also hold for torch's parallel loops.
int threads();
void set_threads(int count);

// Asks the kernel to back large memory that is about to be written by 2 MB pages, where it can: a first touch of each
// 4 KB costs more than writing them. A hint: it changes nothing else.
void prefer_huge_pages(void* data, size_t bytes);

// Thrown out of a kernel after `interrupt_check` said stop; the binding turns it into the pending Python exception.
struct Interrupted : std::exception {
  const char* what() const noexcept override { return "interrupted"; }
};
extern bool (*interrupt_check)();  // set by the bindings; called on the calling thread only, about ten times a second

// Carries "stop" and the first exception across an OpenMP region, out of which neither may break.
class Region {
 public:
  // Runs `work` unless the region has stopped. Call once per chunk of at most some milliseconds.
  template <class Work>
  void run(Work&& work) {
    if (stopped()) return;
    try {
      work();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      stop_ = true;
    }
  }
  void finish() const {  // after the region: rethrows what happened inside
    if (error_) std::rethrow_exception(error_);
    if (stop_) throw Interrupted();
  }

 private:
  bool stopped();
  std::atomic<bool> stop_{false};
  std::exception_ptr error_;
  std::mutex mutex_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace cwfast
