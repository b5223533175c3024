// bits[i] = 1 for exactly the k largest entries of a list of score tensors, ties to the lowest (tensor, flat index).
// Reference: cwfast/reference.py, select_topk; called by cwfast/ops/select.py.
// Reads the scores once per digit (float32: 3, 16-bit: 2), once for the ties and once to write N / 8 bytes of bits.
// Keys are the bits without sign: for scores they order as the numbers do, and NaN lies above infinity.
// Not yet run on a GPU: compiled for sm_80 and sm_90, and run on the CPU by tests/test_cuda_select.py.
#include "common/device.h"
#include "cuda/launchers.h"

namespace cwfast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kDigit = 11;  // bits of a key per pass: 2048 counters are 8 KB of shared memory
constexpr int kBins = 1 << kDigit;
constexpr uint32_t kNoKey = 0xffffffffu;  // above every key: nothing is selected
constexpr unsigned kAllLanes = 0xffffffffu;

template <class Bits>
struct Format;  // of the score's bits
template <>
struct Format<uint32_t> {
  static constexpr int kBits = 31;
};
template <>
struct Format<uint16_t> {
  static constexpr int kBits = 15;
};

struct Entry {
  uint32_t key;
  bool nan, negative;
};

template <class Bits>
__device__ __forceinline__ Entry entry_at(const CwfastChunk& chunk, int64_t i, uint32_t infinity) {
  const Bits bits = static_cast<const Bits*>(chunk.data)[chunk.start + i];
  const uint32_t key = bits & ((1u << Format<Bits>::kBits) - 1);
  const bool nan = key > infinity;
  return {key, nan, !nan && key != 0 && bits >> Format<Bits>::kBits};
}

// Inclusive sum over the block's threads so far; `total` of all of them. Called by all threads together.
__device__ int64_t block_scan(int64_t value, int64_t* warp_sums, int64_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t below = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += below;
  }
  if (lane == 31) warp_sums[warp] = value;
  __syncthreads();
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) value += warp_sums[w];
    total += warp_sums[w];
  }
  __syncthreads();  // warp_sums may be written again
  return value;
}

// Counts the digit at `shift` of every key whose higher digits are those of the threshold. One block per chunk, so that
// a counter in shared memory stays below 64K.
template <class Bits>
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const CwfastChunk* chunks, const int64_t* state, unsigned long long* histogram, int64_t* tallies,
                     int shift, int decided, uint32_t infinity, int count_invalid, int abs) {
  __shared__ unsigned bins[kBins];
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) bins[bin] = 0;
  __syncthreads();
  const CwfastChunk chunk = chunks[blockIdx.x];
  const uint32_t threshold = static_cast<uint32_t>(state[1]);
  unsigned nans = 0, negatives = 0;
  for (int64_t i = threadIdx.x; i < chunk.length; i += kThreads) {
    const Entry entry = entry_at<Bits>(chunk, i, infinity);
    nans += entry.nan;
    negatives += entry.negative;
    if (!entry.nan && entry.key >> decided == threshold >> decided)
      atomicAdd(&bins[entry.key >> shift & (kBins - 1)], 1u);
  }
  if (count_invalid) {
    auto* const tally = reinterpret_cast<unsigned long long*>(tallies + chunk.tensor * 3);
    if (nans) atomicAdd(&tally[1], nans);
    if (negatives && !abs) atomicAdd(&tally[2], negatives);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads)
    if (bins[bin]) atomicAdd(&histogram[bin], static_cast<unsigned long long>(bins[bin]));
}

// One block: the digit of the threshold, and how many of the entries with it are still to be taken.
__global__ void __launch_bounds__(kThreads) digit_kernel(int64_t* state, uint64_t* histogram, int shift) {
  __shared__ int64_t warp_sums[kWarps];
  const int64_t k = state[0];  // read by all before one writes it: the barriers of block_scan lie between
  const uint32_t threshold = static_cast<uint32_t>(state[1]);
  int64_t above = 0;
  bool found = false;
  for (int top = kBins; top > 0; top -= kThreads) {
    const int bin = top - 1 - static_cast<int>(threadIdx.x);
    const int64_t count = static_cast<int64_t>(histogram[bin]);
    histogram[bin] = 0;
    int64_t total;
    const int64_t reached = above + block_scan(count, warp_sums, total);
    if (k > 0 && reached >= k && reached - count < k) {
      state[0] = k - (reached - count);
      state[1] = threshold | static_cast<uint32_t>(bin) << shift;
    }
    above += total;
    found = found || above >= k;
  }
  if (threadIdx.x == 0 && (k == 0 || !found)) {  // nothing wanted, or more than there is
    state[0] = 0;
    state[1] = kNoKey;
  }
}

template <class Bits>
__global__ void __launch_bounds__(kThreads)
    ties_kernel(const CwfastChunk* chunks, const int64_t* state, int64_t* ties, uint32_t infinity) {
  __shared__ int64_t warp_sums[kWarps];
  const CwfastChunk chunk = chunks[blockIdx.x];
  const uint32_t threshold = static_cast<uint32_t>(state[1]);
  int64_t count = 0, total;
  for (int64_t i = threadIdx.x; i < chunk.length; i += kThreads) {
    const Entry entry = entry_at<Bits>(chunk, i, infinity);
    count += !entry.nan && entry.key == threshold;
  }
  block_scan(count, warp_sums, total);
  if (threadIdx.x == 0) ties[blockIdx.x] = total;
}

// One block: ties[c] becomes the number of ties in the chunks before c.
__global__ void __launch_bounds__(kThreads) ties_before_kernel(int64_t* ties, int64_t chunk_count) {
  __shared__ int64_t warp_sums[kWarps];
  int64_t before = 0;
  for (int64_t base = 0; base < chunk_count; base += kThreads) {
    const int64_t c = base + threadIdx.x;
    const int64_t own = c < chunk_count ? ties[c] : 0;
    int64_t total;
    const int64_t reached = before + block_scan(own, warp_sums, total);
    if (c < chunk_count) ties[c] = reached - own;
    before += total;
  }
  if (threadIdx.x == 0) ties[chunk_count] = before;
}

template <class Bits>
__global__ void __launch_bounds__(kThreads) bits_kernel(const CwfastChunk* chunks, const int64_t* state,
                                                        const int64_t* ties, int64_t* tallies, uint32_t infinity) {
  __shared__ int64_t warp_sums[kWarps];
  const CwfastChunk chunk = chunks[blockIdx.x];
  const uint32_t threshold = static_cast<uint32_t>(state[1]);
  const int64_t before = ties[blockIdx.x], own = ties[blockIdx.x + 1] - before;
  const int64_t room = state[0] - before, allowed = room < 0 ? 0 : room < own ? room : own;
  const bool some = 0 < allowed && allowed < own;  // the one chunk where ranks matter
  const int64_t padded = (chunk.length + 63) / 64 * 64;
  int64_t taken = 0, selected = 0;
  for (int64_t base = 0; base < padded; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    bool above = false, tie = false;
    if (i < chunk.length) {
      const Entry entry = entry_at<Bits>(chunk, i, infinity);
      above = !entry.nan && entry.key > threshold;
      tie = !entry.nan && entry.key == threshold;
    }
    if (some) {
      int64_t total;
      const int64_t rank = taken + block_scan(tie, warp_sums, total);
      taken += total;
      tie = tie && rank <= allowed;
    } else {
      tie = tie && allowed > 0;
    }
    const unsigned word = __ballot_sync(kAllLanes, above || tie);
    if (threadIdx.x % 32 == 0 && i < padded) {
      chunk.bits[(chunk.start + i) / 32] = word;
      selected += __popc(word);
    }
  }
  if (selected)
    atomicAdd(reinterpret_cast<unsigned long long*>(tallies + chunk.tensor * 3),
              static_cast<unsigned long long>(selected));
}

template <class Bits>
int launch(const CwfastChunk* chunks, int64_t chunk_count, uint32_t infinity, int abs, int64_t* state,
           uint64_t* histogram, int64_t* ties, int64_t* tallies, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(chunk_count);
  auto* const counters = reinterpret_cast<unsigned long long*>(histogram);
  for (int decided = Format<Bits>::kBits; decided > 0;) {
    const int shift = decided > kDigit ? decided - kDigit : 0;
    const int first = decided == Format<Bits>::kBits;
    CW_LAUNCH((histogram_kernel<Bits>), blocks, kThreads, 0, stream, chunks, state, counters, tallies, shift, decided,
              infinity, first, abs);
    CW_LAUNCH(digit_kernel, 1, kThreads, 0, stream, state, histogram, shift);
    decided = shift;
  }
  CW_LAUNCH((ties_kernel<Bits>), blocks, kThreads, 0, stream, chunks, state, ties, infinity);
  CW_LAUNCH(ties_before_kernel, 1, kThreads, 0, stream, ties, chunk_count);
  CW_LAUNCH((bits_kernel<Bits>), blocks, kThreads, 0, stream, chunks, state, ties, tallies, infinity);
  return launch_status();
}

}  // namespace
}  // namespace cwfast

extern "C" int cwfast_cuda_select_topk(const CwfastChunk* chunks, int64_t chunk_count, int dtype, int abs,
                                       int64_t* state, uint64_t* histogram, int64_t* ties, int64_t* tallies, int device,
                                       void* stream) {
  using namespace cwfast;
  if (chunk_count == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.status) return guard.status;
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == kFloat32)
    return launch<uint32_t>(chunks, chunk_count, 0x7f800000u, abs, state, histogram, ties, tallies, on);
  const uint32_t infinity = dtype == kBfloat16 ? 0x7f80u : 0x7c00u;
  return launch<uint16_t>(chunks, chunk_count, infinity, abs, state, histogram, ties, tallies, on);
}
