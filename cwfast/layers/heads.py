"""``log p`` and KL per token of a language model's head: per sample, the head's gradient is summed tile by tile.

A sample's gradient is a sum of outer products of its hidden states with what the loss says of each logit. These are
computed for some tokens of the vocabulary at a time: logits never exist, here as in ``cwfast.ops.lm_token_stats``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from cwfast import ops
from cwfast.layers import Tracker, register
from cwfast.layers.outer import Outer
from cwfast.layers.pieces import Piece
from cwfast.layers.samples import Layout, offsets_of
from cwfast.layers.scored import scored
from cwfast.reference import LMHead, lm_logits

TILE = 4 << 20  # entries of what the loss says of logits, at a time: 16 MB, and as much for each step to it

Logits = Callable[[Tensor, int, int], Tensor]  # (places of rows, begin, end) -> [rows, end - begin]


def head_logprob(hidden: Tensor, head: LMHead, targets: Tensor, owner: Tensor, backend: str = "auto") -> Tensor:
    """``lm_token_stats(...).logprob``, which is scored where the head is.

    Args:
        hidden: ``[N, d]``.
        head: its weight and bias are parameters, or computed from some.
        targets: ``[N]`` int64.
        owner: ``[N]`` int64, the sample of each row.
        backend: of the op.
    """
    given = (hidden, head.weight, head.bias)
    if has_torch_function(given):
        return handle_torch_function(head_logprob, given, hidden, head, targets, owner, backend)
    weight, bias, softcap, scale = head
    return ops.lm_token_stats(hidden, weight, targets, bias=bias, softcap=softcap, scale=scale, backend=backend).logprob


def head_kl(
    hidden: Tensor, head: LMHead, ref_hidden: Tensor, ref_head: LMHead, owner: Tensor, backend: str = "auto"
) -> Tensor:
    """``lm_token_kl(...)``, which is scored where the head is; the reference is a constant.

    Args:
        hidden: ``[N, d]``.
        head: as for ``head_logprob``.
        ref_hidden: ``[N, e]``.
        ref_head: of the reference, with the same soft-cap and scale.
        owner: ``[N]`` int64, the sample of each row.
        backend: of the op.
    """
    given = (hidden, head.weight, head.bias)
    if has_torch_function(given):
        return handle_torch_function(head_kl, given, hidden, head, ref_hidden, ref_head, owner, backend)
    weight, bias, softcap, scale = head
    reference = (ref_hidden, ref_head.weight)
    more: dict[str, Any] = {"bias": bias, "ref_bias": ref_head.bias, "softcap": softcap, "scale": scale}
    return ops.lm_token_kl(hidden, weight, *reference, **more, backend=backend)


class HeadRows(Piece):
    """``G_b = sum of logits(t) x inputs[t] over the rows t of sample b``, with the logits' gradients computed in tiles.

    Args:
        inputs: ``[N, d]`` hidden states, by sample; ones ``[N, 1]`` for the bias.
        logits: computes the gradients at logits.
        offsets: ``[B + 1]`` of the samples' rows.
        span: the tokens that this is the gradient of.
        coefficients: ``[N]`` that multiply them, or None.
    """

    def __init__(
        self, inputs: Tensor, logits: Logits, offsets: Tensor, span: tuple[int, int], coefficients: Tensor | None = None
    ) -> None:
        self.inputs, self.logits, self.offsets, self.span = inputs, logits, offsets, span
        self.coefficients = coefficients
        self.samples = len(offsets) - 1

    def narrowed(self, begin: int, end: int) -> "HeadRows":
        first = self.span[0]
        return HeadRows(self.inputs, self.logits, self.offsets, (first + begin, first + end), self.coefficients)

    def scaled(self, coefficients: Tensor) -> "HeadRows":
        c = torch.repeat_interleave(coefficients, self.offsets.diff().to(coefficients.device))
        c = c if self.coefficients is None else c * self.coefficients
        return HeadRows(self.inputs, self.logits, self.offsets, self.span, c)

    def add_to(self, out: Tensor, sample: int) -> None:
        begin, end = int(self.offsets[sample]), int(self.offsets[sample + 1])
        inputs, rows = self.inputs[begin:end].to(out.dtype), out.view(len(out), -1)
        for part, gradients in self._tiles(begin, end):
            rows[part].addmm_(gradients.T.to(out.dtype), inputs)

    def accumulate_(
        self, out: Tensor, power: int, factor: Tensor | None, scale: float, grad: Tensor | None, backend: str
    ) -> None:
        views = [None if x is None else x.view(len(x), -1) for x in (out, factor, grad)]
        for part, gradients in self._tiles(0, len(self.inputs)):
            into, by, total = (None if x is None else x[part] for x in views)
            assert into is not None
            Outer(self.inputs, gradients, self.offsets).accumulate_(into, power, by, scale, total, backend)

    def _tiles(self, begin: int, end: int) -> Iterator[tuple[slice, Tensor]]:
        """The gradients at some logits of the rows, and which rows of the weight they are for."""
        first, last = self.span
        size = max(1, TILE // max(1, end - begin))
        for low in range(first, last, size):
            high = min(low + size, last)
            gradients = self.logits(torch.arange(begin, end, device=self.inputs.device), low, high)
            if self.coefficients is not None:
                gradients = gradients * self.coefficients[begin:end, None].to(gradients)
            yield slice(low - first, high - first), gradients


@register(head_logprob)
def _logprob(
    tracker: Tracker, hidden: Tensor, head: LMHead, targets: Tensor, owner: Tensor, backend: str = "auto"
) -> Any:
    """Scores ``head_logprob``."""
    sums: list[Tensor] = []

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = torch.ops.cwfast.lm_token_stats(x, weight, targets, bias, head.softcap, head.scale, 0, backend)
        sums[:] = [found[9]]
        return found[0]

    def at_input(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        options = (bias, head.softcap, head.scale, [True, False, False], backend)
        return torch.ops.cwfast.lm_logprob_backward(grad, sums[0], x, weight, targets, *options)[0]

    def gradients(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None) -> Logits:
        def at_logits(rows: Tensor, low: int, high: int) -> Tensor:
            z = _tile(x[rows], weight, bias, head, low, high)
            p = _probabilities(z, sums[0][rows])
            hit = torch.arange(low, high, device=z.device) == targets[rows, None]
            return grad[rows, None].to(z) * (hit.to(z) - p) * _slope(z, head)

        return at_logits

    return _scored(tracker, run, at_input, gradients, hidden, head, owner)


@register(head_kl)
def _kl(
    tracker: Tracker,
    hidden: Tensor,
    head: LMHead,
    ref_hidden: Tensor,
    ref_head: LMHead,
    owner: Tensor,
    backend: str = "auto",
) -> Any:
    """Scores ``head_kl``."""
    sums: list[Tensor] = []

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given = (x, weight, ref_hidden, ref_head.weight, bias, ref_head.bias, head.softcap, head.scale, backend)
        found = torch.ops.cwfast.lm_token_kl(*given)
        sums[:] = found[1:]
        return found[0]

    def at_input(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given = (grad, *sums, x, weight, ref_hidden, ref_head.weight, bias, ref_head.bias, head.softcap, head.scale)
        return torch.ops.cwfast.lm_token_kl_backward(*given, [True, False, False], backend)[0]

    def gradients(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None) -> Logits:
        def at_logits(rows: Tensor, low: int, high: int) -> Tensor:
            z = _tile(x[rows], weight, bias, head, low, high)
            p = _probabilities(z, sums[0][rows])
            ref = _tile(ref_hidden[rows], ref_head.weight, ref_head.bias, ref_head, low, high)
            return grad[rows, None].to(z) * (p - _probabilities(ref, sums[1][rows])) * _slope(z, head)

        return at_logits

    return _scored(tracker, run, at_input, gradients, hidden, head, owner)


def _scored(
    tracker: Tracker,
    run: Callable[..., Tensor],
    at_input: Callable[..., Tensor],
    gradients: Callable[..., Logits],
    hidden: Tensor,
    head: LMHead,
    owner: Tensor,
) -> Tensor:
    """``run`` of hidden states and the head's tensors, whose gradients are ``HeadRows``."""
    weight, bias = head.weight, head.bias
    samples = tracker.batch_now.size or 0

    def piece(inputs: Tensor, grad: Tensor) -> HeadRows:
        order = owner.argsort(stable=True)
        tiled = gradients(hidden.detach(), grad, weight.detach(), None if bias is None else bias.detach())
        offsets = offsets_of(owner, samples)
        return HeadRows(inputs[order], lambda rows, *span: tiled(order[rows], *span), offsets, (0, len(weight)))

    def of_weight(layout: Layout, x: Tensor, grad: Tensor, weight: Tensor) -> Piece:
        return piece(x, grad)

    def of_bias(layout: Layout, x: Tensor, grad: Tensor, weight: Tensor) -> Piece:
        return piece(x.new_ones(len(x), 1), grad)

    return scored(tracker, run, hidden, (weight, bias), (of_weight, of_bias), input_gradient=at_input, owner=owner)


def _tile(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: LMHead, low: int, high: int) -> Tensor:
    """The logits of the tokens ``low`` to ``high``."""
    part = LMHead(weight[low:high], None if bias is None else bias[low:high], head.softcap, head.scale)
    return lm_logits(hidden, part)


def _probabilities(z: Tensor, sums: Tensor) -> Tensor:
    """``exp(z - logsumexp)``, the latter in two parts."""
    return (z - sums[:, :1] - sums[:, 1:]).exp()


def _slope(z: Tensor, head: LMHead) -> Tensor | float:
    """``dz / d(W h + b)``."""
    return head.scale if head.softcap is None else head.scale * (1 - (z / head.softcap).square())
