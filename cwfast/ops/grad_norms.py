"""The norm of every sample's gradient of a linear layer (ghost norms), without the gradients."""

import itertools
import warnings

import torch
from torch import Tensor

from cwfast import _checks
from cwfast.ops.saliency import _rows

GRAM_ENTRIES = 1 << 22  # of the two T x T tables of a chunk of samples
SAMPLED = 2  # products of a gradient's excluded entries take so many times as long as those of whole gradients
LEFT = 1 / 16  # where less of a squared norm is left than this, it is not found by subtraction: digits are lost


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
    excluded = None if exclude is None else _Excluded(exclude, d.shape[-1], a)
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
        height: O.
        a: has I columns; lies where the indices must lie.
    """

    def __init__(self, indices: Tensor, height: int, a: Tensor) -> None:
        _checks.tensor("exclude", indices, dtypes=(torch.int64,), ndim=(1,))
        _checks.same_device(a.device, exclude=indices)
        width, self.count = a.shape[-1], len(indices)
        ends = indices[[0, -1]].tolist() if self.count else []
        if not all(0 <= end < height * width for end in ends) or not bool((indices.diff() > 0).all()):
            raise ValueError(
                f"exclude must be ascending flat indices of [{height}, {width}]; got {self.count} from "
                f"{' to '.join(map(str, ends))}, ascending or not"
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
        rows = (self.indices // max(1, width)).bincount(minlength=height)
        begin = torch.cat([rows.new_zeros(1), rows.cumsum(0)])
        ones = torch.ones(self.count, dtype=dtype, device=self.indices.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            return torch.sparse_csr_tensor(
                begin, self.indices % max(1, width), ones, self.shape, check_invariants=False
            )


def _single(a: Tensor, d: Tensor, excluded: _Excluded | None) -> Tensor:
    """Of outer products, ``T = 1``: the excluded entries' squares are ``d^2 P a^2``, P their pattern."""
    if excluded is None or not excluded.count:
        return a.square().sum(dim=1).mul_(d.square().sum(dim=1))
    squares_a, squares_d = a.double().square_(), d.double().square_()
    whole = squares_a.sum(dim=1) * squares_d.sum(dim=1)
    # In float64 the difference keeps float32's digits down to 1e-9 of the whole.
    share = (excluded.pattern(torch.float64) @ squares_a.T).mul_(squares_d.T).sum(dim=0)
    return whole.sub_(share).clamp_(min=0).to(a.dtype)


def _squares(a: Tensor, d: Tensor, excluded: _Excluded | None) -> Tensor:
    samples, steps, width = a.shape
    height = d.shape[2]
    if steps == 1:
        return _single(a[:, 0], d[:, 0], excluded)
    if excluded is not None and not excluded.count:
        excluded = None
    sampled = 0 if excluded is None else SAMPLED * excluded.count
    gram = steps * (width + height) + sampled <= width * height
    each = max(1, 2 * steps * steps if gram else width * height)
    chunk = max(1, GRAM_ENTRIES // each)
    pattern = excluded.pattern(a.dtype) if gram and excluded is not None else None
    found = a.new_empty(samples)
    for start in range(0, samples, chunk):
        part = slice(start, start + chunk)
        if gram:
            product = (a[part] @ a[part].mT).mul_(d[part] @ d[part].mT)
            found[part] = product.sum(dim=(1, 2)).clamp_(min=0)  # rounding may fall below
        else:
            found[part] = _direct(a[part], d[part], excluded)
    if pattern is not None:
        for sample in range(samples):
            one = slice(sample, sample + 1)
            entries = torch.sparse.sampled_addmm(pattern, d[sample].T, a[sample], beta=0).values()
            left = found[sample] - entries.square_().sum()
            found[one] = left if left >= LEFT * found[sample] else _direct(a[one], d[one], excluded)
    return found


def _direct(a: Tensor, d: Tensor, excluded: _Excluded | None) -> Tensor:
    squares = (d.mT @ a).square_().flatten(1)
    return (squares if excluded is None else squares.index_fill_(1, excluded.indices, 0)).sum(dim=1)
