// select_topk on the CPU: sampled bracket, one verified read, histograms where the bracket fails. Always exact.
// Reference: cwfast.reference.select_topk. Called by cwfast/ops/select.py. Traffic: one read of the scores (at best).
#include "select.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "cpu/select_scan.h"
#include "runtime.h"

namespace cwfast {
namespace {

constexpr int64_t kChunk = 1 << 16;  // entries: offsets inside a chunk fit 16 bits, a chunk takes some microseconds
constexpr int kBins = 2048;          // 16 KB of counters: they stay in the first-level cache

template <class Bits, uint64_t kInfKey, int kShift>
struct Format {
  using Raw = Bits;
  static constexpr uint64_t kInf = kInfKey;                            // key of +infinity, the largest valid one
  static constexpr uint64_t kMagnitude = (uint64_t{1} << kShift) - 1;  // all bits but the sign
};
using Float32 = Format<uint32_t, 0x7f800000u, 31>;
using Float64 = Format<uint64_t, 0x7ff0000000000000u, 63>;
using Bfloat16 = Format<uint16_t, 0x7f80u, 15>;
using Float16 = Format<uint16_t, 0x7c00u, 15>;

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
Word scan_scalar(const void* p, uint64_t low, uint64_t high, bool abs) {
  const auto* data = static_cast<const typename F::Raw*>(p);
  Word out{0, 0, 0};
  for (int i = 0; i < 64; ++i) {
    const uint64_t raw = data[i], key = raw & F::kMagnitude;
    const bool nan = key > F::kInf, negative = !abs && raw != key && key != 0;
    out.from_low |= uint64_t{!nan && key >= low} << i;
    out.from_high |= uint64_t{!nan && key >= high} << i;
    out.invalid |= uint64_t{nan || negative} << i;
  }
  return out;
}

template <class F>
ScanWord scanner(Dtype dtype) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512 && dtype != Dtype::float64)
    return dtype == Dtype::float32    ? scan_avx512_float32
           : dtype == Dtype::bfloat16 ? scan_avx512_bfloat16
                                      : scan_avx512_float16;
  if (isa() >= Isa::avx2) {
    switch (dtype) {
      case Dtype::float32:
        return scan_avx2_float32;
      case Dtype::float64:
        return scan_avx2_float64;
      case Dtype::bfloat16:
        return scan_avx2_bfloat16;
      case Dtype::float16:
        return scan_avx2_float16;
    }
  }
#endif
  (void)dtype;
  return scan_scalar<F>;
}

template <class F>
class Selector {
  using Raw = typename F::Raw;
  using Kept = Candidate<Raw>;

 public:
  Selector(const std::vector<ScoreTensor>& scores, Dtype dtype, int64_t k, bool abs, bool skip_nan)
      : scores_(scores), scan_(scanner<F>(dtype)), k_(k), abs_(abs), skip_nan_(skip_nan) {
    starts_.push_back(0);
    for (size_t t = 0; t < scores.size(); ++t) {
      const auto* data = static_cast<const char*>(scores[t].data);
      for (int64_t at = 0; at < scores[t].numel; at += kChunk)
        chunks_.push_back({data + at * int64_t{sizeof(Raw)}, scores[t].bits + at / 64,
                           std::min(kChunk, scores[t].numel - at), static_cast<int64_t>(t)});
      starts_.push_back(starts_.back() + scores[t].numel);
    }
    numel_ = starts_.back();
    capacity_ = numel_ / 96 + 16384;  // candidates: about N / 12 bytes for float32
    outcomes_.resize(chunks_.size());
  }

  Selected run() {
    sample_bracket();
    const bool tied = settle_heavy_ties();
    if (!tied) read(true);
    Selected out;
    collect_invalid(out);
    int64_t selectable = numel_;
    for (int64_t n : out.nans) selectable -= n;
    const bool negative = std::any_of(out.negatives.begin(), out.negatives.end(), [](int64_t n) { return n > 0; });
    if (negative || k_ > selectable || (!skip_nan_ && selectable != numel_)) return out;
    if (k_ == 0) {
      low_ = high_ = F::kInf + 1;
      read(false);
      threshold_key_ = F::kInf;
    } else if (tied) {
      finish_ties();
    } else if (bracket_holds()) {
      finish_candidates();
    } else {
      narrow_by_histograms();
      const bool one_value = high_ - low_ == 1;
      read(!one_value);
      one_value ? finish_ties() : finish_candidates();
    }
    out.counts.assign(scores_.size(), 0);
    for (size_t c = 0; c < chunks_.size(); ++c) out.counts[chunks_[c].tensor] += outcomes_[c].sure;
    out.threshold = value_of(threshold_key_);
    out.valid = true;
    return out;
  }

 private:
  uint64_t key_at(const char* data, int64_t i) const {
    Raw raw;
    std::memcpy(&raw, data + i * int64_t{sizeof(Raw)}, sizeof raw);
    return raw & F::kMagnitude;
  }

  // The bracket [low, high) of keys that a stratified sample says holds the k-th largest: rank +- 6 sigma.
  void sample_bracket() {
    low_ = 0, high_ = F::kInf + 1;
    if (numel_ <= capacity_) return;  // everything fits the candidate buffer
    const double p = static_cast<double>(k_) / static_cast<double>(numel_);
    // Enough points that +- 6 sigma of rank is about 0.6% of all entries; never more than a sixteenth of the data.
    int64_t size = static_cast<int64_t>(std::pow(2 * 6 * 160.0, 2) * p * (1 - p));
    size = std::min(std::clamp<int64_t>(size, 1 << 14, 1 << 20), std::max<int64_t>(1024, numel_ / 16));
    std::vector<uint64_t> keys(static_cast<size_t>(size));
#pragma omp parallel for schedule(static) num_threads(threads())
    for (int64_t i = 0; i < size; ++i) {
      const int64_t from = scaled(i, size), to = scaled(i + 1, size);
      const int64_t flat =
          from + static_cast<int64_t>(mix(static_cast<uint64_t>(i)) % static_cast<uint64_t>(to - from));
      const size_t t = std::upper_bound(starts_.begin(), starts_.end(), flat) - starts_.begin() - 1;
      const uint64_t key = key_at(static_cast<const char*>(scores_[t].data), flat - starts_[t]);
      keys[i] = key > F::kInf ? 0 : key;
    }
    const int64_t rank = static_cast<int64_t>(p * size);
    const int64_t margin = static_cast<int64_t>(6 * std::sqrt(p * (1 - p) * size)) + 4;
    const auto descending = std::greater<uint64_t>();
    if (rank + margin < size) {
      std::nth_element(keys.begin(), keys.begin() + rank + margin, keys.end(), descending);
      low_ = keys[rank + margin];
    }
    if (rank - margin >= 0) {
      std::nth_element(keys.begin(), keys.begin() + rank - margin, keys.end(), descending);
      high_ = keys[rank - margin] + 1;
    }
    keys.erase(std::remove_if(keys.begin(), keys.end(), [&](uint64_t key) { return key < low_ || key >= high_; }),
               keys.end());
    std::sort(keys.begin(), keys.end());
    sample_ = std::move(keys);
    sample_size_ = size;
  }

  // Where one value alone would overflow the candidates (all equal, mostly zero), a read that only counts it tells on
  // which side of it the k-th largest lies, or that it is the one: true, and [low, high) is that value alone.
  bool settle_heavy_ties() {
    uint64_t low = low_, high = high_;  // the bracket as it narrows
    while (k_ > 0 && low < high) {
      uint64_t heaviest = 0;
      size_t most = 0;
      for (size_t i = 0, j = 0; i < sample_.size(); i = j) {
        while (j < sample_.size() && sample_[j] == sample_[i]) ++j;
        if (sample_[i] >= low && sample_[i] < high && j - i > most) most = j - i, heaviest = sample_[i];
      }
      if (static_cast<double>(most) * static_cast<double>(numel_) <= 0.5 * capacity_ * sample_size_) break;
      low_ = heaviest, high_ = heaviest + 1;
      read(false);
      const int64_t above = total(&Outcome::sure);
      if (above < k_ && k_ <= above + total(&Outcome::ties)) return true;
      (k_ <= above ? low : high) = k_ <= above ? heaviest + 1 : heaviest;
    }
    if (low < high) low_ = low, high_ = high;
    return false;
  }

  int64_t scaled(int64_t i, int64_t size) const {
    return static_cast<int64_t>(static_cast<__int128>(numel_) * i / size);
  }

  static uint64_t mix(uint64_t x) {  // splitmix64 (Steele et al., 2014): the same points on every run
    x = x * 0x9E3779B97F4A7C15ull + 0x1234567ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
  }

  // One read: bits of everything at or above the bracket, counts, and (if asked) the entries inside as candidates.
  void read(bool keep_candidates) {
    const int workers = threads();
    candidates_.assign(static_cast<size_t>(workers), {});
    if (keep_candidates)  // address space only; growing would copy and hold twice
      for (auto& buffer : candidates_) buffer.reserve(static_cast<size_t>(std::min(capacity_, numel_)));
    std::atomic<int64_t> kept{0};
    Region region;
#pragma omp parallel for schedule(dynamic, 4) num_threads(workers)
    for (int64_t c = 0; c < static_cast<int64_t>(chunks_.size()); ++c)
      region.run([&, c] {
        // Past the capacity the bracket has failed: counting goes on, so that NaN and negatives are still all found.
        const bool keep = keep_candidates && kept < capacity_;
        read_chunk(c, keep ? &candidates_[static_cast<size_t>(omp_get_thread_num())] : nullptr);
        kept += outcomes_[static_cast<size_t>(c)].ties;
      });
    region.finish();
  }

  void read_chunk(int64_t c, std::vector<Kept>* keep) {
    const Chunk& chunk = chunks_[static_cast<size_t>(c)];
    Outcome out;
    out.thread = omp_get_thread_num();
    out.begin = keep ? keep->size() : 0;
    for (int64_t at = 0; at < chunk.numel; at += 64) {
      const Word word = scan(chunk, at);
      uint64_t inside = word.from_low & ~word.from_high;
      chunk.bits[at / 64] = word.from_high;
      out.sure += __builtin_popcountll(word.from_high);
      out.ties += __builtin_popcountll(inside);
      if (word.invalid) count_invalid(chunk, at, word.invalid, out);
      if (!keep) continue;
      for (; inside; inside &= inside - 1) {
        const int64_t i = at + __builtin_ctzll(inside);
        keep->push_back({static_cast<Raw>(key_at(chunk.data, i)), static_cast<uint16_t>(i)});
      }
    }
    outcomes_[static_cast<size_t>(c)] = out;
  }

  Word scan(const Chunk& chunk, int64_t at) const {
    const char* p = chunk.data + at * int64_t{sizeof(Raw)};
    const int64_t left = chunk.numel - at;
    if (left >= 64) return scan_(p, low_, high_, abs_);
    Raw padded[64] = {};
    std::memcpy(padded, p, static_cast<size_t>(left) * sizeof(Raw));
    Word word = scan_(padded, low_, high_, abs_);
    const uint64_t real = (uint64_t{1} << left) - 1;
    word.from_low &= real, word.from_high &= real, word.invalid &= real;
    return word;
  }

  void count_invalid(const Chunk& chunk, int64_t at, uint64_t invalid, Outcome& out) const {
    for (; invalid; invalid &= invalid - 1)
      (key_at(chunk.data, at + __builtin_ctzll(invalid)) > F::kInf ? out.nans : out.negatives) += 1;
  }

  void collect_invalid(Selected& out) const {
    out.nans.assign(scores_.size(), 0), out.negatives.assign(scores_.size(), 0);
    for (size_t c = 0; c < chunks_.size(); ++c) {
      out.nans[chunks_[c].tensor] += outcomes_[c].nans;
      out.negatives[chunks_[c].tensor] += outcomes_[c].negatives;
    }
  }

  int64_t total(int64_t Outcome::* field) const {
    int64_t sum = 0;
    for (const Outcome& o : outcomes_) sum += o.*field;
    return sum;
  }

  bool bracket_holds() const {  // the k-th largest lies inside, and every entry inside was kept
    const int64_t sure = total(&Outcome::sure), inside = total(&Outcome::ties);
    size_t kept = 0;
    for (const auto& buffer : candidates_) kept += buffer.size();
    return sure < k_ && k_ <= sure + inside && kept == static_cast<size_t>(inside);
  }

  // Narrows [low, high) around the k-th largest by counting, until what is inside fits or is one single value.
  void narrow_by_histograms() {
    low_ = 0, high_ = F::kInf + 1;
    int64_t above = 0, inside = std::numeric_limits<int64_t>::max();
    while (inside > capacity_ && high_ - low_ > 1) {
      int shift = 0;
      while ((high_ - low_ - 1) >> shift >= kBins) ++shift;
      const std::vector<int64_t> bins = histogram(shift);
      int b = kBins - 1;
      while (above + bins[b] < k_) above += bins[b--];
      inside = bins[b];
      high_ = std::min(high_, low_ + (uint64_t(b + 1) << shift));
      low_ += uint64_t(b) << shift;
    }
  }

  std::vector<int64_t> histogram(int shift) const {
    std::vector<int64_t> bins(kBins, 0);
    Region region;
#pragma omp parallel num_threads(threads())
    {
      std::vector<int64_t> mine;
      region.run([&] { mine.assign(kBins, 0); });
#pragma omp for schedule(dynamic, 4)
      for (int64_t c = 0; c < static_cast<int64_t>(chunks_.size()); ++c)
        region.run([&, c] {
          const Chunk& chunk = chunks_[static_cast<size_t>(c)];
          for (int64_t i = 0; i < chunk.numel; ++i) {
            const uint64_t key = key_at(chunk.data, i);
            if (key >= low_ && key < high_) ++mine[(key - low_) >> shift];  // NaN keys lie above high
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
    for (int64_t c = 0; c < static_cast<int64_t>(chunks_.size()); ++c)
      region.run([&, c] {
        Outcome& out = outcomes_[static_cast<size_t>(c)];
        use(out, chunks_[static_cast<size_t>(c)], candidates_[static_cast<size_t>(out.thread)].data() + out.begin);
      });
    region.finish();
  }

  // The needed-th largest candidate: by a histogram, then by nth_element among those of one bin.
  uint64_t threshold_of(int64_t needed) {
    int shift = 0;
    while ((high_ - low_ - 1) >> shift >= kBins) ++shift;
    const auto bin_of = [&](const Kept& kept) { return (kept.key - low_) >> shift; };
    std::vector<std::vector<int64_t>> counts(candidates_.size(), std::vector<int64_t>(kBins, 0));
#pragma omp parallel for schedule(static) num_threads(threads())
    for (int64_t t = 0; t < static_cast<int64_t>(candidates_.size()); ++t)
      for (const Kept& kept : candidates_[static_cast<size_t>(t)]) ++counts[static_cast<size_t>(t)][bin_of(kept)];
    for (size_t t = 1; t < counts.size(); ++t)
      for (size_t b = 0; b < kBins; ++b) counts[0][b] += counts[t][b];
    size_t bin = kBins - 1;
    while (counts[0][bin] < needed) needed -= counts[0][bin--];
    std::vector<Raw> keys;
    keys.reserve(static_cast<size_t>(counts[0][bin]));
    for (const auto& buffer : candidates_)
      for (const Kept& kept : buffer)
        if (bin_of(kept) == bin) keys.push_back(kept.key);
    std::nth_element(keys.begin(), keys.begin() + needed - 1, keys.end(), std::greater<Raw>());
    return keys[static_cast<size_t>(needed - 1)];
  }

  void finish_candidates() {
    threshold_key_ = threshold_of(k_ - total(&Outcome::sure));
    const auto select = [](Outcome& out, const Chunk& chunk, const Kept& kept) {
      chunk.bits[kept.offset / 64] |= uint64_t{1} << (kept.offset % 64);
      ++out.sure;
    };
    for_each_chunk([&](Outcome& out, const Chunk& chunk, const Kept* kept) {
      out.equal = 0;
      for (const Kept* end = kept + out.ties; kept != end; ++kept) {
        if (kept->key > threshold_key_) select(out, chunk, *kept);
        out.equal += kept->key == threshold_key_;
      }
    });
    int64_t quota = k_ - total(&Outcome::sure);
    for (Outcome& out : outcomes_) {  // in flat order: ties go to the lowest index
      out.equal = std::min(out.equal, quota);
      quota -= out.equal;
    }
    for_each_chunk([&](Outcome& out, const Chunk& chunk, const Kept* kept) {
      for (; out.equal > 0; ++kept) {
        if (kept->key != threshold_key_) continue;
        select(out, chunk, *kept);
        --out.equal;
      }
    });
  }

  // All entries inside the bracket are equal: the first of them, in flat order, fill what is left of k.
  void finish_ties() {
    threshold_key_ = low_;
    int64_t quota = k_ - total(&Outcome::sure);
    for (size_t c = 0; c < chunks_.size() && quota > 0; ++c) {
      if (outcomes_[c].ties == 0) continue;
      for (int64_t at = 0; at < chunks_[c].numel && quota > 0; at += 64) {
        const Word word = scan(chunks_[c], at);
        uint64_t inside = word.from_low & ~word.from_high;
        for (; inside && quota > 0; inside &= inside - 1, --quota) {
          chunks_[c].bits[at / 64] |= inside & -inside;
          ++outcomes_[c].sure;
        }
      }
    }
  }

  // By integers, because a conversion of subnormals may flush them to zero.
  static double value_of(uint64_t key) {
    if (key == F::kInf) return std::numeric_limits<double>::infinity();
    if constexpr (sizeof(Raw) == 8) {
      double value;
      std::memcpy(&value, &key, sizeof value);
      return value;
    } else {
      // the fraction has `bits` bits
      constexpr int bits = __builtin_ctzll(F::kInf), bias = static_cast<int>(F::kInf >> bits) / 2;
      const int exponent = static_cast<int>(key >> bits);
      const double fraction = static_cast<double>(key & ((uint64_t{1} << bits) - 1));
      if (exponent == 0) return std::ldexp(fraction, 1 - bias - bits);
      return std::ldexp(fraction + static_cast<double>(uint64_t{1} << bits), exponent - bias - bits);
    }
  }

  const std::vector<ScoreTensor>& scores_;
  const ScanWord scan_;
  const int64_t k_;
  const bool abs_, skip_nan_;
  std::vector<int64_t> starts_;  // [tensors + 1] flat index of each tensor's first entry
  std::vector<Chunk> chunks_;
  std::vector<Outcome> outcomes_;              // [chunks]
  std::vector<std::vector<Kept>> candidates_;  // [threads]
  std::vector<uint64_t> sample_;               // ascending, those inside the first bracket
  int64_t numel_ = 0, capacity_ = 0, sample_size_ = 0;
  uint64_t low_ = 0, high_ = 0, threshold_key_ = 0;
};

}  // namespace

Selected select_topk(const std::vector<ScoreTensor>& scores, Dtype dtype, int64_t k, bool abs_transform,
                     bool skip_nan) {
  switch (dtype) {
    case Dtype::float32:
      return Selector<Float32>(scores, dtype, k, abs_transform, skip_nan).run();
    case Dtype::float64:
      return Selector<Float64>(scores, dtype, k, abs_transform, skip_nan).run();
    case Dtype::bfloat16:
      return Selector<Bfloat16>(scores, dtype, k, abs_transform, skip_nan).run();
    case Dtype::float16:
      break;
  }
  return Selector<Float16>(scores, dtype, k, abs_transform, skip_nan).run();
}

}  // namespace cwfast
