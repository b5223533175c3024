"""lm_token_stats and lm_token_kl on the CPU: torch multiplies a tile, cwfast._C takes from it what is needed.

A tile of logits and what its product needs in another precision stay below 40 MB, whatever N, V and d are; a divergence
has two of them.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cwfast import _backends
from cwfast.ops._lm_token_parts import Parts, finish, no_parts, split
from cwfast.reference import LMHead

ROWS, COLUMNS = 2048, 1024  # of a tile at most: the product runs at full speed, and its 8 MB stay in the last cache
FEWEST = 16  # rows of a product: MKL adds up fewer than 8 in another order, and a token must not depend on its batch
OPERAND = 16 << 20  # bytes of either factor of a tile's product, at most


def stats(hidden: Tensor, head: LMHead, targets: Tensor, topk: int) -> tuple[Tensor, ...]:
    """The results of ``torch.ops.cwfast.lm_token_stats``."""
    target_logit = target_logits(hidden, head, targets)
    parts = parts_of(hidden, head, targets, target_logit, topk, 0, len(head.weight))
    return finish(parts, target_logit, targets)


def pieces(count: int, size: int) -> Iterator[slice]:
    """Of at most ``size``, one after the other."""
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


def target_logits(hidden: Tensor, head: LMHead, targets: Tensor, first: int = 0) -> Tensor:
    """``[N]``, products summed in float64; -inf for targets outside of the tokens ``first ...`` that the head has."""
    out = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.promote_types(hidden.dtype, torch.float32))
    here = ((targets >= first) & (targets < first + len(head.weight))).nonzero()[:, 0]
    for piece in pieces(len(here), 256):
        rows = here[piece]
        tokens = targets[rows] - first
        z, bias = (torch.zeros(256, dtype=out.dtype) for _ in range(2))
        z[: len(rows)] = (hidden[rows].double() * head.weight[tokens].double()).sum(dim=1)
        if head.bias is not None:
            bias[: len(rows)] = head.bias[tokens]
        tile = (z.data_ptr(), 1, len(rows), len(z), bias.data_ptr(), head.scale, head.softcap or 0.0)
        _kernel("lm_transform", out.dtype)(tile)  # as the other logits: what is equal before it stays equal
        out[rows] = z[: len(rows)]
    return out


class Tiles:
    """The logits of hidden states under a head, tile by tile, in one workspace.

    Args:
        hidden: ``[N, d]``.
        head: of V tokens.
        dtype: in which to multiply.
        widest: d, or that of another head whose tiles must be as large.
    """

    def __init__(self, hidden: Tensor, head: LMHead, dtype: torch.dtype, widest: int | None = None) -> None:
        self.hidden, self.head, self.dtype = hidden, head, dtype
        most = max(16, OPERAND // (max(1, widest or hidden.shape[1]) * dtype.itemsize) // 16 * 16)
        self.rows, self.columns = min(ROWS, most), min(COLUMNS, most)
        stride = -(-min(self.columns, len(head.weight)) // 16) * 16
        rows = max(FEWEST, min(self.rows, len(hidden)))
        self._logits = torch.empty(rows * stride, dtype=dtype)
        self._hidden, self._weight = (
            None if x.dtype == dtype else torch.empty((n, x.shape[1]), dtype=dtype)
            for x, n in ((hidden, rows), (head.weight, min(self.columns, len(head.weight))))
        )
        self._few = torch.zeros((FEWEST, hidden.shape[1]), dtype=dtype)
        # Read in whole vectors: a tile of the last tokens reads behind them.
        self._bias = None if head.bias is None else torch.zeros(len(head.bias) + 16, dtype=dtype)
        if self._bias is not None and head.bias is not None:
            self._bias[:-16] = head.bias

    def hidden_of(self, rows: slice) -> Tensor:
        """In the dtype of the product; valid until the next call."""
        part = self.hidden[rows]
        if len(part) < FEWEST:
            return self._few[: len(part)].copy_(part)
        return part if self._hidden is None else self._hidden[: len(part)].copy_(part)

    def weight_of(self, columns: slice) -> Tensor:
        """In the dtype of the product; valid until the next call."""
        part = self.head.weight[columns]
        return part if self._weight is None else self._weight[: len(part)].copy_(part)

    def product(self, h: Tensor, w: Tensor, columns: slice) -> tuple[Tensor, tuple[object, ...]]:
        """``h w^T`` in the workspace, and the LmTile of csrc/lm_token_stats.h: neither bias, scale nor softcap yet."""
        stride = -(-len(w) // 16) * 16
        few = len(h) < FEWEST
        whole = self._logits.as_strided((FEWEST if few else len(h), len(w)), (stride, 1))
        torch.mm(self._few if few else h, w.T, out=whole)
        z = whole[: len(h)]
        bias = 0 if self._bias is None else self._bias[columns.start :].data_ptr()
        return z, (z.data_ptr(), *z.shape, stride, bias, self.head.scale, self.head.softcap or 0.0)


def _kernel(name: str, dtype: torch.dtype) -> Callable[..., None]:
    return getattr(_backends.native(), f"{name}_{str(dtype).removeprefix('torch.')}")


def parts_of(
    hidden: Tensor, head: LMHead, targets: Tensor, target_logit: Tensor, topk: int, first: int, vocabulary: int
) -> Parts:
    """Of the tokens ``first ...`` that the head has, of ``vocabulary`` in all."""
    parts = no_parts(target_logit, vocabulary, topk)
    tiles = Tiles(hidden, head, target_logit.dtype)
    kernel, targets = _kernel("lm_stats_tile", tiles.dtype), targets.contiguous()
    for rows in pieces(len(hidden), tiles.rows):
        h = tiles.hidden_of(rows)
        mine = [x[rows].data_ptr() for x in (targets, target_logit, *parts)]
        for columns in pieces(len(head.weight), tiles.columns):
            _, tile = tiles.product(h, tiles.weight_of(columns), columns)
            kernel(tile, first + columns.start, *mine, topk)
    return parts


def logprob_backward(
    grad: Tensor, sums: Tensor, hidden: Tensor, head: LMHead, targets: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The results of ``torch.ops.cwfast.lm_logprob_backward``."""
    kernel, grad, targets = (
        _kernel("lm_logprob_grad_tile", sums.dtype),
        grad.to(sums.dtype).contiguous(),
        targets.contiguous(),
    )

    def to_gradient(tile: tuple[object, ...], rows: slice, columns: slice) -> None:
        kernel(tile, sums[rows].data_ptr(), columns.start, targets[rows].data_ptr(), grad[rows].data_ptr())

    return _backward(Tiles(hidden, head, sums.dtype), needs, to_gradient)


def _backward(
    tiles: Tiles, needs: Sequence[bool], to_gradient: Callable[[tuple[object, ...], slice, slice], None]
) -> tuple[Tensor, ...]:
    """Gradients at hidden, weight and bias (empty where not needed), from those at each tile of logits.

    The vocabulary is the outer loop: a tile of weights is summed over all tokens before it is rounded.
    """
    hidden, head, dtype = tiles.hidden, tiles.head, tiles.dtype
    nothing = hidden.new_empty(0)
    grad_hidden = torch.zeros(hidden.shape, dtype=dtype) if needs[0] else nothing
    grad_weight = torch.empty(head.weight.shape, dtype=head.weight.dtype) if needs[1] else nothing
    grad_bias = torch.empty(head.bias.shape, dtype=head.bias.dtype) if head.bias is not None and needs[2] else nothing
    for columns in pieces(len(head.weight), tiles.columns):
        w = tiles.weight_of(columns)
        sum_weight, sum_bias = torch.zeros(w.shape if needs[1] else 0, dtype=dtype), torch.zeros(len(w), dtype=dtype)
        for rows in pieces(len(hidden), tiles.rows):
            h = tiles.hidden_of(rows)
            z, tile = tiles.product(h, w, columns)
            to_gradient(tile, rows, columns)
            if needs[0]:
                grad_hidden[rows].addmm_(z, w)
            if needs[1]:
                sum_weight.addmm_(z.T, h)
            if needs[2]:
                sum_bias += z.sum(dim=0)
        if needs[1]:
            grad_weight[columns] = sum_weight
        if needs[2]:
            grad_bias[columns] = sum_bias
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def _two(hidden: Tensor, head: LMHead, ref_hidden: Tensor, ref_head: LMHead, dtype: torch.dtype) -> tuple[Tiles, Tiles]:
    """Of a model and its reference, of one size."""
    widest = max(hidden.shape[1], ref_hidden.shape[1])
    return Tiles(hidden, head, dtype, widest), Tiles(ref_hidden, ref_head, dtype, widest)


def kl(hidden: Tensor, head: LMHead, ref_hidden: Tensor, ref_head: LMHead) -> tuple[Tensor, Tensor, Tensor]:
    """The results of ``torch.ops.cwfast.lm_token_kl``."""
    return _divergence(hidden, head, ref_hidden, ref_head, lambda tile, ref_tile, rows, first: None)


def pair(
    hidden: Tensor, head: LMHead, ref_hidden: Tensor, ref_head: LMHead, targets: Tensor, topk: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """The results of ``lm_token_stats`` for both models and of ``lm_token_kl``, each logit made once."""
    targets = targets.contiguous()
    logits = [target_logits(h, own, targets) for h, own in ((hidden, head), (ref_hidden, ref_head))]
    kernel = _kernel("lm_stats_tile", logits[0].dtype)
    each = [no_parts(logit, len(head.weight), k) for logit, k in zip(logits, (topk, 0), strict=True)]

    def add(tile: tuple[object, ...], ref_tile: tuple[object, ...], rows: slice, first: int) -> None:
        for made, parts, logit, k in zip((tile, ref_tile), each, logits, (topk, 0), strict=True):
            final = (*made[:4], 0, 1.0, 0.0)  # bias, scale and softcap are in it already
            kernel(final, first, *(x[rows].data_ptr() for x in (targets, logit, *parts)), k)

    divergence = _divergence(hidden, head, ref_hidden, ref_head, add)[0]
    stats, ref_stats = (finish(parts, logit, targets) for parts, logit in zip(each, logits, strict=True))
    return stats, ref_stats, divergence


def _divergence(
    hidden: Tensor,
    head: LMHead,
    ref_hidden: Tensor,
    ref_head: LMHead,
    then: Callable[[tuple[object, ...], tuple[object, ...], slice, int], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``kl``; ``then`` gets each pair of tiles, whose logits are final, their rows and the first of their tokens."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    kernel = _kernel("lm_kl_tile", dtype)
    found = torch.zeros((5, len(hidden)), dtype=torch.float64)  # as in LmDivergence
    found[[0, 2]] = -torch.inf
    tiles, ref_tiles = _two(hidden, head, ref_hidden, ref_head, dtype)
    for rows in pieces(len(hidden), tiles.rows):
        h, r = tiles.hidden_of(rows), ref_tiles.hidden_of(rows)
        mine = [sums[rows].data_ptr() for sums in found]
        for columns in pieces(len(head.weight), tiles.columns):
            _, tile = tiles.product(h, tiles.weight_of(columns), columns)
            _, ref_tile = ref_tiles.product(r, ref_tiles.weight_of(columns), columns)
            kernel(tile, ref_tile, *mine)
            then(tile, ref_tile, rows, columns.start)
    peak, total, ref_peak, ref_total, gap = found
    logsumexp, ref_logsumexp = peak + total.log(), ref_peak + ref_total.log()
    divergence = gap / ref_total + (total.log() - ref_total.log())
    good = logsumexp.isfinite() & ref_logsumexp.isfinite()
    result = torch.where(good, divergence.clamp(min=0), torch.nan).to(dtype)
    sums, ref_sums = (split(torch.where(good, x, torch.nan), dtype) for x in (logsumexp, ref_logsumexp))
    return result, sums, ref_sums


def kl_backward(
    grad: Tensor,
    sums: Tensor,
    ref_sums: Tensor,
    hidden: Tensor,
    head: LMHead,
    ref_hidden: Tensor,
    ref_head: LMHead,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The results of ``torch.ops.cwfast.lm_token_kl_backward``."""
    kernel, grad = _kernel("lm_kl_grad_tile", sums.dtype), grad.to(sums.dtype).contiguous()
    tiles, ref_tiles = _two(hidden, head, ref_hidden, ref_head, sums.dtype)

    def to_gradient(tile: tuple[object, ...], rows: slice, columns: slice) -> None:
        _, ref_tile = ref_tiles.product(ref_tiles.hidden_of(rows), ref_tiles.weight_of(columns), columns)
        kernel(tile, sums[rows].data_ptr(), ref_tile, ref_sums[rows].data_ptr(), grad[rows].data_ptr())

    return _backward(tiles, needs, to_gradient)
