"""AdamW on selected entries, with compact moments. Behind ``cwfast.optim``; not part of ``cwfast.ops``'s names."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from cwfast import _backends
from cwfast.ops._library import written
from cwfast.ops.rewind import BACKENDS, Bits, _picks, _pointers, _wrong_picks, gather, scatter_


def selected_adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    bits: Sequence[Bits],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    backend: str = "auto",
) -> None:
    """One AdamW step of the selected entries, in place; the others are not touched. Formula: ``SelectedAdamW``.

    Backend "cpu" takes contiguous float32 weights with lists in one pass of its own; all else is ``gather``, torch's
    fused AdamW on the compact values, and ``scatter_``.

    Args:
        weights: one device.
        grads: of the same shapes.
        bits: as in ``cwfast.ops.rewind_``.
        exp_avgs: ``[k]`` of each weight: float32, or float64 for float64 weights; contiguous.
        exp_avg_sqs: likewise.
        steps: float32 scalars, which grow by 1.
        lr: likewise the options of ``SelectedAdamW``.
        betas: see there.
        eps: see there.
        weight_decay: see there.
        maximize: see there.
        backend: "reference", "cpu" or "auto".

    Raises:
        TypeError, ValueError: as ``gather`` does; nothing has been changed.
    """
    resolved = _backends.resolve(backend, weights[0].device, BACKENDS)
    fits = [_fits(w, g, b) if resolved == "cpu" else False for w, g, b in zip(weights, grads, bits, strict=True)]
    options: dict[str, Any] = {"eps": eps, "weight_decay": weight_decay, "maximize": maximize}
    one, rest = ([i for i, fit in enumerate(fits) if fit is wanted] for wanted in (True, False))
    if one:
        _fused(
            [weights[i] for i in one],
            [grads[i] for i in one],
            [bits[i] for i in one],
            [exp_avgs[i] for i in one],
            [exp_avg_sqs[i] for i in one],
            [steps[i] for i in one],
            float(lr),
            betas,
            options,
        )
    if rest:
        w, g, b = [weights[i] for i in rest], [grads[i] for i in rest], [bits[i] for i in rest]
        m, v, t = [exp_avgs[i] for i in rest], [exp_avg_sqs[i] for i in rest], [steps[i] for i in rest]
        values, compact = gather(w, b, backend=backend), gather(g, b, backend=backend)
        updated = [value.to(moment.dtype) for value, moment in zip(values, m, strict=True)]
        compact = [grad.to(moment.dtype) for grad, moment in zip(compact, m, strict=True)]
        adamw(
            updated, compact, m, v, [], t, fused=True, amsgrad=False, lr=lr, beta1=betas[0], beta2=betas[1], **options
        )
        scatter_(w, b, [value.to(weight.dtype) for value, weight in zip(updated, w, strict=True)], backend=backend)


def _fits(weight: Tensor, grad: Tensor, bits: Bits) -> bool:
    same = weight.dtype == grad.dtype == torch.float32 and weight.shape == grad.shape
    return same and isinstance(bits, tuple) and weight.is_contiguous() and grad.is_contiguous()


def _fused(
    weights: list[Tensor],
    grads: list[Tensor],
    bits: list[Bits],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float,
    betas: tuple[float, float],
    options: dict[str, Any],
) -> None:
    lows = [item[0] for item in bits]
    offsets: list[Tensor | None] = [item[1] for item in bits]
    wrong = _wrong_picks(weights, lows, offsets, "cpu")
    if wrong:
        raise ValueError(wrong)
    for i, (low, m, v) in enumerate(zip(lows, exp_avgs, exp_avg_sqs, strict=True)):
        for name, moment in (("exp_avgs", m), ("exp_avg_sqs", v)):
            if moment.dtype != torch.float32 or moment.shape != low.shape or not moment.is_contiguous():
                raise ValueError(
                    f"{name}[{i}] must be contiguous float32 of {len(low)} entries; "
                    f"got {moment.dtype} of shape {tuple(moment.shape)}"
                )
    items = []
    for weight, grad, m, v, step in zip(weights, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        count = step.add_(1).item()
        corrections = 1 - betas[0] ** count, (1 - betas[1] ** count) ** 0.5
        items.append((weight.data_ptr(), grad.data_ptr(), m.data_ptr(), v.data_ptr(), *corrections))
    eps, decay, maximize = options["eps"], options["weight_decay"], options["maximize"]
    _backends.native().selected_adamw(
        items, _pointers(_picks(weights, lows, offsets)), lr, *betas, eps, decay, maximize
    )
    written(weights)
