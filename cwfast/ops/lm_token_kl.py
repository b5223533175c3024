"""Divergence of a language model from its reference, per token, from hidden states and LM heads."""

from typing import Any

import torch
from torch import Tensor

from cwfast import _backends, _checks, reference
from cwfast.ops import _lm_token_tiles
from cwfast.ops._library import once, register
from cwfast.ops.lm_token_stats import check_head, check_scaling, device, fake_gradients, needed
from cwfast.reference import LMHead

BACKENDS = ("reference", "cpu", "triton", "cuda")


def lm_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """``KL(q || p) = sum_v q_v (log q_v - log p_v)`` per token, q of the reference and p of the model, in nats.

    Both distributions are made as in ``lm_token_stats``, softcap and scale the same for both. Nothing of size
    ``[N, V]`` exists, neither forward nor backward, which computes the tiles again: on the CPU the tiles of both heads
    take at most 80 MB (in bfloat16 and float16; in float32 less). Differentiable in hidden, weight and bias, once; the
    reference is a constant. Where a distribution does not exist (see there), the result is NaN; where p_v = 0 < q_v, it
    is inf. N = 0 gives an empty result.

    On a GPU the gradient at the logits passes through the dtype of hidden: in float16 what of it is below 6e-8 is lost,
    as in any backward pass in float16, so scale the loss (``torch.amp.GradScaler``).

    Args:
        hidden: ``[N, d]`` of the model; float32, bfloat16, float16 (computed in float32) or float64; any strides.
        weight: ``[V, d]``, its LM head, of the dtype of hidden; any strides.
        ref_hidden: ``[N, e]`` of the reference, of the dtype of hidden.
        ref_weight: ``[V, e]``, its LM head, of the dtype of hidden.
        bias: ``[V]`` of the model, or None.
        ref_bias: ``[V]`` of the reference, or None.
        softcap: a positive number, or None for none.
        scale: multiplies ``W h + bias``.
        backend: "reference", "cpu", "triton", "cuda" or "auto".

    Returns:
        ``[N]`` float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument does not hold what is written above.
        BackendUnavailable: the named backend cannot run here.
    """
    check_pair(hidden, LMHead(weight, bias, softcap, scale), ref_hidden, LMHead(ref_weight, ref_bias, softcap, scale))
    return torch.ops.cwfast.lm_token_kl(
        hidden,
        weight,
        ref_hidden.detach(),
        ref_weight.detach(),
        bias,
        None if ref_bias is None else ref_bias.detach(),
        None if softcap is None else float(softcap),
        float(scale),
        backend,
    )[0]


def check_pair(hidden: Tensor, head: LMHead, ref_hidden: Tensor, ref_head: LMHead) -> None:
    """A model and its reference that can be compared."""
    check_head("", hidden, head.weight, head.bias)
    check_head("ref_", ref_hidden, ref_head.weight, ref_head.bias)
    check_scaling(head.softcap, head.scale)
    if (ref_head.softcap, ref_head.scale) != (head.softcap, head.scale):
        raise ValueError("the models must have the same soft-cap and scale of logits; these differ")
    _checks.tensor("ref_hidden", ref_hidden, dtypes=(hidden.dtype,))
    _checks.same_device(hidden.device, ref_hidden=ref_hidden)
    if len(ref_hidden) != len(hidden):
        raise ValueError(f"ref_hidden must have the rows of hidden, {len(hidden)}; got {len(ref_hidden)}")
    if len(ref_head.weight) != len(head.weight):
        raise ValueError(
            f"ref_weight must have the vocabulary of weight, {len(head.weight)} rows; got {len(ref_head.weight)}: "
            "only models of one vocabulary can be compared"
        )
    if len(head.weight) < 1:
        raise ValueError(f"weight must have at least 1 row; got shape {tuple(head.weight.shape)}")


def _run(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    softcap: float | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = _backends.resolve(backend, hidden.device, BACKENDS)
    head, ref_head = LMHead(weight, bias, softcap, scale), LMHead(ref_weight, ref_bias, softcap, scale)
    if backend == "cpu":
        return _lm_token_tiles.kl(hidden, head, ref_hidden, ref_head)
    if backend == "reference":
        result = reference.lm_token_kl(hidden, head, ref_hidden, ref_head)
        sums = (reference.lm_logits(*pair).logsumexp(dim=1) for pair in ((hidden, head), (ref_hidden, ref_head)))
        own, other = (torch.stack([x, torch.zeros_like(x)], dim=1) for x in sums)
        return result, own, other
    return device().kl(hidden, head, ref_hidden, ref_head, backend)


def _fake(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    sums = hidden.new_empty((len(hidden), 2), dtype=dtype)
    return hidden.new_empty(len(hidden), dtype=dtype), sums, torch.empty_like(sums)


def _run_backward(
    grad: Tensor,
    sums: Tensor,
    ref_sums: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    softcap: float | None,
    scale: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    backend = _backends.resolve(backend, hidden.device, BACKENDS)
    head, ref_head = LMHead(weight, bias, softcap, scale), LMHead(ref_weight, ref_bias, softcap, scale)
    if backend == "cpu":
        return _lm_token_tiles.kl_backward(grad, sums, ref_sums, hidden, head, ref_hidden, ref_head, needs)
    if backend == "reference":
        p = torch.softmax(reference.lm_logits(hidden, head), dim=1)
        q = torch.softmax(reference.lm_logits(ref_hidden, ref_head), dim=1)
        return needed(reference.lm_logits_backward(grad[:, None] * (p - q), hidden, head), hidden, head, needs)
    return device().kl_backward(grad, sums, ref_sums, hidden, head, ref_hidden, ref_head, needs, backend)


def _fake_backward(
    grad: Tensor,
    sums: Tensor,
    ref_sums: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    softcap: float | None,
    scale: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    return fake_gradients(hidden, weight, bias, needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, softcap, scale, backend = inputs
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.options = softcap, scale
    ctx.backend = backend
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    if grad is None or not any(needs):
        return (None,) * 9
    found = torch.ops.cwfast.lm_token_kl_backward(grad, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
    grad_hidden, grad_weight, grad_bias = (g if need else None for g, need in zip(found, needs, strict=True))
    return grad_hidden, grad_weight, None, None, grad_bias, None, None, None, None


_HEADS = (
    "Tensor hidden, Tensor weight, Tensor ref_hidden, Tensor ref_weight, Tensor? bias, Tensor? ref_bias, "
    "float? softcap, float scale"
)
register(
    f"lm_token_kl({_HEADS}, str backend) -> (Tensor, Tensor, Tensor)",  # KL; each logsumexp as of lm_token_stats
    _run,
    _fake,
    backward=(_backward, _setup),
)
register(
    f"lm_token_kl_backward(Tensor grad, Tensor sums, Tensor ref_sums, {_HEADS}, bool[] needs, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    backward=(once, lambda ctx, inputs, output: None),
)
