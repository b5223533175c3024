// Reads of all scores, chunk by chunk in parallel: what lies at, inside and above a bracket of keys, and histograms.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "cpu/select_keys.h"
#include "runtime.h"
#include "select.h"

namespace cwfast {

constexpr int64_t kChunk = 1 << 16;  // entries: offsets inside a chunk fit 16 bits, a chunk takes some microseconds
constexpr int kRun = 256;    // words looked at, then searched for candidates: their bits stay in the first-level cache
constexpr int kBins = 2048;  // 16 KB of counters: they stay in the first-level cache

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

// Room for n items that no one has touched: memory is taken page by page as items arrive.
template <class T>
class Buffer {
 public:
  void reserve(size_t n) {
    items_.reset(new T[n]);
    prefer_huge_pages(items_.get(), n * sizeof(T));
  }
  void push(T item) { items_[size_++] = item; }  // the caller reserved enough
  size_t size() const { return size_; }
  const T* data() const { return items_.get(); }
  const T* begin() const { return data(); }
  const T* end() const { return data() + size_; }

 private:
  std::unique_ptr<T[]> items_;
  size_t size_ = 0;
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
      prefer_huge_pages(scores[t].bits, static_cast<size_t>(scores[t].numel) / 8);
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
    candidates.clear();
    candidates.resize(static_cast<size_t>(workers));
    if (keep_candidates)  // a thread below the capacity takes one chunk more
      for (auto& buffer : candidates) buffer.reserve(static_cast<size_t>(std::min(capacity + kChunk, numel)));
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

  void read_chunk(int64_t c, Buffer<Kept>* keep) {
    const Chunk& chunk = chunks[static_cast<size_t>(c)];
    Marks marks{0, 0, 0, 0};
    const size_t begin = keep ? keep->size() : 0;
    uint64_t inside[kRun];
    for (int64_t at = 0; at < chunk.numel; at += 64 * kRun) {
      const int64_t numel = std::min<int64_t>(64 * kRun, chunk.numel - at);
      scan_part<F>(scan_, chunk.data + at * int64_t{sizeof(Raw)}, numel, low, high, abs_, chunk.bits + at / 64, inside,
                   marks);
      if (!keep) continue;
      uint16_t some[kRun];  // words with candidates, found without a branch to mispredict
      int count = 0;
      for (int w = 0; w < (numel + 63) / 64; ++w) some[count] = static_cast<uint16_t>(w), count += inside[w] != 0;
      for (int n = 0; n < count; ++n)
        for (uint64_t left = inside[some[n]]; left; left &= left - 1) {
          const int64_t i = at + 64 * some[n] + __builtin_ctzll(left);
          keep->push({static_cast<Raw>(key_at<F>(chunk.data, i)), static_cast<uint16_t>(i)});
        }
    }
    outcomes[static_cast<size_t>(c)] = {marks.above,     marks.inside,         0,    marks.nans,
                                        marks.negatives, omp_get_thread_num(), begin};
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
  std::vector<Outcome> outcomes;         // [chunks]
  std::vector<Buffer<Kept>> candidates;  // [threads]
  int64_t numel = 0, capacity = 0;       // capacity: candidates that are kept
  uint64_t low = 0, high = 0;            // the bracket [low, high) of keys

 private:
  const std::vector<ScoreTensor>& scores_;
  const Scan scan_;
  const bool abs_;
  std::vector<int64_t> starts_;  // [tensors + 1] flat index of each tensor's first entry
};

}  // namespace cwfast
