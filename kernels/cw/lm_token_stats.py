"""Of a chunk of the vocabulary: sums of p = softmax(z), z = softcap(scale * (hidden weight^T + bias)); KL(q || p); dz.

Reference: ``cwfast.reference.lm_token_stats``. Called by ``cwfast.ops._lm_token_stats_device`` (backend "triton").
Moves weight from memory once per GROUP blocks of tokens and hidden once; [tokens, vocabulary] never exists. A program
goes through a chunk of words in tiles of a matrix product, each of which is folded into a few numbers per token while
it lies in registers. No atomics: the same bits on every run. Not yet run on a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from cwfast.kernels._tl import quarters
from torch import Tensor

GROUP = tl.constexpr(16)  # blocks of tokens that share a tile of words in the cache; 16 MB of hidden at width 4096


@triton.jit
def _tanh(x):
    """A series where 1 - 2 / (e^2x + 1) loses digits."""
    size = tl.minimum(tl.abs(x), 20.0)
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    y = x * x
    near = x * (1 - y * (0.33333333 - y * (0.13333333 - y * (0.053968254 - y * 0.021869488))))
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0, -far, far)) + 0 * x  # NaN stays


@triton.jit
def _product(
    hidden,  # [tokens, width], entries of a row are adjacent
    weight,  # [words, width], likewise
    n,
    v,
    width,
    hidden_row,  # strides, in entries
    weight_row,
    EVEN: tl.constexpr,  # width is a multiple of BK
    BN: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
):
    """hidden weight^T of the tokens n and the words v, all of which must exist."""
    k = tl.arange(0, BK)
    h = hidden + n[:, None] * hidden_row + k[None, :]
    w = weight + v[None, :] * weight_row + k[:, None]  # its transpose: a transposed load would go through registers
    acc = tl.zeros((BN, BV), tl.float32)
    for begin in range(0, width, BK):
        if EVEN:
            acc = tl.dot(tl.load(h), tl.load(w), acc, input_precision="ieee")
        else:
            inside = k < width - begin
            left, right = tl.load(h, inside[None, :], other=0.0), tl.load(w, inside[:, None], other=0.0)
            acc = tl.dot(left, right, acc, input_precision="ieee")
        h += BK
        w += BK
    return acc


@triton.jit
def _logits(z, bias, v, scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """z of a strip of the product and its words v, which must exist; bias [words], adjacent."""
    if HAS_BIAS:
        z += tl.load(bias + v).to(tl.float32)[None, :]
    z *= scale
    if HAS_CAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def _place(tokens, parts, BN: tl.constexpr):
    """The block of tokens and the part of the words of this program: GROUP blocks go through the parts together."""
    program = tl.program_id(0)
    first = program // (GROUP * parts) * GROUP
    height = tl.minimum(tl.cdiv(tokens, BN) - first, GROUP)
    inside = program % (GROUP * parts)
    return (first + inside % height).to(tl.int64), (inside // height).to(tl.int64)


@triton.jit
def _target_kernel(
    logit,  # [tokens] float32, written where a target is one of the words
    hidden,
    weight,
    bias,
    targets,  # [tokens] int64, relative to the first word
    tokens,
    words,
    width,
    hidden_row,
    weight_row,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
):
    """A tile of words of which the diagonal is wanted: the sums of the tiles, so that equal logits compare equal."""
    i = tl.arange(0, BN)
    n = tl.program_id(0).to(tl.int64) * BN + i
    y = tl.load(targets + tl.minimum(n, tokens - 1))
    inside = (n < tokens) & (y >= 0) & (y < words)
    j = tl.arange(0, BV)
    v = tl.load(targets + tl.minimum(tl.program_id(0).to(tl.int64) * BN + j, tokens - 1))
    v = tl.minimum(tl.maximum(v, 0), words - 1)
    h = tl.minimum(n, tokens - 1)
    product = _product(hidden, weight, h, v, width, hidden_row, weight_row, EVEN, BN, BV, BK)
    z = tl.sum(tl.where(i[:, None] == j[None, :], product, 0.0), 1)
    if HAS_BIAS:
        z += tl.load(bias + tl.minimum(tl.maximum(y, 0), words - 1)).to(tl.float32)
    z *= scale
    if HAS_CAP:
        z = softcap * _tanh(z / softcap)
    tl.store(logit + n, z, inside)


@triton.jit
def _stats_kernel(
    partial,  # [5, chunks, tokens] float32, written: peak, tops, rest, mean (slope / sum), spread: see Parts
    counts,  # [2, chunks, tokens] int32, written: logits above the target's; the lowest index of the largest logit
    hidden,
    weight,
    bias,
    targets,
    logit,  # [tokens] float32: of the targets, which stand for those of the tiles
    tokens,
    words,
    chunks,
    chunk,  # words of a chunk
    width,
    hidden_row,
    weight_row,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
):
    block, part = _place(tokens, chunks, BN)
    n = block * BN + tl.arange(0, BN)
    inside = n < tokens
    n = tl.minimum(n, tokens - 1)
    own = tl.load(logit + n)
    top = tl.full((BN,), float("-inf"), tl.float32)
    tops = tl.zeros((BN,), tl.float32)
    rest = tl.zeros((BN,), tl.float32)
    mean = tl.zeros((BN,), tl.float32)
    spread = tl.zeros((BN,), tl.float32)
    above = tl.zeros((BN,), tl.int32)
    where = tl.zeros((BN,), tl.int32)
    begin = part * chunk
    y = tl.load(targets + n) - begin
    y = tl.where((y >= 0) & (y < chunk), y, -1).to(tl.int32)
    count = tl.minimum(chunk, words - begin).to(tl.int32)
    for first in range(0, count, BV):
        v = tl.minimum(begin + first + tl.arange(0, BV), words - 1)
        strips = quarters(_product(hidden, weight, n, v, width, hidden_row, weight_row, EVEN, BN, BV, BK), BN, BV)
        # By strips, with barriers: or the registers of all steps of all of the tile are wanted at once.
        for strip in tl.static_range(4):
            c = first + strip * (BV // 4) + tl.arange(0, BV // 4)
            v = tl.minimum(begin + c, words - 1)
            z = _logits(strips[strip], bias, v, scale, softcap, HAS_BIAS, HAS_CAP)
            z = tl.where(c[None, :] == y[:, None], own[:, None], z)
            z = tl.where((c < count)[None, :], z, float("-inf"))
            above += tl.sum((z > own[:, None]).to(tl.int32), 1)
            peak = tl.max(z, 1)
            new = peak > top
            lowest = tl.min(tl.where(z == peak[:, None], c[None, :], 2147483647), 1)
            where = tl.where(new, lowest, where)

            # Sums so far, relative to the new peak; (top - peak) is at most 0 and may be -inf.
            peak = tl.where(new, peak, top)
            step = tl.where(new, top - peak, 0.0)
            factor = tl.exp(step)
            sum = (tops + rest) * factor
            rest = tl.where(new, sum, rest)
            tops = tl.where(new, 0.0, tops)
            mean += tl.where(sum > 0, step, 0.0)
            top = peak
            # Moments about a place near the strip's mean, or digits cancel: the largest logit where it is new, for it
            # may have most of the probability; else the mean so far: how far it is off is part of the variance.
            about = tl.where(new, 0.0, mean)
            u = z - tl.where(top > float("-inf"), top, 0.0)[:, None]
            w = tl.exp(u)
            e = tl.maximum(u - about[:, None], -1e10)  # -inf times 0 is not 0
            more_tops = tl.sum(tl.where(u == 0, 1.0, 0.0), 1)
            more_rest = tl.sum(tl.where(u == 0, 0.0, w), 1)
            moment = tl.sum(w * e, 1)
            more = more_tops + more_rest
            off = moment / tl.where(more > 0, more, 1.0)
            d = tl.where(sum > 0, about + off - mean, 0.0)
            both = tl.where(sum + more > 0, sum + more, 1.0)
            mean = tl.where(sum > 0, (sum * mean + more * (about + off)) / both, about + off)
            spread = (
                spread * factor + tl.maximum(tl.sum(w * e * e, 1) - moment * off, 0.0) + d * d * sum * (more / both)
            )
            tops += more_tops
            rest += more_rest
            tl.debug_barrier()
    at = part * tokens + n
    field = tl.full((), chunks, tl.int64) * tokens  # an argument that is 1 is a constant, which has no .to
    tl.store(partial + at, top, inside)
    tl.store(partial + field + at, tops, inside)
    tl.store(partial + 2 * field + at, rest, inside)
    tl.store(partial + 3 * field + at, mean, inside)
    tl.store(partial + 4 * field + at, spread, inside)
    tl.store(counts + at, above, inside)
    tl.store(counts + field + at, where + begin.to(tl.int32), inside)


@triton.jit
def _kl_kernel(
    partial,  # [5, chunks, tokens] float32, written: peak and sum of both; q's mean of their difference
    hidden,
    weight,
    bias,
    ref_hidden,
    ref_weight,
    ref_bias,
    tokens,
    words,
    chunks,
    chunk,
    width,
    ref_width,
    hidden_row,
    weight_row,
    ref_hidden_row,
    ref_weight_row,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
):
    block, part = _place(tokens, chunks, BN)
    n = block * BN + tl.arange(0, BN)
    inside = n < tokens
    n = tl.minimum(n, tokens - 1)
    top = tl.full((BN,), float("-inf"), tl.float32)
    ref_top = tl.full((BN,), float("-inf"), tl.float32)
    sum = tl.zeros((BN,), tl.float32)
    ref_sum = tl.zeros((BN,), tl.float32)
    gap = tl.zeros((BN,), tl.float32)
    begin = part * chunk
    count = tl.minimum(chunk, words - begin).to(tl.int32)
    for first in range(0, count, BV):
        v = tl.minimum(begin + first + tl.arange(0, BV), words - 1)
        theirs = quarters(
            _product(ref_hidden, ref_weight, n, v, ref_width, ref_hidden_row, ref_weight_row, EVEN, BN, BV, BK), BN, BV
        )
        ours = quarters(_product(hidden, weight, n, v, width, hidden_row, weight_row, EVEN, BN, BV, BK), BN, BV)
        for strip in tl.static_range(4):
            c = first + strip * (BV // 4) + tl.arange(0, BV // 4)
            v = tl.minimum(begin + c, words - 1)
            z = _logits(ours[strip], bias, v, scale, softcap, HAS_BIAS, HAS_CAP)
            r = _logits(theirs[strip], ref_bias, v, scale, softcap, HAS_REF_BIAS, HAS_CAP)
            z = tl.where((c < count)[None, :], z, float("-inf"))
            r = tl.where((c < count)[None, :], r, float("-inf"))
            peak = tl.maximum(top, tl.max(z, 1))
            safe = tl.where(peak > float("-inf"), peak, 0.0)
            step = tl.where(top > float("-inf"), top - safe, 0.0)
            sum = sum * tl.exp(step) + tl.sum(tl.exp(z - safe[:, None]), 1)
            top = peak
            peak = tl.maximum(ref_top, tl.max(r, 1))
            ref_safe = tl.where(peak > float("-inf"), peak, 0.0)
            ref_step = tl.where(ref_top > float("-inf"), ref_top - ref_safe, 0.0)
            ref_sum *= tl.exp(ref_step)
            ref_top = peak
            u = r - ref_safe[:, None]
            q = tl.exp(u)
            more = tl.sum(q, 1)
            theirs_mean = tl.sum(tl.where(q > 0, q * (u - (z - safe[:, None])), 0.0), 1) / tl.where(more > 0, more, 1.0)
            share = more / tl.where(ref_sum + more > 0, ref_sum + more, 1.0)
            old = tl.where(share < 1, (gap + (ref_step - step)) * (1 - share), 0.0)
            gap = tl.where(ref_sum > 0, old + tl.where(more > 0, share * theirs_mean, 0.0), theirs_mean)
            ref_sum += more
            tl.debug_barrier()
    at = part * tokens + n
    field = tl.full((), chunks, tl.int64) * tokens  # an argument that is 1 is a constant, which has no .to
    tl.store(partial + at, top, inside)
    tl.store(partial + field + at, sum, inside)
    tl.store(partial + 2 * field + at, ref_top, inside)
    tl.store(partial + 3 * field + at, ref_sum, inside)
    tl.store(partial + 4 * field + at, gap, inside)


LOGITS, LOGPROB, KL = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)  # CwfastLmTask


@triton.jit
def _tile_kernel(
    out,  # [tokens, words of the tile], any float, written: z; or the gradient of the loss at hidden weight^T + bias
    hidden,
    weight,
    bias,
    ref_hidden,  # of KL alone, and so the others of the reference
    ref_weight,
    ref_bias,
    targets,  # [tokens] int64, relative to the first word; not of KL
    logit,  # [tokens] float32, of LOGITS: those of the targets
    grad,  # [tokens] float32, of the loss at logprob or KL
    logsumexp,  # [tokens, 2] float32: rounded, and what rounding lost
    ref_logsumexp,
    tokens,
    words,
    width,
    ref_width,
    hidden_row,
    weight_row,
    ref_hidden_row,
    ref_weight_row,
    scale,
    softcap,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
):
    block, part = _place(tokens, tl.cdiv(words, BV), BN)
    n = block * BN + tl.arange(0, BN)
    inside = n < tokens
    n = tl.minimum(n, tokens - 1)
    v = tl.minimum(part * BV + tl.arange(0, BV), words - 1)
    if KIND == KL:
        theirs = quarters(
            _product(ref_hidden, ref_weight, n, v, ref_width, ref_hidden_row, ref_weight_row, EVEN, BN, BV, BK), BN, BV
        )
    ours = quarters(_product(hidden, weight, n, v, width, hidden_row, weight_row, EVEN, BN, BV, BK), BN, BV)
    for strip in tl.static_range(4):
        c = part * BV + strip * (BV // 4) + tl.arange(0, BV // 4)
        v = tl.minimum(c, words - 1)
        z = _logits(ours[strip], bias, v, scale, softcap, HAS_BIAS, HAS_CAP)
        if KIND == LOGITS:
            z = tl.where(c[None, :] == tl.load(targets + n)[:, None], tl.load(logit + n)[:, None], z)
        else:
            d = tl.exp((z - tl.load(logsumexp + 2 * n)[:, None]) - tl.load(logsumexp + 2 * n + 1)[:, None])
            if KIND == LOGPROB:
                d = tl.where(c[None, :] == tl.load(targets + n)[:, None], 1.0, 0.0) - d
            if KIND == KL:
                r = _logits(theirs[strip], ref_bias, v, scale, softcap, HAS_REF_BIAS, HAS_CAP)
                r = (r - tl.load(ref_logsumexp + 2 * n)[:, None]) - tl.load(ref_logsumexp + 2 * n + 1)[:, None]
                d -= tl.exp(r)
            d *= (tl.load(grad + n) * scale)[:, None]
            if HAS_CAP:
                z /= softcap
                d *= 1 - z * z
            z = d
        at = n[:, None] * words + c[None, :]
        tl.store(out + at, z.to(out.dtype.element_ty), inside[:, None] & (c < words)[None, :])
        tl.debug_barrier()


TASKS = (_target_kernel, _stats_kernel, _kl_kernel, _tile_kernel, _tile_kernel, _tile_kernel)  # by CwfastLmTask


def tiles(dtype: torch.dtype, narrow: bool, hip: bool) -> dict[str, int]:
    """BN, BV, BK, num_warps and num_stages.

    16-bit inputs: 128 x 128 in the registers of 8 warps, on tensor cores; with 128 x 256 the sums spill. float32
    products without loss of bits run on the ordinary cores, whose operands stay in registers: smaller tiles.

    Args:
        dtype: of hidden and weight.
        narrow: half as many words, where registers are short; Hopper's tensor cores read shared memory.
        hip: AMD's compiler keeps stages in registers, where there is room for 2.
    """
    if dtype == torch.float32:
        return {"BN": 64, "BV": 64, "BK": 16, "num_warps": 4, "num_stages": 3}
    return {"BN": 128, "BV": 64 if narrow else 128, "BK": 64, "num_warps": 8, "num_stages": 2 if hip else 4}


def narrow(task: int, plain: bool, capability: int) -> bool:
    """Whether ``tiles`` shall be narrow; ``capability``: of the device, 80 for sm_80, 0 for AMD's.

    ``plain``: without soft-cap, and the width is a multiple of a step's.
    """
    if capability == 0:
        return task == 1
    return capability < 90 and (task == 2 or (task == 1 and not plain))


def launch(
    task: int,
    model: tuple[Tensor, Any],
    reference: tuple[Tensor, Any] | None,
    scale: float,
    softcap: float | None,
    chunks: int,
    chunk: int,
    **tensors: Tensor | None,
) -> None:
    """One task of ``CwfastLmTask`` in csrc/cuda/launchers.h, and its arguments.

    ``partial`` and ``counts`` have one entry per chunk here. ``model`` and ``reference``: hidden states, and weight
    and bias (float32) of the head; entries of a row are adjacent.
    """
    hidden, (weight, bias, *_) = model
    hip, capability = torch.version.hip is not None, 0
    if not hip and hidden.is_cuda:
        major, minor = torch.cuda.get_device_capability(hidden.device)
        capability = 10 * major + minor
    config = tiles(hidden.dtype, narrow(task, softcap is None and hidden.shape[1] % 64 == 0, capability), hip)
    tokens, words = len(hidden), len(weight)
    blocks = triton.cdiv(tokens, config["BN"])
    parts = [1, chunks, chunks, *[triton.cdiv(words, config["BV"])] * 3][task]
    widths = [hidden.shape[1]]
    arguments = {
        "hidden": hidden,
        "weight": weight,
        "bias": weight if bias is None else bias,
        "tokens": tokens,
        "words": words,
        "chunks": chunks,
        "chunk": chunk,
        "width": hidden.shape[1],
        "hidden_row": hidden.stride(0),
        "weight_row": weight.stride(0),
        "scale": scale,
        "softcap": softcap or 1.0,
        "KIND": task,
        "HAS_BIAS": bias is not None,
        "HAS_REF_BIAS": False,
        "HAS_CAP": softcap is not None,
    }
    their_hidden, (their_weight, their_bias, *_) = reference or (hidden, (weight, None))
    if reference is not None:
        widths.append(their_hidden.shape[1])
    arguments |= {
        "ref_hidden": their_hidden,
        "ref_weight": their_weight,
        "ref_bias": their_weight if their_bias is None else their_bias,
        "ref_width": their_hidden.shape[1],
        "ref_hidden_row": their_hidden.stride(0),
        "ref_weight_row": their_weight.stride(0),
        "HAS_REF_BIAS": their_bias is not None,
        "EVEN": all(width % config["BK"] == 0 for width in widths),
    }
    arguments |= {name: hidden if tensor is None else tensor for name, tensor in tensors.items()}
    kernel = TASKS[task]
    wanted = {name: arguments[name] for name in kernel.arg_names if name not in config}
    kernel[(blocks * parts,)](**wanted, **config)
