// Selected entries of a list of tensors: copy from the initial tensor, gather into compact values, scatter them back.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace cwfast {

// A dense or strided tensor; `sizes` and `strides` (in entries) are empty where it is contiguous.
struct View {
  char* data;
  std::vector<int64_t> sizes, strides;
};

// Which entries of a tensor of `numel` entries are selected: packed bits, or a list of 16-bit offsets per 64K block.
struct Picks {
  int64_t numel;
  const uint64_t* bits;   // [(numel + 63) / 64] where offset is null, else a list:
  const uint16_t* low;    // [k] ascending inside each block
  const int64_t* offset;  // [blocks + 1], offset[0] = 0, offset[blocks] = k
  int64_t k;              // entries of low
};

// A tensor whose picks do not name entries of it, each once, and what is wrong: "must ..."; -1, "" where all do.
using Wrong = std::pair<int64_t, std::string>;

Wrong check_picks(const std::vector<Picks>& picks);
// Selected entries of each tensor.
std::vector<int64_t> count_picks(const std::vector<Picks>& picks);
// Packed bits as a list: low has room for all that are set, offset for blocks + 1. On the calling thread.
void list_picks(const Picks& packed, uint16_t* low, int64_t* offset);

// item_size: bytes of an entry: 1, 2, 4 or 8. All lists have one item per tensor. check: nothing is written where picks
// are wrong; else they must have been checked.
Wrong rewind(const std::vector<View>& weights, const std::vector<View>& initial, const std::vector<Picks>& picks,
             int item_size, bool check);
// values[t]: [selected entries of t] contiguous, in flat order. Picks that were checked.
void gather(const std::vector<View>& weights, const std::vector<Picks>& picks, const std::vector<char*>& values,
            int item_size);
// Of a list that is checked here, values[t] has k entries, whatever the offsets say.
Wrong scatter(const std::vector<View>& weights, const std::vector<Picks>& picks, const std::vector<const char*>& values,
              int item_size, bool check);

}  // namespace cwfast
