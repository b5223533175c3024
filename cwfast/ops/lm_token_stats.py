"""Statistics of a language model's token distributions from hidden states and LM head: logits never exist."""

import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cwfast import _backends, _checks, reference
from cwfast.ops import _lm_token_tiles
from cwfast.ops._library import once, register
from cwfast.reference import LMHead, TokenStats, TopK

BACKENDS = ("reference", "cpu", "triton", "cuda")
MOST = 32  # tokens of topk


def lm_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    topk: int = 0,
    backend: str = "auto",
) -> TokenStats:
    """What the attacks need to know of ``p = softmax(z)``, ``z = softcap * tanh(scale * (W h + bias) / softcap)``.

    The soft-cap comes last, as in Gemma. Per token with target y: ``logprob = log p_y``; ``logsumexp`` of z; ``mean``
    and ``variance`` of ``log p_v`` for v drawn from p (Min-K%++ is ``(logprob - mean) / sqrt(variance)``);
    ``entropy = -mean``; ``rank``, how many logits are larger than the target's; ``correct``: the target is the first of
    the largest logits; ``topk``: the most likely tokens, ties by index. In nats.

    Nothing of size ``[N, V]`` exists: the vocabulary is taken in tiles, whose sums in float32 are merged in float64.
    The target's logit is a sum of its own, the same one for all results, so that ``rank == 0`` wherever ``correct``.
    The same bits for the same batch; other batches differ by rounding. A logit of -inf has probability 0. A token whose
    largest logit is not finite has no distribution: NaN, rank -1, not correct, topk's indices -1. N = 0 gives empty
    results.

    ``logprob`` is differentiable in hidden, weight and bias, once: backward computes the tiles again. On a GPU the
    gradient at the logits passes through the dtype of hidden: in float16 what of it is below 6e-8 is lost, as in any
    backward pass in float16, so scale the loss (``torch.amp.GradScaler``).

    Args:
        hidden: ``[N, d]``, the last hidden states; float32, bfloat16, float16 (computed in float32) or float64; any
            strides.
        weight: ``[V, d]``, the LM head, of the dtype of hidden; any strides.
        targets: ``[N]`` int64, the tokens that follow, each in ``0 .. V - 1``.
        bias: ``[V]``, any of these dtypes, or None.
        softcap: a positive number, or None for none.
        scale: multiplies ``W h + bias``.
        topk: how many of the most likely tokens to give, 0 to 32.
        backend: "reference", "cpu", "triton", "cuda" or "auto".

    Returns:
        ``TokenStats`` of tensors ``[N]``: float32 (float64 for float64), ``rank`` int64, ``correct`` bool, and ``topk``
        with ``.logprob`` and ``.indices`` (int64), both ``[N, topk]``.

    Raises:
        TypeError, ValueError: an argument does not hold what is written above.
        BackendUnavailable: the named backend cannot run here.

    Source:
        Min-K%++: Zhang et al., "Min-K%++: Improved Baseline for Detecting Pre-Training Data from Large Language
        Models", ICLR 2025, eq. 3.
    """
    check_tokens(hidden, LMHead(weight, bias, softcap, scale), targets, vocabulary=None, topk=topk)
    cap = None if softcap is None else float(softcap)
    return token_stats(torch.ops.cwfast.lm_token_stats(hidden, weight, targets, bias, cap, float(scale), topk, backend))


def token_stats(found: Sequence[Tensor]) -> TokenStats:
    """The results of the op by name."""
    logprob, logsumexp, mean, variance, entropy, rank, correct, *top, _ = found
    return TokenStats(logprob, logsumexp, mean, variance, entropy, rank, correct, TopK(*top))


def check_tokens(hidden: Tensor, head: LMHead, targets: Tensor, *, vocabulary: int | None, topk: int) -> None:
    """What ``lm_token_stats`` takes; ``vocabulary`` where the head has only a part of it."""
    check_head("", hidden, head.weight, head.bias)
    check_scaling(head.softcap, head.scale)
    _checks.tensor("targets", targets, dtypes=(torch.int64,), ndim=(1,))
    _checks.shape("targets", targets, hidden.shape[:1], "one target per row of hidden")
    _checks.same_device(hidden.device, targets=targets)
    vocabulary = len(head.weight) if vocabulary is None else vocabulary
    if vocabulary < 1:
        raise ValueError(f"weight must have at least 1 row; got shape {tuple(head.weight.shape)}")
    if isinstance(topk, bool) or not isinstance(topk, int):
        raise TypeError(f"topk must be an int; got {type(topk).__name__}")
    if not 0 <= topk <= min(MOST, vocabulary):
        raise ValueError(f"topk must lie in 0 .. {min(MOST, vocabulary)}; got {topk}")


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Tokens of the vocabulary; called inside of the op, so that torch.compile need not look at data."""
    low, high = (int(x) for x in targets.aminmax()) if len(targets) else (0, 0)
    if low < 0 or high >= vocabulary:
        raise ValueError(f"targets must lie in 0 .. {vocabulary - 1}; got {low} to {high}")


def check_head(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """``hidden`` and an LM head that fit each other; ``prefix`` is before their names."""
    _checks.tensor(f"{prefix}hidden", hidden, dtypes=_checks.FLOATS, ndim=(2,))
    _checks.tensor(f"{prefix}weight", weight, dtypes=(hidden.dtype,), ndim=(2,))
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{prefix}weight must have as many columns as {prefix}hidden; "
            f"got shapes {tuple(weight.shape)} and {tuple(hidden.shape)}"
        )
    if bias is not None:
        _checks.tensor(f"{prefix}bias", bias, dtypes=_checks.FLOATS, ndim=(1,))
        _checks.shape(f"{prefix}bias", bias, weight.shape[:1], f"one entry per row of {prefix}weight")
    _checks.same_device(hidden.device, **{f"{prefix}weight": weight, f"{prefix}bias": bias})


def check_scaling(softcap: float | None, scale: float) -> None:
    """Finite numbers, and the soft-cap positive."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a positive number or None; got {softcap!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number; got {scale!r}")


def device() -> ModuleType:
    """What runs on CUDA tensors; only where there are any."""
    return importlib.import_module("cwfast.ops._lm_token_stats_device")


def _run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    topk: int,
    backend: str,
) -> tuple[Tensor, ...]:
    check_targets(targets, len(weight))
    backend = _backends.resolve(backend, hidden.device, BACKENDS)
    head = LMHead(weight, bias, softcap, scale)
    if backend == "cpu":
        return _lm_token_tiles.stats(hidden, head, targets, topk)
    if backend == "reference":
        stats = reference.lm_token_stats(hidden, head, targets, topk)
        return *stats[:7], *stats.topk, torch.stack([stats.logsumexp, torch.zeros_like(stats.logsumexp)], dim=1)
    return device().stats(hidden, head, targets, topk, backend)


def _fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    topk: int,
    backend: str,
) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    tokens = len(hidden)
    kinds = [*[dtype] * 5, torch.int64, torch.bool]
    values = [hidden.new_empty(tokens, dtype=kind) for kind in kinds]
    pairs = [hidden.new_empty((tokens, n), dtype=kind) for n, kind in ((topk, dtype), (topk, torch.int64), (2, dtype))]
    return *values, *pairs


def _run_backward(
    grad: Tensor,
    sums: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    backend = _backends.resolve(backend, hidden.device, BACKENDS)
    head = LMHead(weight, bias, softcap, scale)
    if backend == "cpu":
        return _lm_token_tiles.logprob_backward(grad, sums, hidden, head, targets, needs)
    if backend == "reference":
        p = torch.softmax(reference.lm_logits(hidden, head), dim=1)
        is_target = torch.arange(len(weight), device=p.device) == targets[:, None]
        found = reference.lm_logits_backward(grad[:, None] * torch.where(is_target, 1 - p, -p), hidden, head)
        return needed(found, hidden, head, needs)
    return device().logprob_backward(grad, sums, hidden, head, targets, needs, backend)


def needed(found: Sequence[Tensor], hidden: Tensor, head: LMHead, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Gradients at hidden, weight and bias in their dtypes; empty where they are not needed."""
    return tuple(
        g.to(x.dtype) if need and x is not None else hidden.new_empty(0)
        for g, x, need in zip(found, (hidden, head.weight, head.bias), needs, strict=True)
    )


def _fake_backward(
    grad: Tensor,
    sums: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    return fake_gradients(hidden, weight, bias, needs)


def fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """As ``needed``, without data."""
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else hidden.new_empty(0)
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, softcap, scale, _, backend = inputs
    ctx.save_for_backward(output[9], *tensors)
    ctx.options = softcap, scale
    ctx.backend = backend
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    if grad is None or not any(needs):
        return (None,) * 8
    found = torch.ops.cwfast.lm_logprob_backward(grad, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
    grad_hidden, grad_weight, grad_bias = (g if need else None for g, need in zip(found, needs, strict=True))
    return grad_hidden, grad_weight, None, grad_bias, None, None, None, None


_HEAD = "Tensor? bias, float? softcap, float scale"
register(
    f"lm_token_stats(Tensor hidden, Tensor weight, Tensor targets, {_HEAD}, int topk, str backend) "
    f"-> ({', '.join(['Tensor'] * 10)})",  # TokenStats, and [N, 2]: logsumexp rounded, and what that lost
    _run,
    _fake,
    backward=(_backward, _setup),
)
register(
    f"lm_logprob_backward(Tensor grad, Tensor sums, Tensor hidden, Tensor weight, Tensor targets, {_HEAD}, "
    "bool[] needs, str backend) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    backward=(once, lambda ctx, inputs, output: None),
)
