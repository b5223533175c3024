// target[i] = source[i] for every selected entry i of every tensor: rewind_, and with compact values on one side gather
// (values[rank of i] = source[i]) and scatter_ (target[i] = values[rank of i]).
// Reference: cwfast/reference.py, rewind_, gather, scatter_; called by cwfast/ops/_rewind_device.py.
// Reads the picks (1/8 byte an entry, or 2 bytes a selected one) and touches two entries for each selected one.
// Not yet run on a GPU: compiled for sm_80 and sm_90, and run on the CPU by tests/test_cuda_rewind.py.
#include "common/device.h"
#include "cuda/launchers.h"

namespace cwfast {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlock = 1 << 16;     // entries of a thread block
constexpr int64_t kSlice = kBlock / 8;  // and of a warp: its packed bits are counted together
constexpr int kSliceWords = kSlice / 32;
constexpr int kAtOnce = 4;  // loads under way before the first is stored: they are far apart in memory
constexpr unsigned kAllLanes = 0xffffffffu;

// The part of a tensor that this thread block works on.
struct Part {
  const CwfastSelected* tensor;
  int64_t block, start, length;  // block `block` of the tensor: entries start to start + length
};

__device__ __forceinline__ Part part_of(const CwfastSelected* tensors, int64_t tensor_count, int64_t block) {
  int64_t low = 0, high = tensor_count - 1;  // the last tensor whose first block is not after this one
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (tensors[middle].first <= block)
      low = middle;
    else
      high = middle - 1;
  }
  const int64_t own = block - tensors[low].first, start = own * kBlock, left = tensors[low].numel - start;
  return {tensors + low, own, start, left < kBlock ? left : kBlock};
}

// What is wrong with a list's offsets and positions in this block; 0: nothing.
__device__ int wrong_list(const Part& part) {
  const CwfastSelected& tensor = *part.tensor;
  const auto* const low = static_cast<const uint16_t*>(tensor.picks);
  const int64_t blocks = (tensor.numel + kBlock - 1) / kBlock;
  if (part.block == 0 && (tensor.offset[0] != 0 || tensor.offset[blocks] != tensor.k)) return kWrongEnds;
  if (part.length == 0) return 0;
  const int64_t begin = tensor.offset[part.block], end = tensor.offset[part.block + 1];
  if (begin < 0 || end < begin || end > tensor.k) return kWrongOffsets;  // and low must not be read
  bool wrong = false;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads)
    wrong = wrong || low[i] >= part.length || (i > begin && low[i] <= low[i - 1]);
  return wrong ? kWrongPositions : 0;
}

// counts[8 block + warp] = bits set in each slice, 0 for a list; wrong[tensor] |= what is wrong with its picks.
__global__ void __launch_bounds__(kThreads)
    survey_kernel(const CwfastSelected* tensors, int64_t tensor_count, int64_t* counts, int* wrong) {
  const Part part = part_of(tensors, tensor_count, blockIdx.x);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int found = 0;
  unsigned count = 0;
  if (part.tensor->offset) {
    found = wrong_list(part);
  } else {
    const auto* const words = static_cast<const uint32_t*>(part.tensor->picks) + part.start / 32;
    const int64_t padded = (part.length + 63) / 64 * 2;
    for (int64_t w = warp * kSliceWords + lane; w < (warp + 1) * kSliceWords && w < padded; w += 32) {
      const uint32_t word = words[w];
      const int64_t used = part.length - 32 * w;  // bits of this word that stand for entries
      if (used < 32 && word >> (used < 0 ? 0 : used)) found = kWrongPadding;
      count += __popc(word);
    }
  }
  if (found) atomicOr(wrong + (part.tensor - tensors), found);
  count = __reduce_add_sync(kAllLanes, count);
  if (lane == 0) counts[blockIdx.x * int64_t{8} + warp] = count;
}

// Where entry `flat` lies, which is selected entry number `rank`; in entries.
__device__ __forceinline__ int64_t place(const CwfastView& view, const int64_t* layouts, int64_t flat, int64_t rank) {
  if (view.dims == 0) return flat;
  if (view.dims < 0) return rank;
  int64_t at = 0;
  for (const int64_t* dim = layouts + view.layout; dim < layouts + view.layout + 2 * view.dims; dim += 2) {
    at += flat % dim[0] * dim[1];
    flat /= dim[0];
  }
  return at;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    move_kernel(const CwfastSelected* tensors, int64_t tensor_count, const int64_t* layouts) {
  const Part part = part_of(tensors, tensor_count, blockIdx.x);
  if (part.length == 0) return;
  const CwfastSelected& tensor = *part.tensor;
  const CwfastView from = tensor.source, to = tensor.target;
  const T* const source = static_cast<const T*>(from.data);
  T* const target = static_cast<T*>(to.data);
  if (tensor.offset) {
    const auto* const low = static_cast<const uint16_t*>(tensor.picks);
    const int64_t end = tensor.offset[part.block + 1];
    for (int64_t base = tensor.offset[part.block] + threadIdx.x; base < end; base += kAtOnce * kThreads) {
      T kept[kAtOnce];
      int64_t flat[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t i = base + u * kThreads;
        if (i >= end) continue;
        flat[u] = part.start + low[i];
        kept[u] = source[place(from, layouts, flat[u], i)];
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t i = base + u * kThreads;
        if (i < end) target[place(to, layouts, flat[u], i)] = kept[u];
      }
    }
    return;
  }
  // Packed bits: a warp takes 32 words at a time, one a lane; then each word by all lanes, so that they touch
  // neighbours.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto* const words = static_cast<const uint32_t*>(tensor.picks) + part.start / 32;
  const int64_t word_count = (part.length + 31) / 32;
  int64_t rank = tensor.ranks ? tensor.ranks[8 * part.block + warp] - tensor.ranks[0] : 0;
  for (int64_t w = warp * kSliceWords; w < (warp + 1) * kSliceWords && w < word_count; w += 32) {
    const uint32_t own = w + lane < word_count ? words[w + lane] : 0;
    if (!__any_sync(kAllLanes, own != 0)) continue;
    for (int first = 0; first < 32; first += kAtOnce) {
      T kept[kAtOnce];
      uint32_t word[kAtOnce];
      int64_t ranks[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        word[u] = __shfl_sync(kAllLanes, own, first + u);
        ranks[u] = rank + __popc(word[u] & ((1u << lane) - 1));
        rank += __popc(word[u]);
        const int64_t flat = part.start + 32 * (w + first + u) + lane;
        if (word[u] >> lane & 1) kept[u] = source[place(from, layouts, flat, ranks[u])];
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t flat = part.start + 32 * (w + first + u) + lane;
        if (word[u] >> lane & 1) target[place(to, layouts, flat, ranks[u])] = kept[u];
      }
    }
  }
}

}  // namespace
}  // namespace cwfast

extern "C" int cwfast_cuda_rewind_survey(const CwfastSelected* tensors, int64_t tensor_count, int64_t blocks,
                                         int64_t* counts, int* wrong, int device, void* stream) {
  using namespace cwfast;
  const DeviceGuard guard(device);
  if (guard.status) return guard.status;
  CW_LAUNCH(survey_kernel, static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream), tensors,
            tensor_count, counts, wrong);
  return launch_status();
}

extern "C" int cwfast_cuda_rewind_move(const CwfastSelected* tensors, int64_t tensor_count, int64_t blocks,
                                       const int64_t* layouts, int item_size, int device, void* stream) {
  using namespace cwfast;
  const DeviceGuard guard(device);
  if (guard.status) return guard.status;
  const auto launch = [&](auto entry) {  // entries are only copied: the unsigned integer of their size does
    CW_LAUNCH((move_kernel<decltype(entry)>), static_cast<unsigned>(blocks), kThreads, 0,
              static_cast<cudaStream_t>(stream), tensors, tensor_count, layouts);
    return launch_status();
  };
  switch (item_size) {
    case 1:
      return launch(uint8_t{});
    case 2:
      return launch(uint16_t{});
    case 4:
      return launch(uint32_t{});
    default:
      return launch(uint64_t{});
  }
}
