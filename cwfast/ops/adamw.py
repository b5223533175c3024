"""AdamW on selected entries, with compact moments. Behind ``cwfast.optim``; not part of ``cwfast.ops``'s names."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from cwfast import _backends, _checks
from cwfast.ops._library import register, written
from cwfast.ops.rewind import Bits, _resolve


class CheckedBits:
    """The selected entries of one tensor, checked for every step to come.

    Args:
        weight: the tensor.
        bits: as in ``cwfast.ops.rewind_``; not to be changed.
        backend: "reference", "cpu" or "auto".

    Raises:
        TypeError, ValueError, BackendUnavailable: as ``cwfast.ops.gather`` does.
    """

    def __init__(self, weight: Tensor, bits: Bits, backend: str) -> None:
        self.shape = weight.shape
        self.backend, (self.packed,), (self.offset,) = _resolve([weight], [bits], backend)


def selected_adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    bits: Sequence[CheckedBits],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    counts: Sequence[int],
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
        bits: of these weights, which have kept shape and device; one backend.
        exp_avgs: ``[k]`` of each weight: float32, or float64 for float64 weights; contiguous.
        exp_avg_sqs: likewise.
        steps: float32 scalars, which grow by 1.
        counts: k of each weight.
        lr: likewise the options of ``SelectedAdamW``.
        betas: see there.
        eps: see there.
        weight_decay: see there.
        maximize: see there.

    Raises:
        TypeError: a gradient is sparse.
        ValueError: shapes or moments do not fit; nothing has been changed.
    """
    for i, (weight, grad, picks) in enumerate(zip(weights, grads, bits, strict=True)):
        _checks.tensor(f"grads[{i}]", grad)
        _checks.shape(f"weights[{i}]", weight, picks.shape, "the one it had when its mask was checked")
        _checks.shape(f"grads[{i}]", grad, weight.shape, f"that of weights[{i}]")
        _checks.same_device(picks.packed.device, **{f"weights[{i}]": weight, f"grads[{i}]": grad})
    for name, moments in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        for i, (weight, moment, count) in enumerate(zip(weights, moments, counts, strict=True)):
            dtype = torch.promote_types(weight.dtype, torch.float32)
            if moment.dtype != dtype or moment.shape != (count,) or not moment.is_contiguous():
                raise ValueError(
                    f"{name}[{i}] must be contiguous {str(dtype).removeprefix('torch.')} of {count} entries; "
                    f"got {moment.dtype} of shape {tuple(moment.shape)}"
                )
    torch.ops.cwfast.selected_adamw_(
        [weight.detach() for weight in weights],
        list(grads),
        [picks.packed for picks in bits],
        [picks.offset for picks in bits],
        list(exp_avgs),
        list(exp_avg_sqs),
        list(steps),
        lr,
        *betas,
        eps,
        weight_decay,
        maximize,
        bits[0].backend,
    )


def _run(
    weights: list[Tensor],
    grads: list[Tensor],
    packed: list[Tensor],
    offsets: list[Tensor | None],
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
    fused, items, picks = [], [], []
    for i, (weight, grad, low, offset) in enumerate(zip(weights, grads, packed, offsets, strict=True)):
        if backend != "cpu" or offset is None or not _plain(weight) or not _plain(grad):
            continue
        count = steps[i].add_(1).item()
        pointers = [tensor.data_ptr() for tensor in (weight, grad, exp_avgs[i], exp_avg_sqs[i])]
        items.append((*pointers, 1 - beta1**count, (1 - beta2**count) ** 0.5))
        picks.append((weight.numel(), 0, low.data_ptr(), offset.data_ptr(), len(low)))
        fused.append(i)
    if fused:
        _backends.native().selected_adamw(items, picks, lr, beta1, beta2, eps, weight_decay, maximize)
        written([weights[i] for i in fused])
    rest = sorted(set(range(len(weights))) - set(fused))
    if not rest:
        return
    w, m, bits = [weights[i] for i in rest], [exp_avgs[i] for i in rest], [packed[i] for i in rest]
    ends = [offsets[i] for i in rest]
    values = torch.ops.cwfast.gather(w, bits, ends, backend)
    compact = torch.ops.cwfast.gather([grads[i] for i in rest], bits, ends, backend)
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
    torch.ops.cwfast.scatter_(w, bits, ends, rounded, backend)


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous()


register(
    "selected_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor[] bits, Tensor?[] offsets, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "bool maximize, str backend) -> ()",
    _run,
    lambda *args: None,
)
