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

// A stratified sample: the bracket is the rank of the k-th largest +- 6 sigma. All keys where everything fits the
// candidate buffer.
template <class F>
Sample sample_bracket(const Pass<F>& pass, int64_t k) {
  Sample out;
  out.high = F::kInf + 1;
  if (pass.numel <= pass.capacity) return out;
  const double p = static_cast<double>(k) / static_cast<double>(pass.numel);
  // Enough points that +- 6 sigma of rank is about 0.6% of all entries; never more than a sixteenth of the data.
  int64_t size = static_cast<int64_t>(std::pow(2 * 6 * 160.0, 2) * p * (1 - p));
  size = std::min(std::clamp<int64_t>(size, 1 << 14, 1 << 20), std::max<int64_t>(1024, pass.numel / 16));
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
  const int64_t margin = static_cast<int64_t>(6 * std::sqrt(p * (1 - p) * size)) + 4;
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
