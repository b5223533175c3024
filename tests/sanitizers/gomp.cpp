// A stand-in for libgomp in builds under the thread sanitizer, which does not see the futexes of the real one and would
// report every fork and join as a race. The compiler's OpenMP calls land here: real threads by pthread_create and
// pthread_join, which the sanitizer follows. Chunks are handed out by relaxed atomics, so that the loop's own
// bookkeeping orders nothing and hides no race between two of them. One loop per region and no nesting, as in csrc/cpu.
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <vector>

namespace {

struct Team {
  void (*work)(void*);
  void* data;
  unsigned threads;
  std::atomic<long> chunks{0};  // handed out so far
};

struct Member {
  Team* team;
  unsigned index;
  long begin, end, stride;  // of the loop; stride: how far the variable goes in a chunk
};

thread_local Member self{};
pthread_mutex_t critical = PTHREAD_MUTEX_INITIALIZER;

constexpr unsigned kThreads = 4;  // whatever the machine has: more threads, more chances to see a race

void* run_member(void* argument) {
  self = *static_cast<Member*>(argument);
  self.team->work(self.team->data);
  self = {};
  return nullptr;
}

bool next_chunk(long* first, long* last) {
  const long from = self.begin + self.team->chunks.fetch_add(1, std::memory_order_relaxed) * self.stride;
  if (from >= self.end) return false;
  *first = from;
  *last = from + self.stride < self.end ? from + self.stride : self.end;
  return true;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return static_cast<int>(self.index); }
int omp_get_num_threads() { return self.team ? static_cast<int>(self.team->threads) : 1; }
int omp_get_max_threads() { return kThreads; }

void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  if (self.team) std::abort();  // nested
  Team team{work, data, threads ? threads : kThreads};
  std::vector<Member> members(team.threads);
  std::vector<pthread_t> ids(team.threads);
  for (unsigned i = 0; i < team.threads; ++i) members[i] = {&team, i, 0, 0, 0};
  pthread_attr_t small;  // the C library keeps 40 MB of stacks for later threads; freeing more is reported as a race
  if (pthread_attr_init(&small) || pthread_attr_setstacksize(&small, 2 << 20)) std::abort();
  for (unsigned i = 1; i < team.threads; ++i)
    if (pthread_create(&ids[i], &small, run_member, &members[i])) std::abort();
  pthread_attr_destroy(&small);
  run_member(&members[0]);
  for (unsigned i = 1; i < team.threads; ++i) pthread_join(ids[i], nullptr);
}

bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long step, long chunk, long* first, long* last) {
  if (step < 1) std::abort();
  self.begin = begin, self.end = end, self.stride = chunk * step;
  return next_chunk(first, last);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) { return next_chunk(first, last); }
void GOMP_loop_end() {}  // the barrier after a loop is left out: what follows may not rely on it unseen
void GOMP_loop_end_nowait() {}
void GOMP_critical_start() { pthread_mutex_lock(&critical); }
void GOMP_critical_end() { pthread_mutex_unlock(&critical); }
void GOMP_atomic_start() { pthread_mutex_lock(&critical); }
void GOMP_atomic_end() { pthread_mutex_unlock(&critical); }

}  // extern "C"
