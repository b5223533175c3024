"""``y = W[indices]``: per sample, the gradients of a token's places sum in its row."""

from typing import Any

from torch import Tensor
from torch.nn import functional

from cwfast.errors import UnsupportedLayer
from cwfast.layers import Tracker, register
from cwfast.layers.outer import Lookup
from cwfast.layers.pieces import Piece
from cwfast.layers.samples import Layout
from cwfast.layers.scored import scored


@register(functional.embedding)
def embedding(
    tracker: Tracker,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Scores ``torch.nn.Embedding``. Indices without a dimension of samples (positions ``[T]``, ``[1, T]``) are looked
    up for every sample, so that the result has that dimension.
    """
    samples = tracker.batch_now.size
    if max_norm is not None or scale_grad_by_freq or sparse or samples is None:
        return NotImplemented
    padding_row = None if padding_idx is None or padding_idx < 0 else padding_idx
    if padding_idx is not None and padding_idx < 0:
        padding_row = padding_idx + len(weight)

    def gradient(layout: Layout, x: Tensor, grad: Tensor, weight: Tensor) -> Piece:
        (indices, offsets), (grads, _) = layout.by_sample(x[..., None]), layout.by_sample(grad)
        return Lookup(indices, grads, offsets, padding_row)

    def run(x: Tensor, w: Tensor) -> Tensor:
        return functional.embedding(x, w, padding_idx)

    indices = _with_samples(tracker, input, samples)
    if indices is input and tracker.batch_now.cu_seqlens is None:
        name = tracker.shared(input, tracker.dim)
        if name is not None:
            raise UnsupportedLayer(
                f"an embedding's indices must belong to the samples; got {name!r} of the model (shape "
                f"{tuple(input.shape)}), which all of them share. Give it as [1, T] or expand it to one for each sample"
            )
    return scored(tracker, run, indices, (weight,), (gradient,))


def _with_samples(tracker: Tracker, indices: Tensor, samples: int) -> Tensor:
    if tracker.batch_now.cu_seqlens is not None or tracker.dim:
        return indices
    if indices.ndim > 1 and len(indices) == 1 != samples:
        return indices.expand(samples, *indices.shape[1:])
    if indices.ndim != 1 or not _ascending(indices):
        return indices
    length = tracker.batch_now.length  # T of a model input [B, T, ...]: positions count its steps
    if length != len(indices):
        return indices
    if length == samples:
        raise ValueError(
            f"indices [0, 1, ..., {length - 1}] may be positions or one for each of the {samples} samples, and must "
            "be told apart: give positions as [1, T], or use another batch size"
        )
    return indices.expand(samples, -1)


def _ascending(indices: Tensor) -> bool:
    return len(indices) > 1 and bool((indices.diff() == 1).all())
