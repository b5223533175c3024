// Walks over selected entries: runs of blocks as pieces of work, and a cursor that can go ahead of another to prefetch.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "rewind.h"
#include "runtime.h"

namespace cwfast {

constexpr int64_t kBlock = 1 << 16;  // entries of a block of a list
// Blocks of one piece of work, in which prefetching runs on from one block into the next: long ones where there are
// enough for each thread to take its share.
constexpr int64_t kShortRun = 8, kLongRun = 32, kRunsOfThread = 16;

// Into the second-level cache. The first one's few places for lines on their way are what random access waits for;
// where nothing is fetched into it ahead, entries are up to twice as fast. A write of the line follows, but no prefetch
// for writing: with -mprfchw that would fetch into the first level.
inline void prefetch(const void* entry) {
  __builtin_prefetch(entry, 0, 2);
  asm volatile("");  // or GCC takes what only prefetches for a pure function and leaves out its calls
}

struct Run {
  size_t tensor;
  int64_t first, last;  // blocks [first, last)
};

inline std::vector<Run> runs_of(const std::vector<Picks>& picks) {
  int64_t numel = 0;
  for (const Picks& p : picks) numel += p.numel;
  const int64_t length = std::clamp(numel / kBlock / (kRunsOfThread * threads()), kShortRun, kLongRun);
  std::vector<Run> runs;
  for (size_t t = 0; t < picks.size(); ++t) {
    const int64_t blocks = (picks[t].numel + kBlock - 1) / kBlock;
    for (int64_t b = 0; b < blocks; b += length) runs.push_back({t, b, std::min(b + length, blocks)});
  }
  return runs;
}

// Calls use(flat index) for the selected entries of a block of a list in order.
template <class Use>
void each_listed(const Picks& p, int64_t block, Use use) {
  for (int64_t i = p.offset[block]; i < p.offset[block + 1]; ++i) use(block * kBlock + p.low[i]);
}

// The same of packed bits.
template <class Use>
void each_filled(const Picks& p, int64_t block, Use use) {
  const int64_t first = block * (kBlock / 64), last = (std::min((block + 1) * kBlock, p.numel) + 63) / 64;
  int64_t filled[kBlock / 64], count = 0;  // words that are not zero: found without a branch, which would be guessed
  for (int64_t word = first; word < last; ++word) {
    filled[count] = word;
    count += p.bits[word] != 0;
  }
  for (int64_t f = 0; f < count; ++f) {
    uint64_t left = p.bits[filled[f]];
    do use(64 * filled[f] + __builtin_ctzll(left));
    while (left &= left - 1);
  }
}

template <class Use>
void each_of_block(const Picks& p, int64_t block, Use use) {
  p.offset != nullptr ? each_listed(p, block, use) : each_filled(p, block, use);
}

// Goes through the flat indices of a list, from the first of a block on.
struct Cursor {
  const Picks& picks;
  int64_t block, at = picks.offset[block];
  int64_t next() {  // requires that an entry is left
    while (at == picks.offset[block + 1]) ++block;
    return block * kBlock + picks.low[at++];
  }
};

}  // namespace cwfast
