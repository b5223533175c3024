"""AdamW on selected entries, with compact moments. Behind ``cwfast.optim``; not part of ``cwfast.ops``'s names."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from cwfast import _backends, _checks
from cwfast.ops import _rewind_moves as _moves
from cwfast.ops._entries import Entries
from cwfast.ops._library import register, written


def selected_adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    entries: Sequence[Entries],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One AdamW step of the selected entries, in place; the others are not touched. Formula: ``SelectedAdamW``.

    Backend "cpu" takes contiguous float32 weights with lists in one pass of its own; all else is ``gather``, torch's
    fused AdamW on the compact values, and ``scatter_``.

    Args:
        weights: one device; at least one.
        grads: of the same shapes, dense.
        entries: of these weights, which have kept shape and device; one backend.
        exp_avgs: ``[k]`` of each weight: float32, or float64 for float64 weights; contiguous.
        exp_avg_sqs: likewise.
        steps: float32 scalars, which grow by 1.
        lr: likewise the options of ``SelectedAdamW``.
        betas: see there.
        eps: see there.
        weight_decay: see there.
        maximize: see there.

    Raises:
        TypeError: a gradient is sparse.
        ValueError: shapes or moments do not fit, or a weight is not dense; nothing has been changed.
    """
    for weight, grad, entry in zip(weights, grads, entries, strict=True):
        entry.check(weight)
        what = f"the gradient of {entry.name}"
        _checks.tensor(what, grad)
        _checks.shape(what, grad, weight.shape, "that of the parameter")
        _checks.same_device(weight.device, **{what: grad})
    for name, moments in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        for i, (weight, moment, entry) in enumerate(zip(weights, moments, entries, strict=True)):
            dtype = torch.promote_types(weight.dtype, torch.float32)
            if moment.dtype != dtype or moment.shape != (entry.count,) or not moment.is_contiguous():
                raise ValueError(
                    f"{name}[{i}] must be contiguous {str(dtype).removeprefix('torch.')} of {entry.count} entries; "
                    f"got {moment.dtype} of shape {tuple(moment.shape)}"
                )
    torch.ops.cwfast.selected_adamw_(
        [weight.detach() for weight in weights],
        list(grads),
        [entry.picks.low for entry in entries],
        [entry.picks.offset for entry in entries],
        [entry.ranks for entry in entries],
        list(exp_avgs),
        list(exp_avg_sqs),
        list(steps),
        lr,
        *betas,
        eps,
        weight_decay,
        maximize,
        entries[0].backend,
    )


def _run(
    weights: list[Tensor],
    grads: list[Tensor],
    packed: list[Tensor],
    offsets: list[Tensor | None],
    ranks: list[Tensor | None],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    backend: str,
) -> None:
    picks = _moves.picks_of(weights, packed, offsets)
    fused = [
        i
        for i, (weight, grad) in enumerate(zip(weights, grads, strict=True))
        if backend == "cpu" and offsets[i] is not None and _plain(weight) and _plain(grad)
    ]
    if fused:
        items = []
        for i in fused:
            count = steps[i].item() + 1
            pointers = [tensor.data_ptr() for tensor in (weights[i], grads[i], exp_avgs[i], exp_avg_sqs[i])]
            items.append((*pointers, 1 - beta1**count, (1 - beta2**count) ** 0.5))
        lists = [_moves.pointers(picks[i]) for i in fused]
        try:
            _backends.native().selected_adamw(items, lists, lr, beta1, beta2, eps, weight_decay, maximize)
        finally:  # also after Ctrl-C, which leaves some entries written and no step counted
            written([weights[i] for i in fused])
        for i in fused:
            steps[i].add_(1)
    rest = sorted(set(range(len(weights))) - set(fused))
    if not rest:
        return
    w, m, own = [weights[i] for i in rest], [exp_avgs[i] for i in rest], [picks[i] for i in rest]
    surveyed = _moves.Survey([len(moment) for moment in m], [ranks[i] for i in rest])
    values = _moves.gather(w, own, surveyed, backend)
    compact = _moves.gather([grads[i] for i in rest], own, surveyed, backend)
    updated = [value.to(moment.dtype) for value, moment in zip(values, m, strict=True)]
    adamw(
        updated,
        [grad.to(moment.dtype) for grad, moment in zip(compact, m, strict=True)],
        m,
        [exp_avg_sqs[i] for i in rest],
        [],
        [steps[i] for i in rest],
        fused=True,
        amsgrad=False,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
    )
    rounded = [value.to(weight.dtype) for value, weight in zip(updated, w, strict=True)]
    _moves.scatter(w, own, rounded, surveyed, backend)


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous()


register(
    "selected_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor[] bits, Tensor?[] offsets, Tensor?[] ranks, "
    "Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, float lr, float beta1, float beta2, "
    "float eps, float weight_decay, bool maximize, str backend) -> ()",
    _run,
    lambda *args: None,
)
