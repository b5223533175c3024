"""One use's gradient of a weight, sample by sample, in the form in which it costs least."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

from cwfast import ops
from cwfast.layers.samples import offsets_of

TILE = 1 << 20  # entries of the buffer in which a sample's uses of a weight of several kinds are summed


class Piece:
    """The base of all forms: what can add one sample's gradient to a tensor can be scored, summed and measured.

    ``samples`` B; ``add_to(out, b)`` adds sample b's gradient; ``scaled(c)`` multiplies sample b's by ``c[b]``.
    """

    samples: int

    def add_to(self, out: Tensor, sample: int) -> None:
        raise NotImplementedError

    def scaled(self, coefficients: Tensor) -> "Piece":
        raise NotImplementedError

    def narrowed(self, begin: int, end: int) -> "Piece | None":
        """The gradient of the rows ``begin`` to ``end`` of the weight; None where it cannot be had alone."""
        return None

    def total(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The gradient of all samples together."""
        out = torch.zeros(shape, dtype=dtype, device=device)
        for sample in range(self.samples):
            self.add_to(out, sample)
        return out

    def accumulate_(
        self, out: Tensor, power: int, factor: Tensor | None, scale: float, grad: Tensor | None, backend: str
    ) -> None:
        """``out += sum_b |scale factor G_b|**power``; ``grad = sum_b G_b``, whatever it holds.

        One sample at a time in one buffer.
        """
        if grad is not None:
            grad.zero_()
        buffer = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        for sample in range(self.samples):
            self.add_to(buffer.zero_(), sample)
            if grad is not None:
                grad += buffer
            if factor is not None:
                buffer *= factor
            out.add_(buffer.abs_() if power == 1 else buffer.square_(), alpha=abs(scale) ** power)

    def square_norms(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """``|G_b|^2`` of every sample, ``[B]``."""
        buffer = torch.empty(shape, dtype=dtype, device=device)
        norms = torch.zeros(self.samples, dtype=dtype, device=device)
        for sample in range(self.samples):
            self.add_to(buffer.zero_(), sample)
            norms[sample] = buffer.square().sum()
        return norms


class _Rows(Piece):
    """A form whose sample b is its rows of two tensors ``[B, T, F]``, ``[B, F]``, or ``[R, F]`` with offsets."""

    def __init__(self, inputs: Tensor, grad_outputs: Tensor, offsets: Tensor | None = None) -> None:
        self.inputs, self.grad_outputs, self.offsets = inputs, grad_outputs, offsets
        self.samples = len(inputs) if offsets is None else len(offsets) - 1

    def rows_of(self, sample: int) -> tuple[Tensor, Tensor]:
        if self.offsets is not None:
            rows = slice(int(self.offsets[sample]), int(self.offsets[sample + 1]))
            return self.inputs[rows], self.grad_outputs[rows]
        inputs, grads = self.inputs[sample], self.grad_outputs[sample]
        return (inputs[None], grads[None]) if inputs.ndim == 1 else (inputs, grads)

    def scaled(self, coefficients: Tensor) -> Self:
        c = coefficients.to(self.grad_outputs)
        if self.offsets is not None:
            c = torch.repeat_interleave(c, self.offsets.diff().to(c.device))
        return self.like(self.inputs, self.grad_outputs * over(c, self.grad_outputs), self.offsets)

    def like(self, inputs: Tensor, grad_outputs: Tensor, offsets: Tensor | None) -> Self:
        """The same form of other rows."""
        return type(self)(inputs, grad_outputs, offsets)

    def owner(self) -> Tensor:
        """``[rows]``: the sample of each row."""
        samples = torch.arange(self.samples, device=self.inputs.device)
        if self.offsets is not None:
            return torch.repeat_interleave(samples, self.offsets.diff().to(samples.device))
        return samples.repeat_interleave(self.inputs.shape[1] if self.inputs.ndim == 3 else 1)

    def joined(self, others: Sequence[Self]) -> Self:
        """The same samples' rows follow one another, so that their gradients sum."""
        pieces = [self, *others]
        tensors = ([piece.inputs for piece in pieces], [piece.grad_outputs for piece in pieces])
        if all(piece.offsets is None for piece in pieces):
            inputs, grads = (torch.cat([x if x.ndim == 3 else x[:, None] for x in xs], dim=1) for xs in tensors)
            return self.like(inputs, grads, None)
        owner = torch.cat([piece.owner() for piece in pieces])
        order = owner.argsort(stable=True)
        inputs, grads = (torch.cat([x.flatten(0, -2) for x in xs])[order] for xs in tensors)
        return self.like(inputs, grads, offsets_of(owner, self.samples))


class Outer(_Rows):
    """``G_b = sum_t grad_outputs[b,t] x inputs[b,t]``: linear layers."""

    def __init__(self, inputs: Tensor, grad_outputs: Tensor, offsets: Tensor | None = None) -> None:
        dtype = torch.promote_types(inputs.dtype, grad_outputs.dtype)
        super().__init__(inputs.to(dtype), grad_outputs.to(dtype), offsets)

    def narrowed(self, begin: int, end: int) -> "Outer":
        return Outer(self.inputs, self.grad_outputs[..., begin:end], self.offsets)

    def add_to(self, out: Tensor, sample: int) -> None:
        inputs, grad_outputs = self.rows_of(sample)
        out.addmm_(grad_outputs.T.to(out.dtype), inputs.to(out.dtype))

    def total(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        a, d = (x.flatten(0, -2).to(dtype) for x in (self.inputs, self.grad_outputs))
        return d.T @ a

    def accumulate_(
        self, out: Tensor, power: int, factor: Tensor | None, scale: float, grad: Tensor | None, backend: str
    ) -> None:
        if not out.is_contiguous() and out.T.is_contiguous():  # the weight of y = x W, or a transposed view
            turned = Outer(self.grad_outputs, self.inputs, self.offsets)
            factor, grad = (None if x is None else x.T for x in (factor, grad))
            turned.accumulate_(out.T, power, factor, scale, grad, backend)
            return
        if not out.is_contiguous() or (grad is not None and not grad.is_contiguous()):
            super().accumulate_(out, power, factor, scale, grad, backend)
            return
        inputs, grad_outputs = self.inputs, self.grad_outputs
        if out.dtype != torch.float64:  # float64 products of a float32 weight are not worth a second buffer
            inputs, grad_outputs = (x.float() if x.dtype == torch.float64 else x for x in (inputs, grad_outputs))
        elif inputs.dtype != torch.float64:
            inputs, grad_outputs = inputs.double(), grad_outputs.double()
        ops.accumulate_saliency_(
            out,
            inputs,
            grad_outputs,
            power=power,
            factor=factor,
            cu_seqlens=self.offsets,
            grad=grad,
            overwrite_grad=True,
            scale=scale,
            backend=backend,
        )

    def square_norms(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return ops.per_sample_grad_norms(
            self.inputs.to(dtype), self.grad_outputs.to(dtype), cu_seqlens=self.offsets
        ).square_()


class PerSample(Piece):
    """The samples' gradients themselves, ``[B, *shape]``: biases, norms, broadcast parameters. No larger than what the
    layer computed from them."""

    def __init__(self, gradients: Tensor) -> None:
        self.gradients, self.samples = gradients, len(gradients)

    def add_to(self, out: Tensor, sample: int) -> None:
        out += self.gradients[sample]

    def scaled(self, coefficients: Tensor) -> "PerSample":
        return PerSample(self.gradients * over(coefficients, self.gradients))

    def total(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.gradients.sum(dim=0, dtype=dtype)

    def accumulate_(
        self, out: Tensor, power: int, factor: Tensor | None, scale: float, grad: Tensor | None, backend: str
    ) -> None:
        if self.gradients.shape[1:] != out.shape:
            raise ValueError(
                f"a sample's gradient must have the shape {tuple(out.shape)} of the weight; "
                f"got {tuple(self.gradients.shape[1:])}"
            )
        g = self.gradients.to(out.dtype)
        if grad is not None:
            torch.sum(g, dim=0, out=grad)
        total = (g.abs() if power == 1 else g.square()).sum(dim=0)
        if factor is not None:
            total *= magnitude(factor, out.dtype, power)
        out.add_(total, alpha=abs(scale) ** power)

    def square_norms(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.gradients.to(dtype).square().reshape(self.samples, -1).sum(dim=1)


class Lookup(_Rows):
    """``G_b[v] = sum of grad_outputs[b,t] over the t with inputs[b,t] = v``: embeddings.

    ``inputs`` are the int64 indices, with a last dimension of 1; the row ``padding_idx`` gets no gradient. The row of
    a contiguous weight of more dimensions (a stack of experts) is ``w[i]``, flattened.
    """

    def __init__(
        self, inputs: Tensor, grad_outputs: Tensor, offsets: Tensor | None = None, padding_idx: int | None = None
    ) -> None:
        super().__init__(inputs, grad_outputs, offsets)
        self.padding_idx = padding_idx

    def like(self, inputs: Tensor, grad_outputs: Tensor, offsets: Tensor | None) -> "Lookup":
        return Lookup(inputs, grad_outputs, offsets, self.padding_idx)

    def narrowed(self, begin: int, end: int) -> "Lookup":
        inside = (self.inputs >= begin) & (self.inputs < end)
        if self.padding_idx is not None:
            inside &= self.inputs != self.padding_idx
        return Lookup(torch.where(inside, self.inputs - begin, -1), self.grad_outputs, self.offsets, -1)

    def add_to(self, out: Tensor, sample: int) -> None:
        indices, grads = self.rows_of(sample)
        _add_rows(out, indices[:, 0], grads, self.padding_idx)

    def total(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        out = torch.zeros(shape, dtype=dtype, device=device)
        _add_rows(out, self.inputs.reshape(-1), self.grad_outputs.flatten(0, -2), self.padding_idx)
        return out

    def accumulate_(
        self, out: Tensor, power: int, factor: Tensor | None, scale: float, grad: Tensor | None, backend: str
    ) -> None:
        ops.accumulate_embedding_saliency_(
            _as_rows(out),
            self.inputs[..., 0],
            self.grad_outputs,
            power=power,
            factor=None if factor is None else _as_rows(factor),
            padding_idx=self.padding_idx,
            cu_seqlens=self.offsets,
            grad=None if grad is None else _as_rows(grad),
            overwrite_grad=True,
            scale=scale,
            backend=backend,
        )

    def square_norms(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        norms = torch.zeros(self.samples, dtype=dtype, device=device)
        for sample in range(self.samples):
            indices, grads = self.rows_of(sample)
            used, place = indices[:, 0].unique(return_inverse=True)
            sums = torch.zeros((len(used), grads.shape[-1]), dtype=dtype, device=device)
            sums.index_add_(0, place, grads.to(dtype))
            norms[sample] = (
                sums.square().sum(dim=1) * (used != (-1 if self.padding_idx is None else self.padding_idx))
            ).sum()
        return norms


class Computed(Piece):
    """A gradient that is computed a few samples at a time, so that no ``[B, *shape]`` exists.

    Memory of ``accumulate_`` beside scores and gradient: one chunk as ``compute`` gives it, and what that needs to run;
    a chunk's sum; one sample's gradient in the dtype of the scores where that is another; with a factor, the sums that
    wait for it.

    Args:
        samples: B.
        compute: ``compute(begin, end) -> [end - begin, *shape]``, the gradients of these samples, a new tensor.
        together: ``() -> [*shape]``, the gradient of all samples.
        chunk: how many samples ``compute`` takes at most.
    """

    def __init__(
        self,
        samples: int,
        compute: Callable[[int, int], Tensor],
        together: Callable[[], Tensor],
        chunk: int = 1,
    ) -> None:
        self.samples, self.compute, self.together, self.chunk = samples, compute, together, chunk
        self.coefficients: Tensor | None = None

    def _chunks(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """The first sample of each chunk, and the gradients of its samples; one sample's where they are converted.

        The caller lets go of them before it asks for more: two chunks are not to be in memory at once.
        """
        for begin in range(0, self.samples, self.chunk):
            gradients = self.compute(begin, min(begin + self.chunk, self.samples))
            step = len(gradients) if gradients.dtype == dtype else 1
            for k in range(0, len(gradients), step):
                part = gradients[k : k + step].to(dtype)
                if self.coefficients is not None:
                    part *= over(self.coefficients[begin + k : begin + k + step], part)
                yield begin + k, part
                del part
            del gradients

    def add_to(self, out: Tensor, sample: int) -> None:
        one = self.compute(sample, sample + 1)[0]
        out.add_(one, alpha=1 if self.coefficients is None else float(self.coefficients[sample]))

    def scaled(self, coefficients: Tensor) -> Self:
        piece = copy.copy(self)
        piece.coefficients = coefficients if self.coefficients is None else coefficients * self.coefficients
        return piece

    def total(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.coefficients is not None:
            return super().total(shape, dtype, device)
        return self.together().to(dtype)

    def accumulate_(
        self, out: Tensor, power: int, factor: Tensor | None, scale: float, grad: Tensor | None, backend: str
    ) -> None:
        if grad is not None:
            grad.zero_()
        total = out if factor is None else torch.zeros(out.shape, dtype=out.dtype, device=out.device)
        for _, gradients in self._chunks(out.dtype):
            if grad is not None:
                grad += _summed(gradients)
            gradients = gradients.abs_() if power == 1 else gradients.square_()
            total.add_(_summed(gradients), alpha=abs(scale) ** power)
            del gradients
        if factor is not None:
            for _ in range(power):  # in place: no magnitude of the factor in memory
                total *= factor
            out += total.abs_()

    def square_norms(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        norms = torch.zeros(self.samples, dtype=dtype, device=device)
        for begin, gradients in self._chunks(dtype):
            norms[begin : begin + len(gradients)] = gradients.square_().flatten(1).sum(dim=1)
            del gradients
        return norms


class Mixed(Piece):
    """Several pieces of one weight, each at its place ``(shape, strides, offset)`` in it."""

    def __init__(self, placed: Sequence[tuple["Place", Piece]]) -> None:
        self.placed = placed
        self.samples = placed[0][1].samples

    def add_to(self, out: Tensor, sample: int) -> None:
        for place, piece in self.placed:
            piece.add_to(place.of(out), sample)

    def accumulate_(
        self, out: Tensor, power: int, factor: Tensor | None, scale: float, grad: Tensor | None, backend: str
    ) -> None:
        rows = max(1, TILE * len(out) // max(1, out.numel())) if out.ndim else 1
        whole = Place.whole(out.shape).key
        tiles = [(begin, min(begin + rows, len(out))) for begin in range(0, len(out), rows)] if out.ndim else []
        if len(tiles) < 2 or any(place.key != whole for place, _ in self.placed):
            super().accumulate_(out, power, factor, scale, grad, backend)
            return
        for begin, end in tiles:
            parts = [piece.narrowed(begin, end) for _, piece in self.placed]
            if any(part is None for part in parts):
                super().accumulate_(out, power, factor, scale, grad, backend)
                return
            place = Place.whole((end - begin, *out.shape[1:]))
            tile = Mixed([(place, part) for part in parts if part is not None])
            f, g = (None if x is None else x[begin:end] for x in (factor, grad))
            Piece.accumulate_(tile, out[begin:end], power, f, scale, g, backend)

    def scaled(self, coefficients: Tensor) -> "Mixed":
        return Mixed([(place, piece.scaled(coefficients)) for place, piece in self.placed])


class Place:
    """Where a view lies in a contiguous weight."""

    __slots__ = ("offset", "shape", "strides")

    def __init__(self, shape: Sequence[int], strides: Sequence[int], offset: int) -> None:
        self.shape, self.strides, self.offset = tuple(shape), tuple(strides), offset

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Place":
        """All of a contiguous tensor of this shape."""
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= size
        return cls(shape, strides[::-1], 0)

    @property
    def key(self) -> tuple[object, ...]:
        return self.shape, self.strides, self.offset

    def of(self, weight: Tensor) -> Tensor:
        """The view of ``weight`` or of a contiguous tensor shaped like it."""
        return weight.as_strided(self.shape, self.strides, weight.storage_offset() + self.offset)

    @property
    def extent(self) -> tuple[int, int]:
        """The half-open interval of entries that it touches."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.offset, self.offset + last + 1 if 0 not in self.shape else self.offset


def merged(placed: Sequence[tuple[Place, Piece]]) -> list[tuple[Place | None, Piece]]:
    """The same gradients as pieces that touch no entry in common; place None: the whole weight, in its own shape."""
    if len(placed) == 1:
        return [*placed]
    groups: dict[tuple[object, ...], tuple[Place, list[Piece]]] = {}
    for place, piece in placed:
        groups.setdefault(place.key, (place, []))[1].append(piece)
    ordered = sorted(groups.values(), key=lambda group: group[0].extent)
    apart = all(a.extent[1] <= b.extent[0] for (a, _), (b, _) in itertools.pairwise(ordered))
    together = [(place, _joined(pieces)) for place, pieces in ordered] if apart else []
    found: list[tuple[Place | None, Piece]] = [(place, piece) for place, piece in together if piece is not None]
    return found if apart and len(found) == len(together) else [(None, Mixed(placed))]


def _joined(pieces: list[Piece]) -> Piece | None:
    """One piece whose per-sample gradients are the sums of these; None where no form holds them all."""
    if len(pieces) == 1:
        return pieces[0]
    outer = [piece for piece in pieces if isinstance(piece, Outer)]
    if len(outer) == len(pieces):
        return outer[0].joined(outer[1:])
    direct = [piece.gradients for piece in pieces if isinstance(piece, PerSample)]
    if len(direct) == len(pieces):
        return PerSample(torch.stack(direct).sum(dim=0))
    lookups = [piece for piece in pieces if isinstance(piece, Lookup)]
    if len(lookups) == len(pieces) and len({piece.padding_idx for piece in lookups}) == 1:
        return lookups[0].joined(lookups[1:])
    return None


def _add_rows(out: Tensor, indices: Tensor, grads: Tensor, padding_idx: int | None) -> None:
    if padding_idx is not None:
        kept = indices != padding_idx
        indices, grads = indices[kept], grads[kept]
    _as_rows(out).index_add_(0, indices, grads.to(out.dtype))


def _summed(gradients: Tensor) -> Tensor:
    return gradients[0] if len(gradients) == 1 else gradients.sum(dim=0)


def _as_rows(weight: Tensor) -> Tensor:
    return weight if weight.ndim == 2 else weight.view(len(weight), math.prod(weight.shape[1:]))


def magnitude(factor: Tensor, dtype: torch.dtype, power: int) -> Tensor:
    """``|factor|**power``."""
    factor = factor.to(dtype)
    return factor.abs() if power == 1 else factor.square()


def over(coefficients: Tensor, x: Tensor) -> Tensor:
    """The samples' coefficients, in the form that multiplies ``x [B, ...]``."""
    return coefficients.to(x).view(-1, *[1] * (x.ndim - 1))
