"""Statistics of p = softmax(z), z = softcap(scale * (hidden weight^T + bias)), per token; KL(p_ref || p); their dz.

Reference: ``cwfast.reference.lm_token_stats``. Called by ``cwfast.ops._lm_token_stats_device`` (backend "triton").
Moves hidden and weight from memory once per group of GROUP blocks of tokens; [tokens, vocabulary] never exists. A
program goes through a chunk of the vocabulary in tiles of a matrix product; each tile is folded into a handful of
numbers per token while it lies in registers. Chunks go to a small workspace and are merged in order: no atomics, the
same bits on every run. Not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = tl.constexpr(16)  # blocks of tokens that share a chunk's words in the cache; 16 MB of hidden at width 4096
SAVED = 7  # numbers per token and chunk: top, sum, mean, moment; above, ties, logit of the target
SAVED_KL = 5  # top and sum of either model, mean of their difference


@triton.jit
def _tanh(x):
    """A series where 1 - 2 / (e^2x + 1) loses digits."""
    size = tl.minimum(tl.abs(x), 20.0)
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    y = x * x
    near = x * (1 - y * (0.33333333 - y * (0.13333333 - y * (0.053968254 - y * 0.021869488))))
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0, -far, far)) + 0 * x  # NaN stays


@triton.jit
def _logits(
    hidden,
    weight,
    bias,
    n,
    v,
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
    """z of the tokens n and the words v, which must exist."""
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
    if HAS_BIAS:
        acc += tl.load(bias + v).to(tl.float32)[None, :]
    z = acc * scale
    if HAS_CAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def _place(tokens, chunks, BN: tl.constexpr):
    """The block of tokens and the chunk of this program: groups of GROUP blocks go through the chunks together."""
    blocks = tl.cdiv(tokens, BN)
    program = tl.program_id(0)
    first = program // (GROUP * chunks) * GROUP
    height = tl.minimum(blocks - first, GROUP)
    inside = program % (GROUP * chunks)
    return first + inside % height, inside // height


@triton.jit
def _shifted(top, peak):
    """What becomes of sums and means relative to ``top`` when they shall be relative to ``peak``: factor, addend."""
    step = tl.where(peak > float("-inf"), top - peak, 0.0)
    return tl.exp(step), tl.where(step > float("-inf"), step, 0.0)


@triton.jit
def _joined(total, mean, moment, total_2, mean_2, moment_2):
    """Two sets of words with the same top. A total that is NaN stays NaN; the rest is void then."""
    total_1 = total
    total += total_2
    share = tl.where(total > 0, total_2 / tl.where(total > 0, total, 1.0), 0.0)
    d = tl.where((total_1 > 0) & (total_2 > 0), mean_2 - mean, 0.0)  # else one of them may be infinite
    mean = tl.where(total_1 > 0, mean, mean_2) + share * d
    return total, mean, moment + moment_2 + d * d * total_1 * share


@triton.jit
def _target_kernel(
    logit,  # [tokens] float32, written: z of the target, with the bits that its tile has
    hidden,
    weight,
    bias,
    targets,  # [tokens] int64
    tokens,
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
    """A tile of which the diagonal is wanted, BN / vocabulary of the work: so that equal logits compare equal."""
    i = tl.arange(0, BN)
    n = tl.program_id(0).to(tl.int64) * BN + i
    inside = n < tokens
    n = tl.minimum(n, tokens - 1)
    j = tl.arange(0, BV)
    v = tl.load(targets + tl.minimum(tl.program_id(0).to(tl.int64) * BN + j, tokens - 1))
    z = _logits(
        hidden, weight, bias, n, v, width, hidden_row, weight_row, scale, softcap, HAS_BIAS, HAS_CAP, EVEN, BN, BV, BK
    )
    tl.store(logit + n, tl.sum(tl.where(i[:, None] == j[None, :], z, 0.0), 1), inside)


@triton.jit
def _stats_kernel(
    partial,  # [4, chunks, tokens] float32, written: top, sum, mean, moment
    counts,  # [2, chunks, tokens] int32, written: logits above the target's; equal ones before it
    hidden,  # [tokens, width], entries of a row are adjacent
    weight,  # [vocabulary, width], likewise
    bias,  # [vocabulary], adjacent; not read without HAS_BIAS
    targets,  # [tokens] int64
    logit,  # [tokens] float32: of the targets
    tokens,
    vocabulary,
    chunks,
    chunk,  # words of a chunk, a multiple of BV
    width,
    hidden_row,  # strides, in entries
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
    """Of each token and chunk: top = max z, sum = sum e^u with u = z - top, mean of u under e^u, moment = sum e^u (u - mean)^2."""
    block, part = _place(tokens, chunks, BN)
    n = block.to(tl.int64) * BN + tl.arange(0, BN)
    inside = n < tokens
    n = tl.minimum(n, tokens - 1)
    y = tl.load(targets + n)
    own = tl.load(logit + n)
    top = tl.full((BN,), float("-inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    mean = tl.zeros((BN,), tl.float32)
    moment = tl.zeros((BN,), tl.float32)
    above = tl.zeros((BN,), tl.int32)
    ties = tl.zeros((BN,), tl.int32)
    begin = part.to(tl.int64) * chunk
    for first in range(begin, tl.minimum(begin + chunk, vocabulary), BV):
        v = first + tl.arange(0, BV)
        z = _logits(
            hidden,
            weight,
            bias,
            n,
            tl.minimum(v, vocabulary - 1),
            width,
            hidden_row,
            weight_row,
            scale,
            softcap,
            HAS_BIAS,
            HAS_CAP,
            EVEN,
            BN,
            BV,
            BK,
        )
        z = tl.where((v < vocabulary)[None, :], z, float("-inf"))
        above += tl.sum((z > own[:, None]).to(tl.int32), 1)
        ties += tl.sum(((z == own[:, None]) & (v[None, :] < y[:, None])).to(tl.int32), 1)

        peak = tl.max(z, 1)
        new = peak > top
        peak = tl.where(new, peak, top)
        factor, step = _shifted(top, peak)
        top, total, mean, moment = peak, total * factor, mean + step, moment * factor
        # Moments about a place near the tile's mean, or digits cancel: the largest logit where it is new, for it may
        # have most of the probability; else the mean so far, whose distance to the tile's is part of the variance.
        about = tl.where(new, 0.0, mean)
        u = z - tl.where(top > float("-inf"), top, 0.0)[:, None]
        w = tl.exp(u)
        e = tl.maximum(u - about[:, None], -1e10)  # -inf times 0 is not 0
        sum = tl.sum(w, 1)
        first_moment = tl.sum(w * e, 1)
        off = first_moment / tl.where(sum > 0, sum, 1.0)
        spread = tl.maximum(tl.sum(w * e * e, 1) - first_moment * off, 0.0)
        total, mean, moment = _joined(total, mean, moment, sum, about + off, spread)
    at = part.to(tl.int64) * tokens + n
    field = chunks.to(tl.int64) * tokens
    tl.store(partial + at, top, inside)
    tl.store(partial + field + at, total, inside)
    tl.store(partial + 2 * field + at, mean, inside)
    tl.store(partial + 3 * field + at, moment, inside)
    tl.store(counts + at, above, inside)
    tl.store(counts + field + at, ties, inside)


@triton.jit
def _merge_kernel(
    logprob,  # [tokens] float32, written, and so the others
    logsumexp,
    mean,
    variance,
    entropy,
    correct,  # [tokens] bool
    rank,  # [tokens] int64
    partial,  # as of _stats_kernel
    counts,
    logit,
    tokens,
    chunks,
    BN: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = n < tokens
    n = tl.minimum(n, tokens - 1)
    field = chunks.to(tl.int64) * tokens
    top = tl.load(partial + n)
    total = tl.load(partial + field + n)
    center = tl.load(partial + 2 * field + n)
    moment = tl.load(partial + 3 * field + n)
    above = tl.load(counts + n).to(tl.int64)
    ties = tl.load(counts + field + n)
    for part in range(1, chunks):
        at = part.to(tl.int64) * tokens + n
        top_2 = tl.load(partial + at)
        peak = tl.where(top_2 > top, top_2, top)
        factor, step = _shifted(top, peak)
        factor_2, step_2 = _shifted(top_2, peak)
        total, center, moment = _joined(
            total * factor,
            center + step,
            moment * factor,
            tl.load(partial + field + at) * factor_2,
            tl.load(partial + 2 * field + at) + step_2,
            tl.load(partial + 3 * field + at) * factor_2,
        )
        top = peak
        above += tl.load(counts + at)
        ties += tl.load(counts + field + at)
    log_total = tl.log(total)
    spread = log_total - center
    tl.store(logprob + n, (tl.load(logit + n) - top) - log_total, inside)
    tl.store(logsumexp + n, top + log_total, inside)
    tl.store(mean + n, -spread, inside)
    tl.store(variance + n, moment / total, inside)
    tl.store(entropy + n, spread, inside)
    tl.store(correct + n, (above == 0) & (ties == 0) & (total == total), inside)
    tl.store(rank + n, above, inside)
