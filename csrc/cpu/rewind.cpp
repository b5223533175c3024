// rewind_, gather and scatter_ on the CPU: only the selected entries are touched, by runs of blocks, in parallel.
// Reference: cwfast.reference. Called by cwfast/ops/rewind.py. Traffic: the picks, and two entries per selected one.
#include "rewind.h"

#include <omp.h>

#include <algorithm>
#include <utility>

#include "cpu/picks.h"
#include "runtime.h"

namespace cwfast {
namespace {

constexpr int kAhead = 32;           // list entries between prefetch and use
constexpr int64_t kAlone = 1 << 14;  // of work_of: one thread is through with it before another would be awake

// Entries of lists, and words of packed bits (64 entries each, of which any number is selected).
int64_t work_of(const std::vector<Picks>& picks) {
  int64_t work = 0;
  for (const Picks& p : picks) work += p.offset != nullptr ? p.k : p.numel / 64;
  return work;
}

template <class Work>
void for_each_run(const std::vector<Picks>& picks, const std::vector<Run>& runs, Work work) {
  const int count = work_of(picks) <= kAlone ? 1 : threads();
  Region region;
#pragma omp parallel for schedule(dynamic) num_threads(count) if (count > 1)
  for (int64_t i = 0; i < static_cast<int64_t>(runs.size()); ++i)
    region.run([&, i] { work(static_cast<size_t>(i), runs[static_cast<size_t>(i)]); });
  region.finish();
}

// The words of a run's packed bits: [first, last).
std::pair<int64_t, int64_t> words_of(const Picks& p, const Run& run) {
  return {run.first * (kBlock / 64), (std::min(run.last * kBlock, p.numel) + 63) / 64};
}

int64_t count_run(const Picks& p, const Run& run) {
  if (p.offset != nullptr) return p.offset[run.last] - p.offset[run.first];
  int64_t count = 0;
  for (auto [word, end] = words_of(p, run); word < end; ++word) count += __builtin_popcountll(p.bits[word]);
  return count;
}

// Calls use(flat index) for the run's selected entries in order, prefetch(flat index) some entries earlier.
template <class Prefetch, class Use>
void visit(const Picks& p, const Run& run, Prefetch prefetch, Use use) {
  if (p.offset != nullptr) {
    const int64_t end = p.offset[run.last];
    Cursor cursor{p, run.first}, ahead{p, run.first};
    for (int i = 0; i < kAhead && ahead.at < end; ++i) prefetch(ahead.next());
    while (ahead.at < end) {
      prefetch(ahead.next());
      use(cursor.next());
    }
    while (cursor.at < end) use(cursor.next());
    return;
  }
  for (auto [word, end] = words_of(p, run); word < end; ++word)
    for (uint64_t left = p.bits[word]; left; left &= left - 1) use(64 * word + __builtin_ctzll(left));
}

// Where entry `flat` of a view lies, in entries.
inline int64_t place(const View& v, int64_t flat) {
  if (v.sizes.empty()) return flat;
  int64_t at = 0;
  for (size_t d = v.sizes.size(); d-- > 0; flat /= v.sizes[d]) at += flat % v.sizes[d] * v.strides[d];
  return at;
}

// The position of each run's first selected entry among those of its tensor.
std::vector<int64_t> first_ranks(const std::vector<Picks>& picks, const std::vector<Run>& runs) {
  std::vector<int64_t> rank(runs.size());
  if (std::all_of(picks.begin(), picks.end(), [](const Picks& p) { return p.offset != nullptr; })) {
    for (size_t i = 0; i < runs.size(); ++i) rank[i] = picks[runs[i].tensor].offset[runs[i].first];
    return rank;  // lists know it
  }
  for_each_run(picks, runs, [&](size_t i, const Run& run) { rank[i] = count_run(picks[run.tensor], run); });
  int64_t sum = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    if (runs[i].first == 0) sum = 0;
    sum += std::exchange(rank[i], sum);
  }
  return rank;
}

template <class T>
void rewind_typed(const std::vector<View>& weights, const std::vector<View>& initial, const std::vector<Picks>& picks) {
  for_each_run(picks, runs_of(picks), [&](size_t, const Run& run) {
    const View &w = weights[run.tensor], &w0 = initial[run.tensor];
    T* to = reinterpret_cast<T*>(w.data);
    const T* from = reinterpret_cast<const T*>(w0.data);
    const auto prefetch = [&](int64_t i) {
      __builtin_prefetch(to + place(w, i), 1);
      __builtin_prefetch(from + place(w0, i));
    };
    visit(picks[run.tensor], run, prefetch, [&](int64_t i) { to[place(w, i)] = from[place(w0, i)]; });
  });
}

// move(entry of the weight, entry of the compact values)
template <class T, class Value, class Move>
void move_typed(const std::vector<View>& weights, const std::vector<Picks>& picks, const std::vector<Value>& values,
                Move move) {
  const std::vector<Run> runs = runs_of(picks);
  const std::vector<int64_t> ranks = first_ranks(picks, runs);
  for_each_run(picks, runs, [&](size_t at, const Run& run) {
    const View& w = weights[run.tensor];
    T* data = reinterpret_cast<T*>(w.data);
    auto* value = reinterpret_cast<std::conditional_t<std::is_same_v<Value, char*>, T*, const T*>>(values[run.tensor]) +
                  ranks[at];
    visit(
        picks[run.tensor], run, [&](int64_t i) { __builtin_prefetch(data + place(w, i), 1); },
        [&](int64_t i) { move(data[place(w, i)], *value++); });
  });
}

// Runs typed(T{}) with the unsigned integer of this size: entries are only copied, so their type does not matter.
template <class Typed>
void by_size(int item_size, Typed typed) {
  switch (item_size) {
    case 1:
      return typed(uint8_t{});
    case 2:
      return typed(uint16_t{});
    case 4:
      return typed(uint32_t{});
    default:
      return typed(uint64_t{});
  }
}

std::string check_list(const Picks& p) {
  const int64_t blocks = (p.numel + kBlock - 1) / kBlock;
  if (p.offset[0] != 0 || p.offset[blocks] != p.k)
    return "must have offsets from 0 to " + std::to_string(p.k) + ", the length of low; got " +
           std::to_string(p.offset[0]) + " to " + std::to_string(p.offset[blocks]);
  for (int64_t b = 0; b < blocks; ++b)  // all of them, before any is used: a low[] read must stay inside
    if (p.offset[b] > p.offset[b + 1] || p.offset[b + 1] > p.k)
      return "must have offsets that do not decrease; they do after block " + std::to_string(b);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t limit = std::min(kBlock, p.numel - b * kBlock), begin = p.offset[b], end = p.offset[b + 1];
    unsigned wrong = begin < end && p.low[end - 1] >= limit;
    for (int64_t i = begin; i + 1 < end; ++i) wrong |= p.low[i] >= p.low[i + 1];  // no branch: the compiler vectorizes
    if (!wrong) continue;
    int64_t last = -1;
    for (int64_t i = p.offset[b]; i < p.offset[b + 1]; last = p.low[i++])
      if (p.low[i] <= last || p.low[i] >= limit)
        return "must list positions that ascend strictly inside block " + std::to_string(b) + " and stay below " +
               std::to_string(limit) + "; got " + std::to_string(p.low[i]) + " after " + std::to_string(last);
  }
  return "";
}

}  // namespace

std::pair<int64_t, std::string> check_picks(const std::vector<Picks>& picks) {
  for (size_t t = 0; t < picks.size(); ++t) {
    const Picks& p = picks[t];
    std::string wrong;
    if (p.offset != nullptr)
      wrong = check_list(p);
    else if (p.numel % 64 != 0 && p.bits[p.numel / 64] >> (p.numel % 64) != 0)
      wrong = "must be zero past the last of " + std::to_string(p.numel) + " entries; some bits are set";
    if (!wrong.empty()) return {static_cast<int64_t>(t), wrong};
  }
  return {-1, ""};
}

std::vector<int64_t> count_picks(const std::vector<Picks>& picks) {
  std::vector<int64_t> counts;
  for (const Picks& p : picks) counts.push_back(p.k);
  if (std::all_of(picks.begin(), picks.end(), [](const Picks& p) { return p.offset != nullptr; })) return counts;
  const std::vector<Run> runs = runs_of(picks);
  std::vector<int64_t> partial(runs.size());
  for_each_run(picks, runs, [&](size_t i, const Run& run) { partial[i] = count_run(picks[run.tensor], run); });
  std::fill(counts.begin(), counts.end(), 0);
  for (size_t i = 0; i < runs.size(); ++i) counts[runs[i].tensor] += partial[i];
  return counts;
}

void rewind(const std::vector<View>& weights, const std::vector<View>& initial, const std::vector<Picks>& picks,
            int item_size) {
  by_size(item_size, [&](auto type) { rewind_typed<decltype(type)>(weights, initial, picks); });
}

void gather(const std::vector<View>& weights, const std::vector<Picks>& picks, const std::vector<char*>& values,
            int item_size) {
  by_size(item_size, [&](auto type) {
    move_typed<decltype(type)>(weights, picks, values, [](auto& entry, auto& value) { value = entry; });
  });
}

void scatter(const std::vector<View>& weights, const std::vector<Picks>& picks, const std::vector<const char*>& values,
             int item_size) {
  by_size(item_size, [&](auto type) {
    move_typed<decltype(type)>(weights, picks, values, [](auto& entry, auto& value) { entry = value; });
  });
}

}  // namespace cwfast
