// select_topk on the CPU: sampled bracket, one verified read, histograms where the bracket fails. Always exact.
// Reference: cwfast.reference.select_topk. Called by cwfast/ops/select.py. Traffic: one read of the scores (at best).
#include "select.h"

#include <algorithm>
#include <functional>
#include <limits>

#include "cpu/select_pass.h"
#include "cpu/select_sample.h"

namespace cwfast {
namespace {

template <class F>
class Selector {
  using Raw = typename F::Raw;
  using Kept = Candidate<Raw>;

 public:
  Selector(const std::vector<ScoreTensor>& scores, Dtype dtype, int64_t k, bool abs, bool skip_nan)
      : scores_(scores), pass_(scores, dtype, abs), k_(k), skip_nan_(skip_nan) {}

  Selected run() {
    sample_ = sample_bracket(pass_, k_);
    pass_.low = sample_.low, pass_.high = sample_.high;
    const bool tied = settle_heavy_ties();
    if (!tied) pass_.read(true);
    Selected out;
    pass_.collect_invalid(out);
    int64_t selectable = pass_.numel;
    for (int64_t n : out.nans) selectable -= n;
    const bool negative = std::any_of(out.negatives.begin(), out.negatives.end(), [](int64_t n) { return n > 0; });
    if (negative || k_ > selectable || (!skip_nan_ && selectable != pass_.numel)) return out;
    if (k_ == 0) {
      pass_.low = pass_.high = F::kInf + 1;
      pass_.read(false);
      threshold_key_ = F::kInf;
    } else if (tied) {
      finish_ties();
    } else if (bracket_holds()) {
      finish_candidates();
    } else {
      narrow_by_histograms();
      const bool one_value = pass_.high - pass_.low == 1;
      pass_.read(!one_value);
      one_value ? finish_ties() : finish_candidates();
    }
    out.counts.assign(scores_.size(), 0);
    for (size_t c = 0; c < pass_.chunks.size(); ++c) out.counts[pass_.chunks[c].tensor] += pass_.outcomes[c].sure;
    out.threshold = value_of<F>(threshold_key_);
    out.valid = true;
    return out;
  }

 private:
  // Where one value alone would overflow the candidates (all equal, mostly zero), a read that only counts it tells on
  // which side of it the k-th largest lies, or that it is the one: true, and [low, high) is that value alone.
  bool settle_heavy_ties() {
    uint64_t low = pass_.low, high = pass_.high;  // the bracket as it narrows
    while (k_ > 0 && low < high) {
      uint64_t heaviest = 0;
      size_t most = 0;
      for (size_t i = 0, j = 0; i < sample_.keys.size(); i = j) {
        while (j < sample_.keys.size() && sample_.keys[j] == sample_.keys[i]) ++j;
        if (sample_.keys[i] >= low && sample_.keys[i] < high && j - i > most) most = j - i, heaviest = sample_.keys[i];
      }
      if (static_cast<double>(most) * static_cast<double>(pass_.numel) <= 0.5 * pass_.capacity * sample_.size) break;
      pass_.low = heaviest, pass_.high = heaviest + 1;
      pass_.read(false);
      const int64_t above = pass_.total(&Outcome::sure);
      if (above < k_ && k_ <= above + pass_.total(&Outcome::ties)) return true;
      (k_ <= above ? low : high) = k_ <= above ? heaviest + 1 : heaviest;
    }
    if (low < high) pass_.low = low, pass_.high = high;
    return false;
  }

  bool bracket_holds() const {  // the k-th largest lies inside, and every entry inside was kept
    const int64_t sure = pass_.total(&Outcome::sure), inside = pass_.total(&Outcome::ties);
    size_t kept = 0;
    for (const auto& buffer : pass_.candidates) kept += buffer.size();
    return sure < k_ && k_ <= sure + inside && kept == static_cast<size_t>(inside);
  }

  // Narrows [low, high) around the k-th largest by counting, until what is inside fits or is one single value.
  void narrow_by_histograms() {
    pass_.low = 0, pass_.high = F::kInf + 1;
    int64_t above = 0, inside = std::numeric_limits<int64_t>::max();
    while (inside > pass_.capacity && pass_.high - pass_.low > 1) {
      int shift = 0;
      while ((pass_.high - pass_.low - 1) >> shift >= kBins) ++shift;
      const std::vector<int64_t> bins = pass_.histogram(shift);
      int b = kBins - 1;
      while (above + bins[b] < k_) above += bins[b--];
      inside = bins[b];
      pass_.high = std::min(pass_.high, pass_.low + (uint64_t(b + 1) << shift));
      pass_.low += uint64_t(b) << shift;
    }
  }

  // The needed-th largest candidate: by a histogram, then by nth_element among those of one bin.
  uint64_t threshold_of(int64_t needed) {
    int shift = 0;
    while ((pass_.high - pass_.low - 1) >> shift >= kBins) ++shift;
    const auto bin_of = [&](const Kept& kept) { return (kept.key - pass_.low) >> shift; };
    std::vector<std::vector<int64_t>> counts(pass_.candidates.size(), std::vector<int64_t>(kBins, 0));
#pragma omp parallel for schedule(static) num_threads(threads())
    for (int64_t t = 0; t < static_cast<int64_t>(pass_.candidates.size()); ++t)
      for (const Kept& kept : pass_.candidates[static_cast<size_t>(t)]) ++counts[static_cast<size_t>(t)][bin_of(kept)];
    for (size_t t = 1; t < counts.size(); ++t)
      for (size_t b = 0; b < kBins; ++b) counts[0][b] += counts[t][b];
    size_t bin = kBins - 1;
    while (counts[0][bin] < needed) needed -= counts[0][bin--];
    std::vector<Raw> keys;
    keys.reserve(static_cast<size_t>(counts[0][bin]));
    for (const auto& buffer : pass_.candidates)
      for (const Kept& kept : buffer)
        if (bin_of(kept) == bin) keys.push_back(kept.key);
    std::nth_element(keys.begin(), keys.begin() + needed - 1, keys.end(), std::greater<Raw>());
    return keys[static_cast<size_t>(needed - 1)];
  }

  void finish_candidates() {
    threshold_key_ = threshold_of(k_ - pass_.total(&Outcome::sure));
    const auto select = [](Outcome& out, const Chunk& chunk, const Kept& kept) {
      chunk.bits[kept.offset / 64] |= uint64_t{1} << (kept.offset % 64);
      ++out.sure;
    };
    pass_.for_each_chunk([&](Outcome& out, const Chunk& chunk, const Kept* kept) {
      out.equal = 0;
      for (const Kept* end = kept + out.ties; kept != end; ++kept) {
        if (kept->key > threshold_key_) select(out, chunk, *kept);
        out.equal += kept->key == threshold_key_;
      }
    });
    int64_t quota = k_ - pass_.total(&Outcome::sure);
    for (Outcome& out : pass_.outcomes) {  // in flat order: ties go to the lowest index
      out.equal = std::min(out.equal, quota);
      quota -= out.equal;
    }
    pass_.for_each_chunk([&](Outcome& out, const Chunk& chunk, const Kept* kept) {
      for (; out.equal > 0; ++kept) {
        if (kept->key != threshold_key_) continue;
        select(out, chunk, *kept);
        --out.equal;
      }
    });
  }

  // All entries inside the bracket are equal: the first of them, in flat order, fill what is left of k.
  void finish_ties() {
    threshold_key_ = pass_.low;
    int64_t quota = k_ - pass_.total(&Outcome::sure);
    for (size_t c = 0; c < pass_.chunks.size() && quota > 0; ++c) {
      if (pass_.outcomes[c].ties == 0) continue;
      for (int64_t at = 0; at < pass_.chunks[c].numel && quota > 0; at += 64) {
        const Word word = pass_.scan(pass_.chunks[c], at);
        uint64_t inside = word.from_low & ~word.from_high;
        for (; inside && quota > 0; inside &= inside - 1, --quota) {
          pass_.chunks[c].bits[at / 64] |= inside & -inside;
          ++pass_.outcomes[c].sure;
        }
      }
    }
  }

  const std::vector<ScoreTensor>& scores_;
  Pass<F> pass_;
  const int64_t k_;
  const bool skip_nan_;
  Sample sample_;
  uint64_t threshold_key_ = 0;
};

}  // namespace

Selected select_topk(const std::vector<ScoreTensor>& scores, Dtype dtype, int64_t k, bool abs_transform,
                     bool skip_nan) {
  return by_dtype(
      dtype, [&](auto format) { return Selector<decltype(format)>(scores, dtype, k, abs_transform, skip_nan).run(); });
}

}  // namespace cwfast
