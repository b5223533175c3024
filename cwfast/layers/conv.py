"""Convolutions: the weight's gradient is computed a few samples at a time, in bounded memory."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cwfast import _backends
from cwfast.layers import Tracker, register
from cwfast.layers.broadcast import reduced
from cwfast.layers.pieces import Computed, PerSample, Piece
from cwfast.layers.samples import Layout
from cwfast.layers.scored import scored
from cwfast.layers.windows import Windows

_backward = torch.ops.aten.convolution_backward.default


# Entries of the samples' gradients that are computed at once, 5 MB. Of twice as many, malloc gives the memory back
# after each call, and the new pages take as long as the products.
CHUNK = 5 << 18
SMALL = 1 << 12  # entries of a weight whose gradient takes less time than a call
LARGE = 1 << 20  # entries of a weight of which two 16-bit gradients at once take too much memory


def _of_weight(
    arguments: tuple[Any, ...], pad: Sequence[int], layout: Layout, x: Tensor, grad: Tensor, weight: Tensor
) -> Piece:
    dtype = torch.promote_types(x.dtype, grad.dtype)
    images, grads = layout.images(functional.pad(x, pad) if any(pad) else x), layout.images(grad)
    *arguments_of_all, groups = arguments
    shape = weight.shape

    def backward(a: Tensor, d: Tensor, samples: int) -> Tensor:
        """The gradient of ``samples`` weights, each in groups of its own."""
        # Its shape is all that is read. An expanded entry would be made contiguous: written, and in memory.
        weights = torch.empty((samples * shape[0], *shape[1:]), dtype=dtype, device=weight.device)
        mask = (False, True, False)
        found: Tensor = _backward(d.to(dtype), a.to(dtype), weights, None, *arguments_of_all, samples * groups, mask)[1]
        return found

    def compute(begin: int, end: int) -> Tensor:
        a, d = (t[begin:end].transpose(0, 1).flatten(1, 2) for t in (images, grads))  # [n, samples C, ...]
        return backward(a, d, end - begin).unflatten(0, (end - begin, -1))

    def together() -> Tensor:
        return backward(images.flatten(0, 1), grads.flatten(0, 1), 1)

    stride, padding, dilation, transposed, _ = arguments_of_all
    seen, given = (grads, images) if transposed else (images, grads)  # what the windows are of, and what of them
    positions = given.shape[1] * given.shape[3:].numel()
    faster = 2 if dtype.itemsize == 2 else 1  # oneDNN's products of 16 bits; ours are of 32
    if groups == 1 and faster * positions < len(weight) and _has_vectors(weight):  # Windows says why
        return Windows(seen, given, shape[2:], (stride, padding, dilation), compute, together)
    return Computed(layout.samples, compute, together, _samples_at_once(weight, dtype, groups))


def _has_vectors(weight: Tensor) -> bool:
    """Whether our own products are about as fast as oneDNN's: on the CPU, unless the portable kernel runs."""
    module = _backends.extension()
    return weight.device.type == "cpu" and not isinstance(module, str) and module.isa() != "scalar"


def _samples_at_once(weight: Tensor, dtype: torch.dtype, groups: int) -> int:
    """Samples become groups of one convolution: they share a call's overhead, and the threads share them.

    For groups of channels that do not fill vectors oneDNN has no fast kernels in 32 bits: 3 -> 64 channels, 7 x 7, take
    twice the time of one sample at a time. In 16 bits it needs two samples or more for its fast kernels, which are
    worth it up to LARGE. Elsewhere than on the CPU many groups are slow.
    """
    if weight.device.type != "cpu":
        return 1
    if dtype.itemsize > 2 and weight.numel() > SMALL and (weight.shape[1] % 8 or len(weight) // groups % 8):
        return 1
    at_once = CHUNK // max(1, weight.numel())
    if at_once > (threads := torch.get_num_threads()):
        at_once -= at_once % threads  # each gets whole groups: of 3, one of two threads would get 2
    return max(at_once, 1 if dtype.itemsize > 2 or weight.numel() > LARGE else 2)


def _of_bias(layout: Layout, x: Tensor, grad: Tensor, bias: Tensor) -> Piece:
    found = reduced(layout, grad, torch.Size([len(bias), *[1] * (grad.ndim - 2)])).gradients
    return PerSample(found.flatten(1))


def _scored(
    tracker: Tracker,
    function: Callable[..., Tensor],
    tensors: tuple[Tensor, Tensor, Tensor | None],
    arguments: tuple[Any, ...],
    pad: Sequence[int] = (),
) -> Tensor:
    input, weight, bias = tensors

    def input_gradient(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padded = functional.pad(x, pad) if any(pad) else x
        found: Tensor = _backward(
            grad, padded.to(grad.dtype), weight.to(grad.dtype), None, *arguments, (True, False, False)
        )[0]
        for dim in range(len(pad) // 2):
            found = found.narrow(-1 - dim, pad[2 * dim], x.shape[-1 - dim])
        return found

    of_weight = functools.partial(_of_weight, arguments, pad)
    return scored(tracker, function, input, (weight, bias), (of_weight, _of_bias), input_gradient=input_gradient)


def _each(value: int | Sequence[int], dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _conv(
    function: Callable[..., Tensor],
    dims: int,
    tracker: Tracker,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Any:
    """Scores conv1d to conv3d; other padding modes than zeros pad before the call."""
    if input.ndim != dims + 2:
        return NotImplemented  # a single sample without its dimension
    around: list[int] = [0] * dims
    pad: list[int] = []
    spread = _each(dilation, dims)
    if padding == "same":
        for size, step in zip(reversed(weight.shape[2:]), reversed(spread), strict=True):
            total = step * (size - 1)
            pad += [total // 2, total - total // 2]
    elif padding != "valid":
        around = _each(padding, dims)  # type: ignore[arg-type]
    arguments = (_each(stride, dims), around, spread, False, [0] * dims, groups)

    def run(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return function(x, w, b, stride, padding, dilation, groups)

    return _scored(tracker, run, (input, weight, bias), arguments, pad)


def _conv_transpose(
    function: Callable[..., Tensor],
    dims: int,
    tracker: Tracker,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Any:
    """Scores conv_transpose1d to conv_transpose3d."""
    if input.ndim != dims + 2:
        return NotImplemented
    lists = [_each(value, dims) for value in (stride, padding, dilation, output_padding)]
    arguments = (lists[0], lists[1], lists[2], True, lists[3], groups)

    def run(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return function(x, w, b, stride, padding, output_padding, groups, dilation)

    return _scored(tracker, run, (input, weight, bias), arguments)


for _dims in (1, 2, 3):
    for _rule, _name in ((_conv, f"conv{_dims}d"), (_conv_transpose, f"conv_transpose{_dims}d")):
        _function = getattr(functional, _name)
        register(_function)(functools.partial(_rule, _function, _dims))
