"""Exact global top-k over a list of tensors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cwfast import _backends, _checks, reference
from cwfast.ops._library import register

BACKENDS = ("reference", "cpu", "triton", "cuda")
CUDA_CHUNK = 1 << 16  # entries of a block
NAN_POLICIES = ("raise", "skip")
TRANSFORMS = (None, "abs")


class Selection(NamedTuple):
    """What was selected.

    Attributes:
        bits: one ``uint8`` tensor per score tensor: entry i of a flattened tensor is
            ``(byte[i // 8] >> (i % 8)) & 1``; zero-padded to a multiple of 8 bytes.
        counts: selected entries of each tensor; they sum to ``k``.
        threshold: the smallest selected score; infinity for ``k = 0``.
        k: how many entries were selected.
    """

    bits: list[Tensor]
    counts: list[int]
    threshold: float
    k: int


def select_topk(
    scores: Sequence[Tensor],
    k: int,
    *,
    nan: str = "raise",
    transform: str | None = None,
    backend: str = "auto",
) -> Selection:
    """Select exactly the ``k`` largest of all entries of ``scores``, ties to the lowest (tensor, flat index).

    The same bits on every backend, machine and thread count. Nothing is concatenated or sorted; a score tensor that
    is not contiguous is copied. The flat index is the logical one (row-major), whatever the strides.

    Args:
        scores: tensors of any shapes (also empty), one dtype (float32, bfloat16, float16 or float64), one device;
            every entry at least 0 (``-0.0`` is 0; infinity is the largest score).
        k: how many to select, ``0 <= k <= N``.
        nan: "raise": NaN is an error. "skip": NaN is never selected, and ``k`` counts without it.
        transform: "abs" ranks ``|score|`` (scores may then be negative); None ranks the scores.
        backend: "reference", "cpu", "triton", "cuda" or "auto".

    Raises:
        TypeError: not tensors, or of several dtypes.
        ValueError: NaN or negative scores (the message names the first such tensor and counts them), or k out of range.
        BackendUnavailable: the named backend cannot run here.

    Source:
        Two-sided sampled bracket: Floyd & Rivest, "Expected time bounds for selection", CACM 18(3), 1975; here it is
        verified by counting, with radix histograms where it fails.
    """
    tensors = _checks.tensors("scores", scores)
    for i, score in enumerate(tensors):
        _checks.tensor(f"scores[{i}]", score, dtypes=_checks.FLOATS)
        if score.dtype != tensors[0].dtype:
            raise TypeError(f"scores must have one dtype; got {tensors[0].dtype} and, at {i}, {score.dtype}")
    check_options(k, sum(score.numel() for score in tensors), nan, transform)
    device = tensors[0].device if tensors else torch.device("cpu")
    resolved = _backends.resolve(backend, device, BACKENDS)
    if not tensors:
        return Selection([], [], float("inf"), 0)
    bits, counts, threshold = torch.ops.cwfast.select_topk(
        [score.detach() for score in tensors], k, nan == "skip", transform == "abs", resolved
    )
    return Selection(bits, counts.tolist(), threshold.item(), k)


def check_options(k: object, numel: int | None, nan: object, transform: object = None) -> None:
    """What ``select_topk`` demands of its numbers and names, wherever the scores lie.

    Args:
        k: see there.
        numel: the number of scores; None where it is not known yet.
        nan: see there.
        transform: see there.

    Raises:
        TypeError: k is not an int.
        ValueError: k, nan or transform is out of its range.
    """
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an int; got {k!r}, a {type(k).__name__}")
    if numel is None and k < 0:
        raise ValueError(f"k must be at least 0; got {k}")
    if numel is not None and not 0 <= k <= numel:
        raise ValueError(f"k must lie between 0 and {numel}, the number of scores; got {k}")
    if nan not in NAN_POLICIES:
        raise ValueError(f"nan must be one of {NAN_POLICIES}; got {nan!r}")
    if transform not in TRANSFORMS:
        raise ValueError(f"transform must be one of {TRANSFORMS}; got {transform!r}")


def invalid(nans: int, negatives: int, skip_nan: bool, numel: int, where: str) -> str:
    """Empty where such scores are allowed; else the message."""
    counts = [f"{n} {what}" for n, what in ((0 if skip_nan else nans, "NaN"), (negatives, "negative")) if n]
    if not counts:
        return ""
    return f"scores must not be NaN or negative; got {' and '.join(counts)} of {numel} in {where}"


def _run(scores: list[Tensor], k: int, skip_nan: bool, abs_: bool, backend: str) -> tuple[list[Tensor], Tensor, Tensor]:
    run = {"reference": _reference, "cpu": _cpu, "triton": _triton, "cuda": _cuda}[backend]
    bits, counts, threshold = run(scores, k, skip_nan, abs_)
    return bits, torch.tensor(counts, dtype=torch.int64), torch.tensor(threshold, dtype=torch.float64)


def _reference(scores: list[Tensor], k: int, skip_nan: bool, abs_: bool) -> tuple[list[Tensor], list[int], float]:
    scores = [score.abs() if abs_ else score for score in scores]
    nans = [int(score.isnan().sum()) for score in scores]
    _refuse_invalid(scores, k, skip_nan, nans, [int((score < 0).sum()) for score in scores])
    masks, threshold = reference.select_topk(scores, k)
    return [reference.pack(mask) for mask in masks], [int(mask.sum()) for mask in masks], threshold


def _cpu(scores: list[Tensor], k: int, skip_nan: bool, abs_: bool) -> tuple[list[Tensor], list[int], float]:
    native = _backends.native()
    scores = [score.contiguous() for score in scores]
    bits = [torch.empty(packed_bytes(score.numel()), dtype=torch.uint8) for score in scores]
    items = [(score.data_ptr(), score.numel(), b.data_ptr()) for score, b in zip(scores, bits, strict=True)]
    dtype = getattr(native.Dtype, str(scores[0].dtype).removeprefix("torch."))
    found = native.select_topk(items, dtype, k, abs_, skip_nan)
    if not found.valid:
        _refuse_invalid(scores, k, skip_nan, found.nans, found.negatives)
    return bits, found.counts, found.threshold


def _cuda(scores: list[Tensor], k: int, skip_nan: bool, abs_: bool) -> tuple[list[Tensor], list[int], float]:
    dtype, device = scores[0].dtype, scores[0].device
    code = _backends.cuda_dtype("select_topk", dtype)
    scores = [score.contiguous() for score in scores]
    bits = [torch.empty(packed_bytes(score.numel()), dtype=torch.uint8, device=device) for score in scores]
    chunks = _chunks(scores, bits).to(device)
    state = torch.tensor([k, 0], device=device)
    histogram = torch.zeros(2048, dtype=torch.int64, device=device)
    ties = torch.empty(len(chunks) + 1, dtype=torch.int64, device=device)
    tallies = torch.zeros((len(scores), 3), dtype=torch.int64, device=device)
    pointers = (x.data_ptr() for x in (state, histogram, ties, tallies))
    _backends.native().cuda_select_topk(
        chunks.data_ptr(), len(chunks), code, int(abs_), *pointers, device.index or 0, _backends.cuda_stream(device)
    )
    counts, nans, negatives = tallies.T.tolist()
    if (any(nans) and not skip_nan) or any(negatives) or sum(counts) != k:
        _refuse_invalid(scores, k, skip_nan, nans, negatives)
    if k == 0:
        return bits, counts, float("inf")
    as_int = torch.int32 if dtype.itemsize == 4 else torch.int16
    return bits, counts, state[1:].to(as_int).view(dtype).item()


def _chunks(scores: list[Tensor], bits: list[Tensor]) -> Tensor:
    """``CwfastChunk`` of csrc/cuda/launchers.h: int64 rows of data, bits, start, length, tensor."""
    rows = [torch.empty((0, 5), dtype=torch.int64)]
    for i, (score, words) in enumerate(zip(scores, bits, strict=True)):
        start = torch.arange(0, score.numel(), CUDA_CHUNK)
        row = torch.empty((len(start), 5), dtype=torch.int64)
        row[:, 0], row[:, 1], row[:, 4] = score.data_ptr(), words.data_ptr(), i
        row[:, 2], row[:, 3] = start, (score.numel() - start).clamp_max(CUDA_CHUNK)
        rows.append(row)
    return torch.cat(rows)


def _triton(scores: list[Tensor], k: int, skip_nan: bool, abs_: bool) -> tuple[list[Tensor], list[int], float]:
    scores = [score.contiguous() for score in scores]
    found = _backends.triton_kernels("select").select_topk(scores, k, abs_)
    nans, negatives = found.invalid.T.tolist()
    _refuse_invalid(scores, k, skip_nan, nans, negatives)
    key = found.threshold.view(scores[0].dtype)[:1]  # the low bytes
    return found.bits, found.counts.tolist(), key.item() if k else float("inf")


def packed_bytes(numel: int) -> int:
    """Bytes of a tensor's packed bits: a multiple of 8."""
    return (numel + 63) // 64 * 8


def _refuse_invalid(scores: list[Tensor], k: int, skip_nan: bool, nans: list[int], negatives: list[int]) -> None:
    for i, (score, nan, negative) in enumerate(zip(scores, nans, negatives, strict=True)):
        where = f"scores[{i}], shape {tuple(score.shape)}"
        if message := invalid(nan, negative, skip_nan, score.numel(), where):
            raise ValueError(message)
    selectable = sum(score.numel() for score in scores) - sum(nans)
    if k > selectable:
        raise ValueError(f"k must be at most {selectable}, the number of scores that are not NaN; got {k}")


def _fake(
    scores: list[Tensor], k: int, skip_nan: bool, abs_: bool, backend: str
) -> tuple[list[Tensor], Tensor, Tensor]:
    bits = [score.new_empty(packed_bytes(score.numel()), dtype=torch.uint8) for score in scores]
    counts = torch.empty(len(scores), dtype=torch.int64, device="cpu")
    return bits, counts, torch.empty((), dtype=torch.float64, device="cpu")


register(
    "select_topk(Tensor[] scores, int k, bool skip_nan, bool abs, str backend) -> (Tensor[], Tensor, Tensor)",
    _run,
    _fake,
)
