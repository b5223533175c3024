// Where the k-th largest score probably lies, from a sample of the keys; select.cpp verifies it by counting.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "cpu/select_pass.h"

namespace cwfast {

struct Sample {
  uint64_t low = 0, high = 0;  // the bracket of keys [low, high)
  std::vector<uint64_t> keys;  // ascending, those inside the bracket
  int64_t size = 0;            // points that were looked at
};

inline uint64_t mix(uint64_t x) {  // splitmix64 (Steele et al., 2014): the same points on every run
  x = x * 0x9E3779B97F4A7C15ull + 0x1234567ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// A stratified sample: the bracket is the rank of the k-th largest +- kSigmas, which fails in one of 100,000 cases and
// then costs a few reads. All keys where everything fits the candidate buffer.
constexpr double kSigmas = 4.5;

// Points of a sample. As many as cost about what they save: a point takes some 60 ns (it is far from all others), a
// candidate 7 ns. At least so many that the bracket holds 0.6% of all entries, at most a sixteenth of the data.
inline int64_t sample_size(double numel, double p) {
  const double saved = 7.0 / 60 * kSigmas * numel * std::sqrt(p * (1 - p));
  const double size = std::max(std::cbrt(saved * saved), std::pow(2 * kSigmas / 0.006, 2) * p * (1 - p));
  return static_cast<int64_t>(std::min(std::clamp(size, 0x1p14, 0x1p20), std::max(1024.0, numel / 16)));
}

template <class F>
Sample sample_bracket(const Pass<F>& pass, int64_t k) {
  Sample out;
  out.high = F::kInf + 1;
  if (pass.numel <= pass.capacity) return out;
  const double p = static_cast<double>(k) / static_cast<double>(pass.numel);
  const int64_t size = sample_size(static_cast<double>(pass.numel), p);
  std::vector<uint64_t> keys(static_cast<size_t>(size));
  const auto scaled = [&](int64_t i) { return static_cast<int64_t>(static_cast<__int128>(pass.numel) * i / size); };
#pragma omp parallel for schedule(static) num_threads(threads())
  for (int64_t i = 0; i < size; ++i) {
    const int64_t from = scaled(i), to = scaled(i + 1);
    const int64_t flat = from + static_cast<int64_t>(mix(static_cast<uint64_t>(i)) % static_cast<uint64_t>(to - from));
    const uint64_t key = pass.key_of(flat);
    keys[i] = key > F::kInf ? 0 : key;
  }
  const int64_t rank = static_cast<int64_t>(p * size);
  const int64_t margin = static_cast<int64_t>(kSigmas * std::sqrt(p * (1 - p) * size)) + 4;
  const auto descending = std::greater<uint64_t>();
  if (rank + margin < size) {
    std::nth_element(keys.begin(), keys.begin() + rank + margin, keys.end(), descending);
    out.low = keys[rank + margin];
  }
  if (rank - margin >= 0) {
    std::nth_element(keys.begin(), keys.begin() + rank - margin, keys.end(), descending);
    out.high = keys[rank - margin] + 1;
  }
  keys.erase(std::remove_if(keys.begin(), keys.end(), [&](uint64_t key) { return key < out.low || key >= out.high; }),
             keys.end());
  std::sort(keys.begin(), keys.end());
  out.keys = std::move(keys);
  out.size = size;
  return out;
}

}  // namespace cwfast
