// rewind_, gather and scatter_ on the CPU: only the selected entries are touched, by blocks of 64K, in parallel.
// Reference: cwfast.reference. Called by cwfast/ops/rewind.py. Traffic: the picks, and two entries per selected one.
#include "rewind.h"

#include <omp.h>

#include <algorithm>

#include "runtime.h"

namespace cwfast {
namespace {

constexpr int64_t kBlock = 1 << 16;
constexpr int kAhead = 16;  // list entries between prefetch and use

struct Block {
  size_t tensor;
  int64_t index;  // inside the tensor
};

std::vector<Block> blocks_of(const std::vector<Picks>& picks) {
  std::vector<Block> blocks;
  for (size_t t = 0; t < picks.size(); ++t)
    for (int64_t b = 0; b * kBlock < picks[t].numel; ++b) blocks.push_back({t, b});
  return blocks;
}

template <class Work>
void for_each_block(const std::vector<Block>& blocks, Work work) {
  Region region;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads())
  for (int64_t i = 0; i < static_cast<int64_t>(blocks.size()); ++i)
    region.run([&, i] { work(static_cast<size_t>(i), blocks[static_cast<size_t>(i)]); });
  region.finish();
}

int64_t words_in(const Picks& p, int64_t block) { return (std::min(kBlock, p.numel - block * kBlock) + 63) / 64; }

int64_t count_block(const Picks& p, int64_t block) {
  if (p.offset != nullptr) return p.offset[block + 1] - p.offset[block];
  int64_t count = 0;
  const uint64_t* word = p.bits + block * (kBlock / 64);
  for (int64_t w = 0, n = words_in(p, block); w < n; ++w) count += __builtin_popcountll(word[w]);
  return count;
}

// Calls use(flat index) for the block's selected entries in order, prefetch(flat index) some entries earlier.
template <class Prefetch, class Use>
void visit(const Picks& p, int64_t block, Prefetch prefetch, Use use) {
  const int64_t base = block * kBlock;
  if (p.offset != nullptr) {
    const uint16_t *at = p.low + p.offset[block], *end = p.low + p.offset[block + 1];
    for (; at < end; ++at) {
      if (at + kAhead < end) prefetch(base + at[kAhead]);
      use(base + *at);
    }
    return;
  }
  const uint64_t* word = p.bits + base / 64;
  for (int64_t w = 0, n = words_in(p, block); w < n; ++w)
    for (uint64_t left = word[w]; left; left &= left - 1) use(base + 64 * w + __builtin_ctzll(left));
}

// Where entry `flat` of a view lies, in entries.
inline int64_t place(const View& v, int64_t flat) {
  if (v.sizes.empty()) return flat;
  int64_t at = 0;
  for (size_t d = v.sizes.size(); d-- > 0; flat /= v.sizes[d]) at += flat % v.sizes[d] * v.strides[d];
  return at;
}

// The position of each block's first selected entry among those of its tensor.
std::vector<int64_t> first_ranks(const std::vector<Picks>& picks, const std::vector<Block>& blocks) {
  std::vector<int64_t> rank(blocks.size());
  for_each_block(blocks, [&](size_t i, const Block& b) { rank[i] = count_block(picks[b.tensor], b.index); });
  int64_t sum = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (blocks[i].index == 0) sum = 0;
    const int64_t count = rank[i];
    rank[i] = sum;
    sum += count;
  }
  return rank;
}

template <class T>
void rewind_typed(const std::vector<View>& weights, const std::vector<View>& initial, const std::vector<Picks>& picks) {
  for_each_block(blocks_of(picks), [&](size_t, const Block& b) {
    const View &w = weights[b.tensor], &w0 = initial[b.tensor];
    T* to = reinterpret_cast<T*>(w.data);
    const T* from = reinterpret_cast<const T*>(w0.data);
    const auto prefetch = [&](int64_t i) {
      __builtin_prefetch(to + place(w, i), 1);
      __builtin_prefetch(from + place(w0, i));
    };
    visit(picks[b.tensor], b.index, prefetch, [&](int64_t i) { to[place(w, i)] = from[place(w0, i)]; });
  });
}

// move(entry of the weight, entry of the compact values)
template <class T, class Value, class Move>
void move_typed(const std::vector<View>& weights, const std::vector<Picks>& picks, const std::vector<Value>& values,
                Move move) {
  const std::vector<Block> blocks = blocks_of(picks);
  const std::vector<int64_t> ranks = first_ranks(picks, blocks);
  for_each_block(blocks, [&](size_t at, const Block& b) {
    const View& w = weights[b.tensor];
    T* data = reinterpret_cast<T*>(w.data);
    auto* value =
        reinterpret_cast<std::conditional_t<std::is_same_v<Value, char*>, T*, const T*>>(values[b.tensor]) + ranks[at];
    visit(
        picks[b.tensor], b.index, [&](int64_t i) { __builtin_prefetch(data + place(w, i), 1); },
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
  const std::vector<Block> blocks = blocks_of(picks);
  std::vector<int64_t> partial(blocks.size()), counts(picks.size(), 0);
  for_each_block(blocks, [&](size_t i, const Block& b) { partial[i] = count_block(picks[b.tensor], b.index); });
  for (size_t i = 0; i < blocks.size(); ++i) counts[blocks[i].tensor] += partial[i];
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
