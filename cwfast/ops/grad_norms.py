"""The norm of every sample's gradient of a linear layer (ghost norms), without the gradients."""

import itertools

import torch
from torch import Tensor

from cwfast import _checks
from cwfast.ops.saliency import _rows

GRAM_ENTRIES = 1 << 22  # of the two T x T tables of a chunk of samples


def per_sample_grad_norms(inputs: Tensor, grad_outputs: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """``[B]``: ``|G_b|`` (Frobenius), ``G_b = sum_t grad_outputs[b,t] x inputs[b,t]``.

    By Gram tables, ``|G_b|^2 = sum_ts (a_t . a_s) (d_t . d_s)``, or by the gradient itself, whichever takes fewer
    operations: T^2 (I + O) against T I O. Sums in float32 (float64 for float64). NaN and infinity propagate.

    Args:
        inputs: ``[B, I]``, ``[B, T, I]``, or ``[tokens, I]`` with ``cu_seqlens``; float32, bfloat16, float16, float64.
        grad_outputs: as inputs, with O in place of I.
        cu_seqlens: ``[B + 1]``, see ``accumulate_saliency_``.

    Returns:
        float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument does not hold what is written above.

    Source:
        Goodfellow, "Efficient per-example gradient computations", 2015 (T = 1); Li et al., "Large language models can
        be strong differentially private learners", ICLR 2022 (ghost clipping).
    """
    _checks.tensor("inputs", inputs, dtypes=_checks.FLOATS, ndim=(2,) if cu_seqlens is not None else (2, 3))
    _checks.tensor("grad_outputs", grad_outputs, dtypes=(inputs.dtype,), ndim=(inputs.ndim,))
    _checks.shape(
        "grad_outputs", grad_outputs, (*inputs.shape[:-1], grad_outputs.shape[-1]), "the leading dimensions of inputs"
    )
    _checks.same_device(inputs.device, grad_outputs=grad_outputs)
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    a, d = inputs.detach().to(dtype), grad_outputs.detach().to(dtype)
    if cu_seqlens is not None:
        (a, d), offsets = _rows(a, d, cu_seqlens)
        ends = offsets.tolist()
        squares = [_squares(a[None, i:j], d[None, i:j]) for i, j in itertools.pairwise(ends)]
        return torch.cat([a.new_zeros(0), *squares]).sqrt_()
    if a.ndim == 2:
        return a.square().sum(dim=1).mul_(d.square().sum(dim=1)).sqrt_()
    return _squares(a, d).sqrt_()


def _squares(a: Tensor, d: Tensor) -> Tensor:
    samples, steps, width = a.shape
    gram = steps * (width + d.shape[2]) <= width * d.shape[2]
    each = max(1, 2 * steps * steps if gram else width * d.shape[2])
    chunk = max(1, GRAM_ENTRIES // each)
    found = a.new_empty(samples)
    for start in range(0, samples, chunk):
        part = slice(start, start + chunk)
        if gram:
            product = (a[part] @ a[part].mT).mul_(d[part] @ d[part].mT)
            found[part] = product.sum(dim=(1, 2)).clamp_(min=0)  # rounding may fall below
        else:
            found[part] = (d[part].mT @ a[part]).square_().sum(dim=(1, 2))
    return found
