// Faults on purpose: tests/sanitize.py demands that the sanitizers report each of them before their silence counts.
#include <cstdint>
#include <cstdlib>

extern "C" int overflow(int count) {  // address: a write past the end
  auto* entries = static_cast<volatile int32_t*>(std::malloc(static_cast<size_t>(count) * sizeof(int32_t)));
  entries[count] = 1;
  return entries[0];
}

extern "C" int shift(int by) { return 1 << by; }  // undefined: by >= 32

extern "C" int race(int count) {  // thread: chunks that share a counter
  int64_t sum = 0;
#pragma omp parallel for schedule(dynamic, 4) num_threads(4)
  for (int i = 0; i < count; ++i) sum = sum + i;
  return static_cast<int>(sum);
}

extern "C" int clean(int count) {  // no fault: the same loop, each chunk with its own place
  auto* entries = static_cast<int64_t*>(std::calloc(static_cast<size_t>(count), sizeof(int64_t)));
#pragma omp parallel for schedule(dynamic, 4) num_threads(4)
  for (int i = 0; i < count; ++i) entries[i] = i;
  int64_t sum = 0;
  for (int i = 0; i < count; ++i) sum += entries[i];
  std::free(entries);
  return static_cast<int>(sum);
}
