// rewind_, gather and scatter_ on the CPU: only the selected entries are touched, by runs of blocks, in parallel.
// Reference: cwfast.reference. Called by cwfast/ops/rewind.py. Traffic: the picks, and two entries per selected one.
#include "rewind.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>

#include "cpu/picks.h"
#include "runtime.h"

namespace cwfast {
namespace {

constexpr int64_t kAhead = 64;       // list entries between prefetch and use, at least
constexpr int64_t kAlone = 1 << 14;  // of work_of: one thread is through with it before another would be awake
constexpr int64_t kChecked = 16;     // entries of a list that are checked in the time in which one is moved

// Entries of lists, and words of packed bits (64 entries each, of which any number is selected).
int64_t work_of(const std::vector<Picks>& picks) {
  int64_t work = 0;
  for (const Picks& p : picks) work += p.offset != nullptr ? p.k : p.numel / 64;
  return work;
}

// What is wrong with the offsets of a list; empty: no read of low[] between them leaves it.
std::string wrong_offsets(const Picks& p) {
  const int64_t blocks = (p.numel + kBlock - 1) / kBlock;
  if (p.offset[0] != 0 || p.offset[blocks] != p.k)
    return "must have offsets from 0 to " + std::to_string(p.k) + ", the length of low; got " +
           std::to_string(p.offset[0]) + " to " + std::to_string(p.offset[blocks]);
  for (int64_t b = 0; b < blocks; ++b)
    if (p.offset[b] > p.offset[b + 1] || p.offset[b + 1] > p.k)
      return "must have offsets that do not decrease; they do after block " + std::to_string(b);
  return "";
}

// How often low[i] >= low[i + 1] for begin <= i and i + 1 < end.
int64_t falls(const uint16_t* low, int64_t begin, int64_t end) {
  constexpr int64_t kPart = 1 << 15;  // fits the 16-bit count, which lets the compiler compare a vector at a time
  int64_t count = 0;
  for (; begin + 1 < end; begin += kPart) {
    const int64_t last = std::min(begin + kPart, end - 1);
    uint16_t part = 0;
    for (int64_t i = begin; i < last; ++i) part = static_cast<uint16_t>(part + (low[i] >= low[i + 1]));
    count += part;
  }
  return count;
}

// Whether the run's positions do not ascend strictly inside each block, or go past the tensor. Blocks are short where
// few entries are selected, so they are not looked at one by one: positions may fall from one block to the next only.
bool wrong_positions(const Picks& p, const Run& run) {
  if (p.offset == nullptr) return false;
  const int64_t begin = p.offset[run.first], end = p.offset[run.last], left = p.numel - (run.last - 1) * kBlock;
  int64_t between = 0;
  for (int64_t b = run.first + 1; b < run.last; ++b) {
    const int64_t at = p.offset[b];
    if (at > p.offset[b - 1] && at < end) between += p.low[at - 1] >= p.low[at];
  }
  return falls(p.low, begin, end) != between || (end > p.offset[run.last - 1] && p.low[end - 1] >= left);
}

std::string describe_positions(const Picks& p, const Run& run) {
  for (int64_t b = run.first; b < run.last; ++b) {
    const int64_t limit = std::min(kBlock, p.numel - b * kBlock);
    int64_t last = -1;
    for (int64_t i = p.offset[b]; i < p.offset[b + 1]; last = p.low[i++])
      if (p.low[i] <= last || p.low[i] >= limit)
        return "must list positions that ascend strictly inside block " + std::to_string(b) + " and stay below " +
               std::to_string(limit) + "; got " + std::to_string(p.low[i]) + " after " + std::to_string(last);
  }
  return "must not change while it is checked";
}

// Without the positions of lists, which may be many.
Wrong wrong_ends(const std::vector<Picks>& picks) {
  for (size_t t = 0; t < picks.size(); ++t) {
    const Picks& p = picks[t];
    std::string wrong;
    if (p.offset != nullptr)
      wrong = wrong_offsets(p);
    else if (p.numel % 64 != 0 && p.bits[p.numel / 64] >> (p.numel % 64) != 0)
      wrong = "must be zero past the last of " + std::to_string(p.numel) + " entries; some bits are set";
    if (!wrong.empty()) return {static_cast<int64_t>(t), wrong};
  }
  return {-1, ""};
}

// Calls use(position among the runs, run) for each of them; where `check` is true, only if no picks are wrong. One
// region does both: few picks are checked by the time that the second thread has awoken, and are then in the caches.
template <class Use>
Wrong for_each_run(const std::vector<Picks>& picks, const std::vector<Run>& runs, int64_t work, bool check, Use use) {
  if (check)
    if (Wrong wrong = wrong_ends(picks); wrong.first >= 0) return wrong;
  const size_t count = runs.size();
  std::atomic<size_t> to_check{check ? 0 : count}, unchecked{check ? count : 0}, wrong{count}, to_use{0};
  const int team = work <= kAlone ? 1 : threads();
  Region region;
#pragma omp parallel num_threads(team) if (team > 1)
  {
    for (size_t i; (i = to_check++) < count; --unchecked)
      if (wrong_positions(picks[runs[i].tensor], runs[i])) wrong = i;
    while (unchecked > 0) std::this_thread::yield();  // others are at their last run
    for (size_t i; wrong == count && (i = to_use++) < count;) region.run([&] { use(i, runs[i]); });
  }
  region.finish();
  if (wrong == count) return {-1, ""};
  const Run& run = runs[wrong];
  return {static_cast<int64_t>(run.tensor), describe_positions(picks[run.tensor], run)};
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

// Calls use(flat index) for the run's selected entries in order; of a list, announce(flat index) a block earlier or
// more.
template <class Announce, class Use>
void visit(const Picks& p, const Run& run, Announce announce, Use use) {
  if (p.offset == nullptr) {
    for (int64_t block = run.first; block < run.last; ++block) each_filled(p, block, use);
    return;
  }
  int64_t told = run.first;
  for (int64_t block = run.first; block < run.last; ++block) {
    while (told < run.last && (told <= block + 1 || p.offset[told] - p.offset[block + 1] < kAhead))
      each_listed(p, told++, announce);
    each_listed(p, block, use);
  }
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
  for_each_run(picks, runs, work_of(picks), false,
               [&](size_t i, const Run& run) { rank[i] = count_run(picks[run.tensor], run); });
  int64_t sum = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    if (runs[i].first == 0) sum = 0;
    sum += std::exchange(rank[i], sum);
  }
  return rank;
}

template <class T>
Wrong rewind_typed(const std::vector<View>& weights, const std::vector<View>& initial, const std::vector<Picks>& picks,
                   bool check) {
  return for_each_run(picks, runs_of(picks), work_of(picks), check, [&](size_t, const Run& run) {
    const View &w = weights[run.tensor], &w0 = initial[run.tensor];
    T* to = reinterpret_cast<T*>(w.data);
    const T* from = reinterpret_cast<const T*>(w0.data);
    const auto announce = [&](int64_t i) {
      prefetch(to + place(w, i));
      prefetch(from + place(w0, i));
    };
    visit(picks[run.tensor], run, announce, [&](int64_t i) { to[place(w, i)] = from[place(w0, i)]; });
  });
}

// move(entry of the weight, entry of the compact values)
template <class T, class Value, class Move>
Wrong move_typed(const std::vector<View>& weights, const std::vector<Picks>& picks, const std::vector<Value>& values,
                 bool check, Move move) {
  if (check)  // before the ranks are read from offsets
    if (Wrong wrong = wrong_ends(picks); wrong.first >= 0) return wrong;
  const std::vector<Run> runs = runs_of(picks);
  const std::vector<int64_t> ranks = first_ranks(picks, runs);
  return for_each_run(picks, runs, work_of(picks), check, [&](size_t at, const Run& run) {
    const View& w = weights[run.tensor];
    T* data = reinterpret_cast<T*>(w.data);
    auto* value = reinterpret_cast<std::conditional_t<std::is_same_v<Value, char*>, T*, const T*>>(values[run.tensor]) +
                  ranks[at];
    visit(
        picks[run.tensor], run, [&](int64_t i) { prefetch(data + place(w, i)); },
        [&](int64_t i) { move(data[place(w, i)], *value++); });
  });
}

// Runs typed(T{}) with the unsigned integer of this size: entries are only copied, so their type does not matter.
template <class Typed>
Wrong by_size(int item_size, Typed typed) {
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

}  // namespace

Wrong check_picks(const std::vector<Picks>& picks) {
  int64_t work = 0;
  for (const Picks& p : picks) work += p.k / kChecked;
  return for_each_run(picks, runs_of(picks), work, true, [](size_t, const Run&) {});
}

std::vector<int64_t> count_picks(const std::vector<Picks>& picks) {
  std::vector<int64_t> counts;
  for (const Picks& p : picks) counts.push_back(p.k);
  if (std::all_of(picks.begin(), picks.end(), [](const Picks& p) { return p.offset != nullptr; })) return counts;
  const std::vector<Run> runs = runs_of(picks);
  std::vector<int64_t> partial(runs.size());
  for_each_run(picks, runs, work_of(picks), false,
               [&](size_t i, const Run& run) { partial[i] = count_run(picks[run.tensor], run); });
  std::fill(counts.begin(), counts.end(), 0);
  for (size_t i = 0; i < runs.size(); ++i) counts[runs[i].tensor] += partial[i];
  return counts;
}

void list_picks(const Picks& packed, uint16_t* low, int64_t* offset) {
  uint16_t* at = low;
  *offset++ = 0;
  for (int64_t block = 0; block * kBlock < packed.numel; ++block) {
    each_filled(packed, block, [&](int64_t i) { *at++ = static_cast<uint16_t>(i); });  // i % kBlock
    *offset++ = at - low;
  }
}

Wrong rewind(const std::vector<View>& weights, const std::vector<View>& initial, const std::vector<Picks>& picks,
             int item_size, bool check) {
  return by_size(item_size, [&](auto type) { return rewind_typed<decltype(type)>(weights, initial, picks, check); });
}

void gather(const std::vector<View>& weights, const std::vector<Picks>& picks, const std::vector<char*>& values,
            int item_size) {
  by_size(item_size, [&](auto type) {
    return move_typed<decltype(type)>(weights, picks, values, false, [](auto& entry, auto& value) { value = entry; });
  });
}

Wrong scatter(const std::vector<View>& weights, const std::vector<Picks>& picks, const std::vector<const char*>& values,
              int item_size, bool check) {
  return by_size(item_size, [&](auto type) {
    return move_typed<decltype(type)>(weights, picks, values, check, [](auto& entry, auto& value) { entry = value; });
  });
}

}  // namespace cwfast
