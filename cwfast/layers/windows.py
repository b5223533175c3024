"""The gradient of a convolution's weight as sums of outer products over its windows: for weights of many entries."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cwfast import ops
from cwfast.layers.frozen import Frozen
from cwfast.layers.pieces import Computed, magnitude, over

TILE = 1 << 22  # entries of the windows, and of the sums, that are in memory at once; a sample's windows may be more


class Windows(Computed):
    """``G_b[o, :] = sum_t grad_outputs[b, o, t] window_t(inputs[b])``, a chunk of samples at a time.

    Unfolding writes C K entries for each of a sample's T windows; its gradient has as many for each of the O outputs,
    and has to be written, read and summed. Where T < O the windows are the smaller of the two, and their sums stay in
    registers.

    Args:
        inputs: ``[B, n, C, *spatial]``: n items of each sample.
        grad_outputs: ``[B, n, O, *positions]``.
        kernel: the size of a window in each spatial dimension.
        geometry: stride, padding and dilation of each.
        compute, together: as in Computed.
    """

    def __init__(
        self,
        inputs: Tensor,
        grad_outputs: Tensor,
        kernel: Sequence[int],
        geometry: tuple[Sequence[int], Sequence[int], Sequence[int]],
        compute: Callable[[int, int], Tensor],
        together: Callable[[], Tensor],
    ) -> None:
        super().__init__(len(inputs), compute, together)
        self.inputs, self.grad_outputs, self.kernel, self.geometry = inputs, grad_outputs, kernel, geometry
        self._columns = math.prod(kernel) * inputs.shape[2]

    def _rows(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each chunk, its first sample, the windows ``[b, T, K C]`` and the output gradients ``[b, T, O]``."""
        entries = self.grad_outputs.shape[1] * self.grad_outputs.shape[3:].numel() * self._columns
        chunk = max(1, TILE // max(1, entries))
        for begin in range(0, max(1, self.samples), chunk):  # without samples once: the gradient is to be zero
            part = slice(begin, begin + chunk)
            d = self.grad_outputs[part].to(dtype).flatten(3).transpose(2, 3)
            if self.coefficients is not None:
                d = d * over(self.coefficients[part], d)
            yield begin, self._windows(part, dtype), d.flatten(1, 2)

    def _windows(self, part: slice, dtype: torch.dtype) -> Tensor:
        x = self.inputs[part]
        stride, padding, dilation = self.geometry
        positions = self.grad_outputs.shape[3:]
        around = [size + 2 * pad for size, pad in zip(x.shape[3:], padding, strict=True)]
        # Channels last: a window is a few rows of them.
        padded = x.new_zeros((*x.shape[:2], *around, x.shape[2]), dtype=dtype)
        inner = padded
        for dim, (size, pad) in enumerate(zip(x.shape[3:], padding, strict=True), start=2):
            inner = inner.narrow(dim, pad, size)
        inner.copy_(x.movedim(2, -1))
        sample, item, *steps, _ = padded.stride()
        shape = (*x.shape[:2], *positions, *self.kernel, x.shape[2])
        strides = (
            *(sample, item),
            *(step * by for step, by in zip(steps, stride, strict=True)),
            *(step * by for step, by in zip(steps, dilation, strict=True)),
            1,
        )
        return padded.as_strided(shape, strides).reshape(len(x), x.shape[1] * positions.numel(), self._columns)

    def accumulate_(
        self, out: Tensor, power: int, factor: Tensor | None, scale: float, grad: Tensor | None, backend: str
    ) -> None:
        features, channels = out.shape[:2]
        step = max(1, TILE // max(1, self._columns))
        for top in range(0, features, step):
            rows = slice(top, min(top + step, features))
            total = torch.zeros((rows.stop - top, self._columns), dtype=out.dtype, device=out.device)
            sums = None if grad is None else torch.empty_like(total)
            for begin, windows, d in self._rows(out.dtype):
                ops.accumulate_saliency_(
                    total,
                    windows,
                    d[..., rows],
                    power=power,
                    grad=sums,
                    overwrite_grad=begin == 0,
                    scale=scale,
                    backend=backend,
                )
            found = self._as_weight(total, channels)
            if factor is None:
                out[rows] += found
            else:
                out[rows].addcmul_(found, magnitude(factor[rows], out.dtype, power))
            if grad is not None and sums is not None:
                grad[rows] = self._as_weight(sums, channels)

    def _as_weight(self, rows: Tensor, channels: int) -> Tensor:
        """``[O, K C]``, as windows lie in memory, to ``[O, C, *kernel]``."""
        return rows.view(len(rows), *self.kernel, channels).movedim(-1, 1)

    def square_norms(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, frozen: Frozen | None = None
    ) -> Tensor:
        norms = torch.zeros(self.samples, dtype=dtype, device=device)
        exclude = None if frozen is None else frozen.as_windows()
        for begin, windows, d in self._rows(dtype):
            norms[begin : begin + len(d)] = ops.per_sample_grad_norms(windows, d, exclude=exclude).square_()
        return norms
