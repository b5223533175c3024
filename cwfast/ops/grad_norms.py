"""The norm of every sample's gradient of a linear layer (ghost norms), without the gradients."""

import itertools
import warnings

import torch
from torch import Tensor

from cwfast import _checks
from cwfast.ops.saliency import _rows

GRAM_ENTRIES = 1 << 22  # of the two T x T tables of a chunk of samples
SAMPLED = 2  # products of a gradient's excluded entries take so many times as long as those of whole gradients
# Where less than this of a squared norm is left, it is not found by subtraction, in which digits are lost.
LEFT = 1 / 16
LEFT_IN_DOUBLE = 1e-8  # of float32's digits


def per_sample_grad_norms(
    inputs: Tensor, grad_outputs: Tensor, *, cu_seqlens: Tensor | None = None, exclude: Tensor | None = None
) -> Tensor:
    """``[B]``: ``|G_b|`` (Frobenius), ``G_b = sum_t grad_outputs[b,t] x inputs[b,t]``, of all entries but ``exclude``.

    By Gram tables, ``|G_b|^2 = sum_ts (a_t . a_s) (d_t . d_s)``, less the squares of the excluded entries, which are
    computed for themselves; or by the gradient, a few samples at a time: whichever takes fewer operations, T^2 (I + O)
    and T for each excluded entry against T I O. Sums in float32 (float64 for float64). NaN and infinity propagate.

    Args:
        inputs: ``[B, I]``, ``[B, T, I]``, or ``[tokens, I]`` with ``cu_seqlens``; float32, bfloat16, float16, float64.
        grad_outputs: as inputs, with O in place of I.
        cu_seqlens: ``[B + 1]``, see ``accumulate_saliency_``.
        exclude: ``[k]`` int64, ascending: the flat indices ``o I + i`` of entries that do not count; None: all count.

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
    if exclude is not None:
        _checks.tensor("exclude", exclude, dtypes=(torch.int64,), ndim=(1,))
        _checks.same_device(inputs.device, exclude=exclude)
    excluded = None if exclude is None or not len(exclude) else _Excluded(exclude, d.shape[-1], a.shape[-1])
    if cu_seqlens is not None:
        (a, d), offsets = _rows(a, d, cu_seqlens)
        ends = offsets.tolist()
        squares = [_squares(a[None, i:j], d[None, i:j], excluded) for i, j in itertools.pairwise(ends)]
        return torch.cat([a.new_zeros(0), *squares]).sqrt_()
    if a.ndim == 2:
        return _single(a, d, excluded).sqrt_()
    return _squares(a, d, excluded).sqrt_()


class _Excluded:
    """The excluded entries of ``[O, I]``, and their pattern as a sparse matrix.

    Args:
        indices: as ``exclude``.
        height, width: O and I.
    """

    def __init__(self, indices: Tensor, height: int, width: int) -> None:
        first, last = indices[[0, -1]].tolist()
        rising = bool((indices.diff() > 0).all())
        if not (rising and first >= 0 and last < height * width):
            raise ValueError(
                f"exclude must be ascending flat indices of [{height}, {width}], each once; got {len(indices)} from "
                f"{first} to {last}, {'' if rising else 'not '}ascending"
            )
        self.indices, self.shape = indices, (height, width)
        self._patterns: dict[torch.dtype, Tensor] = {}

    def pattern(self, dtype: torch.dtype) -> Tensor:
        """Ones at the entries."""
        if dtype not in self._patterns:
            self._patterns[dtype] = self._pattern(dtype)
        return self._patterns[dtype]

    def _pattern(self, dtype: torch.dtype) -> Tensor:
        height, width = self.shape
        rows = (self.indices // width).bincount(minlength=height)
        begin = torch.cat([rows.new_zeros(1), rows.cumsum(0)])
        ones = torch.ones(len(self.indices), dtype=dtype, device=self.indices.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            return torch.sparse_csr_tensor(begin, self.indices % width, ones, self.shape, check_invariants=False)


def _single(a: Tensor, d: Tensor, excluded: _Excluded | None) -> Tensor:
    """Of outer products, ``T = 1``: the excluded entries' squares are ``d^2 P a^2``, P their pattern."""
    if excluded is None:
        return a.square().sum(dim=1).mul_(d.square().sum(dim=1))
    squares_a, squares_d = a.double().square(), d.double().square()
    whole = squares_a.sum(dim=1) * squares_d.sum(dim=1)
    share = ((excluded.pattern(torch.float64) @ squares_a.T) * squares_d.T).sum(dim=0)
    least = LEFT if a.dtype == torch.float64 else LEFT_IN_DOUBLE
    return _left(whole, share, least, a[:, None], d[:, None], excluded).to(a.dtype)


def _squares(a: Tensor, d: Tensor, excluded: _Excluded | None) -> Tensor:
    samples, steps, width = a.shape
    height = d.shape[2]
    if steps == 1:
        return _single(a[:, 0], d[:, 0], excluded)
    sampled = 0 if excluded is None else SAMPLED * len(excluded.indices)
    gram = steps * (width + height) + sampled <= width * height
    each = max(1, 2 * steps * steps if gram else width * height)
    chunk = max(1, GRAM_ENTRIES // each)
    found = a.new_empty(samples)
    for start in range(0, samples, chunk):
        part = slice(start, start + chunk)
        if gram:
            product = (a[part] @ a[part].mT).mul_(d[part] @ d[part].mT)
            found[part] = product.sum(dim=(1, 2)).clamp_(min=0)  # rounding may fall below
        else:
            found[part] = _direct(a[part], d[part], excluded)
    if gram and excluded is not None:
        pattern, share = excluded.pattern(a.dtype), torch.empty_like(found)
        for b in range(samples):
            share[b] = torch.sparse.sampled_addmm(pattern, d[b].T, a[b], beta=0).values().square_().sum()
        found = _left(found, share, LEFT, a, d, excluded)
    return found


def _left(whole: Tensor, share: Tensor, least: float, a: Tensor, d: Tensor, excluded: _Excluded) -> Tensor:
    """``whole - share``; where too little is left, or it is no number, found without subtraction."""
    left = whole - share
    for b in (~(left >= least * whole)).nonzero()[:, 0].tolist():
        left[b] = _direct(a[b : b + 1], d[b : b + 1], excluded)[0]
    return left


def _direct(a: Tensor, d: Tensor, excluded: _Excluded | None) -> Tensor:
    squares = (d.mT @ a).square_().flatten(1)
    return (squares if excluded is None else squares.index_fill_(1, excluded.indices, 0)).sum(dim=1)
