"""Per row z [C] with label y: loss, confidence, phi, entropy, modified entropy, correct, margin of softmax(z).

Reference: ``cwfast.reference.logit_stats``. Called by ``cwfast.ops.logit_stats`` (backend "triton").
Moves each logit from memory once; the second and third look at a row find it in the cache. A program owns BN rows and
goes through their classes in tiles of BC: largest logit, sums of e^u, sum of -q ln(1 - q). The steps and the reasons
for them are those of csrc/cpu/logit_stats_lanes.h. Not yet run on a GPU.
"""

import triton
import triton.language as tl
from torch import Tensor

CLIP = tl.constexpr(69.07755278982137)  # -log(1e-30): where Song & Mittal's code clips its logarithms


@triton.jit
def _log1p(x):
    """ln(1 + x) for x > -1, with the digits that 1 + x loses."""
    sum = 1 + x
    return tl.where(sum == 1, x, tl.log(sum) * (x / tl.where(sum == 1, 1, sum - 1)))


@triton.jit
def _nan_max(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def _logit_stats_kernel(
    logits,  # [rows, classes], any float, any strides
    labels,  # [rows] int64
    loss,  # [rows] float32 or float64, and so the others
    confidence,
    phi,
    entropy,
    modified_entropy,
    correct,  # [rows] bool
    margin,
    rows,
    classes,
    row_stride,
    class_stride,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    dtype: tl.constexpr = loss.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = row < rows
    y = tl.load(labels + row, inside, other=0)
    base = logits + row * row_stride
    label = tl.load(base + y * class_stride, inside, other=0.0).to(dtype)

    other = tl.full((BN,), float("-inf"), dtype)  # the largest logit but the label's; NaN stays
    before = tl.full((BN,), float("-inf"), dtype)  # the same of the classes before the label: they win a tie
    for begin in range(0, classes, BC):
        c = begin + tl.arange(0, BC).to(tl.int64)
        mask = inside[:, None] & (c < classes)[None, :]
        z = tl.load(base[:, None] + c[None, :] * class_stride, mask, other=float("-inf")).to(dtype)
        z = tl.where(c[None, :] == y[:, None], float("-inf"), z)
        other = _nan_max(tl.reduce(z, 1, _nan_max), other)
        before = _nan_max(tl.reduce(tl.where(c[None, :] < y[:, None], z, float("-inf")), 1, _nan_max), before)
    peak = tl.where(label > other, label, other)
    good = (label == label) & (peak > float("-inf")) & (peak < float("inf"))

    top = tl.where(other > float("-inf"), other, 0.0)
    tops = tl.zeros((BN,), dtype)
    rest = tl.zeros((BN,), dtype)
    slope = tl.zeros((BN,), dtype)
    for begin in range(0, classes, BC):
        c = begin + tl.arange(0, BC).to(tl.int64)
        mask = inside[:, None] & (c < classes)[None, :] & (c[None, :] != y[:, None])
        z = tl.load(base[:, None] + c[None, :] * class_stride, mask, other=float("-inf")).to(dtype)
        u = z - top[:, None]
        w = tl.where(u < 0, tl.exp(u), 0.0)
        tops += tl.sum(tl.where(mask & (u == 0), 1.0, 0.0).to(dtype), 1)
        rest += tl.sum(w, 1)
        slope += tl.sum(tl.where(w > 0, w * u, 0.0), 1)
    total = tl.where(tops == 0, 1.0, tops + rest)
    log_total = tl.log(total)
    odds = tl.where(tops == 0, float("inf"), (label - top) - log_total)

    size = tl.abs(odds)
    e = tl.exp(-size)
    log1p_e = _log1p(e)
    large, small = 1 / (1 + e), e / (1 + e)
    p, not_p = tl.where(odds < 0, small, large), tl.where(odds < 0, large, small)
    nats = tl.where(odds < 0, -odds, 0.0) + log1p_e
    spread = large * log1p_e + tl.where(e > 0, small * (size + log1p_e), 0.0) + not_p * (log_total - slope / total)

    unit = not_p / total  # the probability of w = 1
    beside = p + unit * (rest + tl.where(tops > 1, tops - 1, 0.0))
    modified = not_p * tl.where(nats < CLIP, nats, CLIP)
    modified -= tl.where(tops > 0, tops * unit * tl.log(tl.where(beside > 1e-30, beside, 1e-30)), 0.0)
    for begin in range(0, classes, BC):
        c = begin + tl.arange(0, BC).to(tl.int64)
        mask = inside[:, None] & (c < classes)[None, :] & (c[None, :] != y[:, None])
        z = tl.load(base[:, None] + c[None, :] * class_stride, mask, other=float("-inf")).to(dtype)
        u = z - top[:, None]
        q = tl.where(u < 0, tl.exp(u), 0.0) * unit[:, None]
        modified -= tl.sum(q * _log1p(-tl.where(q < 0.5, q, 0.5)), 1)

    nan = float("nan")
    tl.store(loss + row, tl.where(good, nats, nan), inside)
    tl.store(confidence + row, tl.where(good, p, nan), inside)
    tl.store(phi + row, tl.where(good, odds, nan), inside)
    tl.store(entropy + row, tl.where(good, spread, nan), inside)
    tl.store(modified_entropy + row, tl.where(good, modified, nan), inside)
    tl.store(correct + row, good & (label >= other) & (label > before), inside)
    tl.store(margin + row, tl.where(good, label - other, nan), inside)


def tiles(classes: int) -> dict[str, int]:
    """BN, BC and num_warps: 4 logits in each of 128 threads, or one row of 8; with 16, narrow rows spill registers."""
    width = min(triton.next_power_of_2(classes), 1024)
    return {"BN": max(1, 512 // width), "BC": width, "num_warps": 4}


def logit_stats(logits: Tensor, labels: Tensor, stats: tuple[Tensor, ...]) -> None:
    """Launch; ``stats``: the fields of ``cwfast.reference.LogitStats``, each ``[N]``, written; labels contiguous."""
    rows, classes = logits.shape
    if rows == 0:
        return
    config = tiles(classes)
    grid = (triton.cdiv(rows, config["BN"]),)
    _logit_stats_kernel[grid](logits, labels, *stats, rows, classes, *logits.stride(), **config)
