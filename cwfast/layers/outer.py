"""Gradients that are sums over the rows of two tensors: of linear layers, and of embeddings."""

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from cwfast import ops
from cwfast.layers.frozen import Frozen
from cwfast.layers.pieces import Piece, over
from cwfast.layers.samples import offsets_of


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

    def square_norms(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, frozen: Frozen | None = None
    ) -> Tensor:
        exclude = None if frozen is None else frozen.indices
        a, d = self.inputs.to(dtype), self.grad_outputs.to(dtype)
        return ops.per_sample_grad_norms(a, d, cu_seqlens=self.offsets, exclude=exclude).square_()


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

    def square_norms(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, frozen: Frozen | None = None
    ) -> Tensor:
        # One number for each row of the weight that each sample uses. narrowed() has marked some rows by -1.
        rows = shape[0] + 1
        pairs, place = (self.owner() * rows + self.inputs.reshape(-1) + 1).unique(return_inverse=True)
        used, owner = pairs % rows - 1, pairs // rows
        sums = torch.zeros((len(used), self.grad_outputs.shape[-1]), dtype=dtype, device=device)
        sums.index_add_(0, place, self.grad_outputs.flatten(0, -2).to(dtype))
        if frozen is not None:
            sums[frozen.among(used, sums.shape[1])] = 0
        squares = sums.square_().sum(dim=1)
        if self.padding_idx is not None:
            squares *= used != self.padding_idx
        return torch.zeros(self.samples, dtype=dtype, device=device).index_add_(0, owner, squares)


def _add_rows(out: Tensor, indices: Tensor, grads: Tensor, padding_idx: int | None) -> None:
    if padding_idx is not None:
        kept = indices != padding_idx
        indices, grads = indices[kept], grads[kept]
    _as_rows(out).index_add_(0, indices, grads.to(out.dtype))


def _as_rows(weight: Tensor) -> Tensor:
    return weight if weight.ndim == 2 else weight.view(len(weight), math.prod(weight.shape[1:]))
