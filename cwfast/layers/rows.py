"""Whose rows a layer gets: read off the autograd graph of its input."""

from typing import Any

import torch
from torch import Tensor

from cwfast._shards import is_sharded
from cwfast.errors import UnsupportedLayer


def owner_of(x: Tensor, samples: int) -> Tensor | None:
    """The sample of each row of a 2-D ``x`` whose rows were picked by an index (routed tokens, gathered positions).

    Read off the autograd graph that made x, backwards through operations that keep rows where they are, up to the
    index, a flattening, or another scored layer. None: rows are in the order of the samples, as far as is known.
    """
    if x.ndim != 2 or not samples:
        return None
    if is_sharded(x) and x.grad_fn is None and len(x) != samples:
        raise UnsupportedLayer(_DEALT.format("rows that ranks may have dealt among them"))
    return _walk(x.grad_fn, samples, one_each=len(x) == samples)


def owner_behind(node: Any, samples: int) -> Tensor | None:
    """The same of the 2-D tensor that the autograd node ``node`` made."""
    return _walk(node, samples)


# Backward nodes whose result has the rows of their first input, by name without "Backward0".
_KEEP_ROWS = (
    " Add Addmm Alias Celu Clamp Clone Cos Div Elu Exp FusedDropout Gelu Hardsigmoid Hardswish Hardtanh LeakyRelu Log "
    "MaskedFill Mm Mul NativeDropout NativeLayerNorm Neg Pow Relu Rsqrt Sigmoid Silu Sin Softmax Softplus Sqrt Sub "
    "Tanh ToCopy ViewAs Where _FromTorchTensor _ToTorchTensor Redistribute "
)
_CUT = ("Slice", "Split", "SplitWithSizes")
_DEALT = (
    "rows of a 2-D tensor at a split layer must be in the order of the samples, or one of each; got {}. Pass tensors "
    "whose first dimension is the samples"
)


def _walk(node: Any, samples: int, one_each: bool = False) -> Tensor | None:
    squeezed = False  # behind it lies a 3-D tensor, of which only an owner that was noted tells
    for _ in range(100):  # a bound, not a limit that models meet
        if node is None:
            return None
        if hasattr(node, "row_owner"):
            return node.row_owner
        sizes: tuple[int, ...] = tuple(getattr(node, "_saved_self_sym_sizes", ()))
        kind = type(node).__name__.rstrip("0123456789").removesuffix("Backward")
        squeezed |= kind == "Squeeze"
        if squeezed and kind != "Squeeze" and f" {kind} " not in _KEEP_ROWS:
            return None
        if kind in ("_FromTorchTensor", "_ToTorchTensor") and not one_each:
            placements = node.forward_input_placements if kind == "_FromTorchTensor" else node.dtensor_spec.placements
            if any(placement.is_shard(0) for placement in placements):
                raise UnsupportedLayer(_DEALT.format(f"rows dealt among ranks, {placements}"))
        if kind in ("Index", "IndexSelect"):
            _refuse_checkpointing()
            return _picked(node, sizes, samples)
        if kind in ("Flip", "Gather", "Roll") or (kind in _CUT and _cuts_rows(node, sizes)):
            raise UnsupportedLayer(
                f"a scored layer's rows must be traced to their samples; got rows that {kind.lower()} took from "
                "others. Pick rows by an index, or pass tensors whose first dimension is the samples"
            )
        if not squeezed and f" {kind} " not in _KEEP_ROWS and kind not in _CUT:
            return None  # flattened here, or made anew: the shapes tell
        following = [next_node for next_node, _ in node.next_functions if next_node is not None]
        following.sort(key=lambda item: type(item).__name__ == "AccumulateGrad")  # stable: weights last
        node = following[0] if following else None
    return None


def _cuts_rows(node: Any, sizes: tuple[int, ...]) -> bool:
    """Whether a node takes some of the rows of a 2-D tensor."""
    if len(sizes) != 2 or node._saved_dim % (1 << 64) not in (0, (1 << 64) - 2):
        return False
    whole = getattr(node, "_saved_start", None) == 0 and getattr(node, "_saved_end", -1) >= sizes[0]
    return not whole


def _refuse_checkpointing() -> None:
    """Inside a checkpointed region the graph holds no indices: asking for them would run the region again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", ""):
        raise UnsupportedLayer(
            "rows that an index picks (experts) cannot be traced to their samples inside a region with activation "
            "checkpointing; turn it off for layers with experts"
        )


def _picked(node: Any, sizes: tuple[int, ...], samples: int) -> Tensor | None:
    """The owner of rows that an index picked from a tensor of these sizes."""
    if type(node).__name__ == "IndexSelectBackward0":
        indices: tuple[Tensor | None, ...] = (node._saved_index,) if node._saved_dim == 0 else ()
    else:
        indices = node._saved_indices
    first = indices[0] if indices else None
    if first is None or any(index is None for index in indices) or not sizes:
        return None
    if first.dtype in (torch.bool, torch.uint8):
        first = first.nonzero()[:, 0]
    if sizes[0] == samples and len(sizes) > 2:
        return first.reshape(-1)
    parent = node.next_functions[0][0]
    base = _walk(parent, samples)
    if base is None:
        if sizes[0] % samples:
            return None  # by_sample will say that these rows are nobody's
        base = torch.arange(samples, device=first.device).repeat_interleave(sizes[0] // samples)
    return base[first.reshape(-1)]
