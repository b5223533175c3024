// Reads of all scores, chunk by chunk in parallel: what lies at, inside and above a bracket of keys, and histograms.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/select_keys.h"
#include "runtime.h"
#include "select.h"

namespace cwfast {

constexpr int64_t kChunk = 1 << 16;  // entries: offsets inside a chunk fit 16 bits, a chunk takes some microseconds
constexpr int kBins = 2048;          // 16 KB of counters: they stay in the first-level cache

struct Chunk {
  const char* data;
  uint64_t* bits;
  int64_t numel;
  int64_t tensor;
};

template <class Raw>
struct Candidate {
  Raw key;
  uint16_t offset;  // inside the chunk
};

// What one read of a chunk left behind.
struct Outcome {
  int64_t sure = 0;   // entries at or above the bracket: selected
  int64_t ties = 0;   // entries inside the bracket
  int64_t equal = 0;  // candidates equal to the threshold; then how many of them are taken
  int64_t nans = 0, negatives = 0;
  int thread = 0;  // whose buffer holds the candidates
  size_t begin = 0;
};

template <class F>
class Pass {
  using Raw = typename F::Raw;
  using Kept = Candidate<Raw>;

 public:
  Pass(const std::vector<ScoreTensor>& scores, Dtype dtype, bool abs)
      : scores_(scores), scan_(scanner<F>(dtype)), abs_(abs) {
    starts_.push_back(0);
    for (size_t t = 0; t < scores.size(); ++t) {
      const auto* data = static_cast<const char*>(scores[t].data);
      for (int64_t at = 0; at < scores[t].numel; at += kChunk)
        chunks.push_back({data + at * int64_t{sizeof(Raw)}, scores[t].bits + at / 64,
                          std::min(kChunk, scores[t].numel - at), static_cast<int64_t>(t)});
      starts_.push_back(starts_.back() + scores[t].numel);
    }
    numel = starts_.back();
    capacity = numel / 96 + 16384;  // candidates: about N / 12 bytes for float32
    outcomes.resize(chunks.size());
  }

  // One read: bits of everything at or above the bracket, counts, and (if asked) the entries inside as candidates.
  void read(bool keep_candidates) {
    const int workers = threads();
    candidates.assign(static_cast<size_t>(workers), {});
    if (keep_candidates)  // address space only; growing would copy and hold twice
      for (auto& buffer : candidates) buffer.reserve(static_cast<size_t>(std::min(capacity, numel)));
    std::atomic<int64_t> kept{0};
    Region region;
#pragma omp parallel for schedule(dynamic, 4) num_threads(workers)
    for (int64_t c = 0; c < static_cast<int64_t>(chunks.size()); ++c)
      region.run([&, c] {
        // Past the capacity the bracket has failed: counting goes on, so that NaN and negatives are still all found.
        const bool keep = keep_candidates && kept < capacity;
        read_chunk(c, keep ? &candidates[static_cast<size_t>(omp_get_thread_num())] : nullptr);
        kept += outcomes[static_cast<size_t>(c)].ties;
      });
    region.finish();
  }

  void read_chunk(int64_t c, std::vector<Kept>* keep) {
    const Chunk& chunk = chunks[static_cast<size_t>(c)];
    Outcome out;
    out.thread = omp_get_thread_num();
    out.begin = keep ? keep->size() : 0;
    for (int64_t at = 0; at < chunk.numel; at += 64) {
      const Word word = scan(chunk, at);
      uint64_t inside = word.from_low & ~word.from_high;
      chunk.bits[at / 64] = word.from_high;
      out.sure += __builtin_popcountll(word.from_high);
      out.ties += __builtin_popcountll(inside);
      if (word.invalid) count_invalid<F>(chunk.data + at * int64_t{sizeof(Raw)}, word.invalid, out.nans, out.negatives);
      if (!keep) continue;
      for (; inside; inside &= inside - 1) {
        const int64_t i = at + __builtin_ctzll(inside);
        keep->push_back({static_cast<Raw>(key_at<F>(chunk.data, i)), static_cast<uint16_t>(i)});
      }
    }
    outcomes[static_cast<size_t>(c)] = out;
  }

  Word scan(const Chunk& chunk, int64_t at) const {
    return scan_some<F>(scan_, chunk.data + at * int64_t{sizeof(Raw)}, chunk.numel - at, low, high, abs_);
  }

  uint64_t key_of(int64_t flat) const {  // of an entry counted over all tensors
    const size_t t = std::upper_bound(starts_.begin(), starts_.end(), flat) - starts_.begin() - 1;
    return key_at<F>(static_cast<const char*>(scores_[t].data), flat - starts_[t]);
  }

  void collect_invalid(Selected& out) const {
    out.nans.assign(scores_.size(), 0), out.negatives.assign(scores_.size(), 0);
    for (size_t c = 0; c < chunks.size(); ++c) {
      out.nans[chunks[c].tensor] += outcomes[c].nans;
      out.negatives[chunks[c].tensor] += outcomes[c].negatives;
    }
  }

  int64_t total(int64_t Outcome::* field) const {
    int64_t sum = 0;
    for (const Outcome& o : outcomes) sum += o.*field;
    return sum;
  }

  std::vector<int64_t> histogram(int shift) const {
    std::vector<int64_t> bins(kBins, 0);
    Region region;
#pragma omp parallel num_threads(threads())
    {
      std::vector<int64_t> mine;
      region.run([&] { mine.assign(kBins, 0); });
#pragma omp for schedule(dynamic, 4)
      for (int64_t c = 0; c < static_cast<int64_t>(chunks.size()); ++c)
        region.run([&, c] {
          const Chunk& chunk = chunks[static_cast<size_t>(c)];
          for (int64_t i = 0; i < chunk.numel; ++i) {
            const uint64_t key = key_at<F>(chunk.data, i);
            if (key >= low && key < high) ++mine[(key - low) >> shift];  // NaN keys lie above high
          }
        });
#pragma omp critical
      for (size_t b = 0; b < mine.size(); ++b) bins[b] += mine[b];
    }
    region.finish();
    return bins;
  }

  // Calls use(outcome, its chunk, its first candidate) for every chunk, in parallel.
  template <class Use>
  void for_each_chunk(Use use) {
    Region region;
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads())
    for (int64_t c = 0; c < static_cast<int64_t>(chunks.size()); ++c)
      region.run([&, c] {
        Outcome& out = outcomes[static_cast<size_t>(c)];
        use(out, chunks[static_cast<size_t>(c)], candidates[static_cast<size_t>(out.thread)].data() + out.begin);
      });
    region.finish();
  }

  std::vector<Chunk> chunks;
  std::vector<Outcome> outcomes;              // [chunks]
  std::vector<std::vector<Kept>> candidates;  // [threads]
  int64_t numel = 0, capacity = 0;            // capacity: candidates that are kept
  uint64_t low = 0, high = 0;                 // the bracket [low, high) of keys

 private:
  const std::vector<ScoreTensor>& scores_;
  const ScanWord scan_;
  const bool abs_;
  std::vector<int64_t> starts_;  // [tensors + 1] flat index of each tensor's first entry
};

}  // namespace cwfast
