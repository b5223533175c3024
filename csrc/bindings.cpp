// Python names of the kernels. Pointers come as integers from torch.Tensor.data_ptr(); the checks are in cwfast/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>

#include "adamw.h"
#include "embedding_saliency.h"
#include "lm_token_stats.h"
#include "logit_stats.h"
#include "peak.h"
#include "rewind.h"
#include "runtime.h"
#include "saliency.h"
#include "select.h"
#ifdef CWFAST_WITH_CUDA
#include "cuda/launchers.h"
#endif

namespace py = pybind11;

namespace cwfast {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Runs a kernel without the GIL; Ctrl-C during it becomes the Python exception that the signal handler raised.
template <class Work>
auto unlocked(Work work) {
  try {
    const py::gil_scoped_release release;
    return work();
  } catch (const Interrupted&) {
    throw py::error_already_set();
  }
}

bool signal_pending() {
  const py::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

void bind_runtime(py::module_& m) {
  interrupt_check = signal_pending;
  if (const char* wanted = std::getenv("CWFAST_CPU_ISA")) set_isa(wanted);
  m.def("isas", supported_isas, "Instruction sets that this processor runs, best last.");
  m.def("isa", current_isa, "The instruction set in use.");
  m.def("set_isa", set_isa, py::arg("name"), "Use one of isas(); for tests.");
  m.def("threads", threads, "OpenMP threads that a kernel uses.");
  m.def("set_threads", set_threads, py::arg("count"), "Sets that, for kernels that this thread calls.");
  m.def(
      "fma_peak", [](int64_t rounds) { return unlocked([&] { return fma_peak(rounds); }); }, py::arg("rounds"),
      "Runs float32 multiply-adds in registers on all threads; returns how many floating-point operations they were.");
}

template <class T>
void saliency(uintptr_t out, uintptr_t inputs, uintptr_t grad_outputs, int64_t input_stride, int64_t grad_stride,
              uintptr_t row_offsets, int64_t samples, int64_t out_features, int64_t in_features, int power,
              double scale, uintptr_t factor, uintptr_t grad, bool overwrite) {
  const SaliencyArgs<T> args{pointer<T>(out),
                             pointer<const T>(inputs),
                             pointer<const T>(grad_outputs),
                             input_stride,
                             grad_stride,
                             pointer<const int64_t>(row_offsets),
                             samples,
                             out_features,
                             in_features,
                             power,
                             scale,
                             pointer<const T>(factor),
                             pointer<T>(grad),
                             overwrite};
  unlocked([&] { accumulate_saliency(args); });
}

void bind_saliency(py::module_& m) {
  m.def("accumulate_saliency_float32", saliency<float>);
  m.def("accumulate_saliency_float64", saliency<double>);
}

using PickItem = std::tuple<int64_t, uintptr_t, uintptr_t, uintptr_t, int64_t>;  // numel, bits, low, offset, k

Picks picks_of(const PickItem& item) {
  const auto& [numel, bits, low, offset, k] = item;
  return {numel, pointer<const uint64_t>(bits), pointer<const uint16_t>(low), pointer<const int64_t>(offset), k};
}

std::vector<Picks> picks_of(const std::vector<PickItem>& items) {
  std::vector<Picks> picks;
  for (const PickItem& item : items) picks.push_back(picks_of(item));
  return picks;
}

void bind_select(py::module_& m) {
  py::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::float32)
      .value("float64", Dtype::float64)
      .value("bfloat16", Dtype::bfloat16)
      .value("float16", Dtype::float16);
  py::class_<Selected>(m, "Selected")
      .def_readonly("counts", &Selected::counts)
      .def_readonly("nans", &Selected::nans)
      .def_readonly("negatives", &Selected::negatives)
      .def_readonly("threshold", &Selected::threshold)
      .def_readonly("valid", &Selected::valid);
  using Item = std::tuple<uintptr_t, int64_t, uintptr_t>;  // data, numel, bits
  m.def("select_topk", [](const std::vector<Item>& items, Dtype dtype, int64_t k, bool abs, bool skip_nan) {
    std::vector<ScoreTensor> scores;
    for (const auto& [data, numel, bits] : items)
      scores.push_back({pointer<const void>(data), numel, pointer<uint64_t>(bits)});
    return unlocked([&] { return select_topk(scores, dtype, k, abs, skip_nan); });
  });
  m.def("score_histogram",
        [](uintptr_t data, int64_t numel, Dtype dtype, uint64_t low, int shift, uintptr_t bins, int64_t bin_count) {
          const ScoreTensor scores{pointer<const void>(data), numel, nullptr};
          unlocked([&] { score_histogram(scores, dtype, low, shift, pointer<int64_t>(bins), bin_count); });
        });
  m.def("mark_scores", [](uintptr_t data, int64_t numel, Dtype dtype, uint64_t low, uint64_t high, uintptr_t bits,
                          uintptr_t inside) {
    const ScoreTensor scores{pointer<const void>(data), numel, pointer<uint64_t>(bits)};
    const Marks marks = unlocked([&] { return mark_scores(scores, dtype, low, high, pointer<uint64_t>(inside)); });
    return std::make_tuple(marks.above, marks.inside, marks.nans, marks.negatives);
  });
  m.def("settle_marks", [](const PickItem& above, const PickItem& inside, uintptr_t values, Dtype dtype,
                           uint64_t threshold, int64_t ties, uintptr_t bits) {
    unlocked([&, a = picks_of(above), i = picks_of(inside)] {
      settle_marks(a, i, pointer<const void>(values), dtype, threshold, ties, pointer<uint64_t>(bits));
    });
  });
}

using ViewItem = std::tuple<uintptr_t, std::vector<int64_t>, std::vector<int64_t>>;  // data, sizes, strides

std::vector<View> views_of(const std::vector<ViewItem>& items) {
  std::vector<View> views;
  for (const auto& [data, sizes, strides] : items) views.push_back({pointer<char>(data), sizes, strides});
  return views;
}

template <class T>
std::vector<T*> pointers(const std::vector<uintptr_t>& addresses) {
  std::vector<T*> out;
  for (uintptr_t address : addresses) out.push_back(pointer<T>(address));
  return out;
}

void bind_rewind(py::module_& m) {
  m.def("check_picks", [](const std::vector<PickItem>& picks) {
    return unlocked([list = picks_of(picks)] { return check_picks(list); });
  });
  m.def("count_picks", [](const std::vector<PickItem>& picks) {
    return unlocked([list = picks_of(picks)] { return count_picks(list); });
  });
  m.def("list_picks", [](int64_t numel, uintptr_t bits, uintptr_t low, uintptr_t offset) {
    const Picks packed{numel, pointer<const uint64_t>(bits), nullptr, nullptr, 0};
    unlocked([&] { list_picks(packed, pointer<uint16_t>(low), pointer<int64_t>(offset)); });
  });
  m.def(
      "rewind",
      [](const std::vector<ViewItem>& weights, const std::vector<ViewItem>& initial, const std::vector<PickItem>& picks,
         int item_size, bool check) {
        return unlocked([&, w = views_of(weights), w0 = views_of(initial), list = picks_of(picks)] {
          return rewind(w, w0, list, item_size, check);
        });
      },
      py::arg("weights"), py::arg("initial"), py::arg("picks"), py::arg("item_size"), py::arg("check") = false);
  m.def("gather", [](const std::vector<ViewItem>& weights, const std::vector<PickItem>& picks,
                     const std::vector<uintptr_t>& values, int item_size) {
    unlocked([&, w = views_of(weights), list = picks_of(picks), v = pointers<char>(values)] {
      gather(w, list, v, item_size);
    });
  });
  m.def(
      "scatter",
      [](const std::vector<ViewItem>& weights, const std::vector<PickItem>& picks, const std::vector<uintptr_t>& values,
         int item_size, bool check) {
        return unlocked([&, w = views_of(weights), list = picks_of(picks), v = pointers<const char>(values)] {
          return scatter(w, list, v, item_size, check);
        });
      },
      py::arg("weights"), py::arg("picks"), py::arg("values"), py::arg("item_size"), py::arg("check") = false);
}

void bind_adamw(py::module_& m) {
  // weight, grad, exp_avg, exp_avg_sq, 1 - beta1^step, sqrt(1 - beta2^step)
  using Item = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, double, double>;
  m.def("selected_adamw", [](const std::vector<Item>& items, const std::vector<PickItem>& picks, double lr,
                             double beta1, double beta2, double eps, double weight_decay, bool maximize) {
    std::vector<AdamwTensor> tensors;
    for (const auto& [weight, grad, exp_avg, exp_avg_sq, correction, sqrt_correction] : items)
      tensors.push_back({pointer<float>(weight), pointer<const float>(grad), pointer<float>(exp_avg),
                         pointer<float>(exp_avg_sq), correction, sqrt_correction});
    const AdamwOptions options{lr, beta1, beta2, eps, weight_decay, maximize};
    unlocked([&, list = picks_of(picks)] { selected_adamw(tensors, list, options); });
  });
}

using Matrix = std::tuple<uintptr_t, Dtype, int64_t, int64_t>;  // data, dtype, strides in entries

template <class T>
void embedding_saliency(const Matrix& out, const Matrix& grad, bool overwrite, uintptr_t owner, uintptr_t tokens,
                        const Matrix& grad_outputs, const Matrix& factor, int64_t rows, int64_t vocabulary,
                        int64_t columns, int64_t padding, int power, double scale) {
  const auto read = [](const Matrix& x) {
    const auto& [data, dtype, row_stride, column_stride] = x;
    return Strided{pointer<const void>(data), dtype, row_stride, column_stride};
  };
  const auto written = [](const Matrix& x) {
    const auto& [data, dtype, row_stride, column_stride] = x;
    return Written<T>{pointer<T>(data), row_stride, column_stride};
  };
  const EmbeddingSaliencyArgs<T> args{written(out),
                                      written(grad),
                                      overwrite,
                                      pointer<const int64_t>(owner),
                                      pointer<const int64_t>(tokens),
                                      read(grad_outputs),
                                      read(factor),
                                      rows,
                                      vocabulary,
                                      columns,
                                      padding,
                                      power,
                                      scale};
  unlocked([&] { accumulate_embedding_saliency(args); });
}

void bind_embedding_saliency(py::module_& m) {
  m.def("accumulate_embedding_saliency_float32", embedding_saliency<float>);
  m.def("accumulate_embedding_saliency_float64", embedding_saliency<double>);
}

void bind_logit_stats(py::module_& m) {
  m.def("logit_stats", [](uintptr_t logits, Dtype dtype, int64_t rows, int64_t classes, int64_t row_stride,
                          int64_t class_stride, uintptr_t labels, uintptr_t loss, uintptr_t confidence, uintptr_t phi,
                          uintptr_t entropy, uintptr_t modified_entropy, uintptr_t correct, uintptr_t margin) {
    LogitStatsArgs args{pointer<const void>(logits),
                        dtype,
                        rows,
                        classes,
                        row_stride,
                        class_stride,
                        pointer<const int64_t>(labels),
                        {},
                        pointer<unsigned char>(correct)};
    const uintptr_t values[] = {loss, confidence, phi, entropy, modified_entropy, margin};
    for (int v = 0; v < 6; ++v) args.values[v] = pointer<void>(values[v]);
    unlocked([&] { logit_stats(args); });
  });
}

using LmTileItem = std::tuple<uintptr_t, int64_t, int64_t, int64_t, uintptr_t, double, double>;  // as in LmTile

template <class T>
LmTile<T> lm_tile(const LmTileItem& item) {
  const auto& [logits, rows, columns, stride, bias, scale, softcap] = item;
  return {pointer<T>(logits), rows, columns, stride, pointer<const T>(bias), scale, softcap};
}

template <class T>
void bind_lm_tiles(py::module_& m, const std::string& dtype) {
  m.def(("lm_transform_" + dtype).c_str(), [](const LmTileItem& tile) { lm_transform(lm_tile<T>(tile)); });
  m.def(("lm_stats_tile_" + dtype).c_str(), [](const LmTileItem& tile, int64_t first, uintptr_t targets,
                                               uintptr_t target_logits, uintptr_t peak, uintptr_t tops, uintptr_t rest,
                                               uintptr_t slope, uintptr_t spread, uintptr_t above, uintptr_t top,
                                               uintptr_t values, uintptr_t indices, int64_t topk) {
    const LmParts<T> parts{pointer<double>(peak),     pointer<double>(tops),
                           pointer<double>(rest),     pointer<double>(slope),
                           pointer<double>(spread),   pointer<int64_t>(above),
                           pointer<int64_t>(top),     pointer<T>(values),
                           pointer<int64_t>(indices), topk};
    unlocked([&] {
      lm_stats_tile(lm_tile<T>(tile), first, pointer<const int64_t>(targets), pointer<const T>(target_logits), parts);
    });
  });
  m.def(("lm_kl_tile_" + dtype).c_str(), [](const LmTileItem& model, const LmTileItem& reference, uintptr_t peak,
                                            uintptr_t sum, uintptr_t ref_peak, uintptr_t ref_sum, uintptr_t gap) {
    const LmDivergence sums{pointer<double>(peak), pointer<double>(sum), pointer<double>(ref_peak),
                            pointer<double>(ref_sum), pointer<double>(gap)};
    unlocked([&] { lm_kl_tile(lm_tile<T>(model), lm_tile<T>(reference), sums); });
  });
  m.def(("lm_logprob_grad_tile_" + dtype).c_str(),
        [](const LmTileItem& tile, uintptr_t sums, int64_t first, uintptr_t targets, uintptr_t grad) {
          unlocked([&] {
            lm_logprob_grad_tile(lm_tile<T>(tile), pointer<const T>(sums), first, pointer<const int64_t>(targets),
                                 pointer<const T>(grad));
          });
        });
  m.def(("lm_kl_grad_tile_" + dtype).c_str(),
        [](const LmTileItem& model, uintptr_t sums, const LmTileItem& reference, uintptr_t ref_sums, uintptr_t grad) {
          unlocked([&] {
            lm_kl_grad_tile(lm_tile<T>(model), pointer<const T>(sums), lm_tile<T>(reference),
                            pointer<const T>(ref_sums), pointer<const T>(grad));
          });
        });
}

#ifdef CWFAST_WITH_CUDA
using CudaMatrix = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

void check_cuda(int error, const char* what) {
  if (error)
    throw std::runtime_error(std::string(what) + " failed: CUDA error " + std::to_string(error) + ", " +
                             cwfast_cuda_error(error));
}

std::string cuda_unavailable() {
  int count = 0;
  if (const int error = cwfast_cuda_device_count(&count))
    return "no usable CUDA device: error " + std::to_string(error) + ", " + cwfast_cuda_error(error);
  return count ? "" : "no CUDA device";
}

void cuda_saliency(uintptr_t out, uintptr_t inputs, int64_t input_stride, uintptr_t grad_outputs, int64_t grad_stride,
                   uintptr_t row_offsets, int64_t samples, int64_t rows, int64_t out_features, int64_t in_features,
                   int dtype, int power, float scale, uintptr_t factor, int factor_dtype, uintptr_t grad, int device,
                   uintptr_t stream) {
  const int error = cwfast_cuda_saliency(
      pointer<float>(out), pointer<const void>(inputs), input_stride, pointer<const void>(grad_outputs), grad_stride,
      pointer<const int64_t>(row_offsets), samples, rows, out_features, in_features, dtype, power, scale,
      pointer<const void>(factor), factor_dtype, pointer<float>(grad), device, pointer<void>(stream));
  check_cuda(error, "accumulate_saliency_");
}

void cuda_select_topk(uintptr_t chunks, int64_t chunk_count, int dtype, int abs, uintptr_t state, uintptr_t histogram,
                      uintptr_t ties, uintptr_t tallies, int device, uintptr_t stream) {
  const int error = cwfast_cuda_select_topk(
      pointer<const CwfastChunk>(chunks), chunk_count, dtype, abs, pointer<int64_t>(state),
      pointer<uint64_t>(histogram), pointer<int64_t>(ties), pointer<int64_t>(tallies), device, pointer<void>(stream));
  check_cuda(error, "select_topk");
}

void cuda_rewind_survey(uintptr_t tensors, int64_t tensor_count, int64_t blocks, uintptr_t counts, uintptr_t wrong,
                        int device, uintptr_t stream) {
  const int error =
      cwfast_cuda_rewind_survey(pointer<const CwfastSelected>(tensors), tensor_count, blocks, pointer<int64_t>(counts),
                                pointer<int>(wrong), device, pointer<void>(stream));
  check_cuda(error, "the check of bits");
}

void cuda_rewind_move(uintptr_t tensors, int64_t tensor_count, int64_t blocks, uintptr_t layouts, int item_size,
                      int device, uintptr_t stream) {
  const int error = cwfast_cuda_rewind_move(pointer<const CwfastSelected>(tensors), tensor_count, blocks,
                                            pointer<const int64_t>(layouts), item_size, device, pointer<void>(stream));
  check_cuda(error, "rewind_, gather or scatter_");
}

// Matrices: data, CwfastDtype, strides in entries.
void cuda_embedding_saliency(const CudaMatrix& out, const CudaMatrix& grad, const CudaMatrix& grad_outputs,
                             const CudaMatrix& factor, const CudaMatrix& partial, uintptr_t order, uintptr_t samples,
                             uintptr_t tokens, uintptr_t firsts, uintptr_t first_pieces, uintptr_t piece_tokens,
                             uintptr_t cut, uintptr_t slots, int64_t pieces, int64_t cut_count, int64_t piece_rows,
                             int64_t columns, int64_t power, double scale, int device, uintptr_t stream) {
  const auto matrix = [](const CudaMatrix& x) {
    const auto& [data, dtype, row_stride, column_stride] = x;
    return CwfastMatrix{pointer<void>(data), dtype, row_stride, column_stride};
  };
  const auto list = pointer<const int64_t>;
  const CwfastEmbedding embedding{matrix(out),
                                  matrix(grad),
                                  matrix(grad_outputs),
                                  matrix(factor),
                                  matrix(partial),
                                  list(order),
                                  list(samples),
                                  list(tokens),
                                  list(firsts),
                                  list(first_pieces),
                                  list(piece_tokens),
                                  list(cut),
                                  list(slots),
                                  pieces,
                                  cut_count,
                                  piece_rows,
                                  columns,
                                  power,
                                  scale};
  const int error = cwfast_cuda_embedding_saliency(&embedding, device, pointer<void>(stream));
  check_cuda(error, "accumulate_embedding_saliency_");
}

using CudaHead = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;  // as of CwfastLmHead

void cuda_lm_tokens(int what, const CudaHead& model, const CudaHead& reference, int64_t tokens, int64_t words,
                    int64_t dtype, double scale, double softcap, uintptr_t targets, uintptr_t logit, int64_t chunks,
                    int64_t chunk, uintptr_t partial, uintptr_t counts, uintptr_t out, uintptr_t grad,
                    uintptr_t logsumexp, uintptr_t ref_logsumexp, int device, uintptr_t stream) {
  const auto head = [](const CudaHead& x) {
    const auto& [hidden, weight, bias, hidden_stride, weight_stride, width] = x;
    return CwfastLmHead{pointer<const void>(hidden),
                        pointer<const void>(weight),
                        pointer<const float>(bias),
                        hidden_stride,
                        weight_stride,
                        width};
  };
  const CwfastLmTokens all{head(model),
                           head(reference),
                           tokens,
                           words,
                           dtype,
                           scale,
                           softcap,
                           pointer<const int64_t>(targets),
                           pointer<float>(logit),
                           chunks,
                           chunk,
                           pointer<float>(partial),
                           pointer<int>(counts),
                           pointer<void>(out),
                           pointer<const float>(grad),
                           pointer<const float>(logsumexp),
                           pointer<const float>(ref_logsumexp)};
  check_cuda(cwfast_cuda_lm_tokens(what, &all, device, pointer<void>(stream)), "lm_token_stats or lm_token_kl");
}

void bind_cuda(py::module_& m) {
  m.def("cuda_unavailable", cuda_unavailable, "Why no CUDA device can be used; empty where one can.");
  m.def("cuda_saliency", cuda_saliency);
  m.def("cuda_select_topk", cuda_select_topk);
  m.def("cuda_rewind_survey", cuda_rewind_survey);
  m.def("cuda_rewind_move", cuda_rewind_move);
  m.def("cuda_embedding_saliency", cuda_embedding_saliency);
  m.def("cuda_lm_tokens", cuda_lm_tokens);
}
#endif

}  // namespace
}  // namespace cwfast

PYBIND11_MODULE(_C, m) {
  m.doc() = "cwfast's kernels: raw pointers in, checked by cwfast.ops.";
  cwfast::bind_runtime(m);
  cwfast::bind_saliency(m);
  cwfast::bind_select(m);
  cwfast::bind_rewind(m);
  cwfast::bind_adamw(m);
  cwfast::bind_embedding_saliency(m);
  cwfast::bind_logit_stats(m);
  cwfast::bind_lm_tiles<float>(m, "float32");
  cwfast::bind_lm_tiles<double>(m, "float64");
#ifdef CWFAST_WITH_CUDA
  cwfast::bind_cuda(m);
#endif
}
