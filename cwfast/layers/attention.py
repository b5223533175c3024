"""``F.multi_head_attention_forward``: torch's own composition, so that the linear layers inside are seen."""

import types
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cwfast.layers import Tracker, register

_function: Any = functional.multi_head_attention_forward
# The same code, except that it does not hand itself over to the parameters' class: the calls inside do.
_composition = types.FunctionType(
    _function.__code__,
    {**_function.__globals__, "has_torch_function": lambda _: False},
    _function.__name__,
    _function.__defaults__,
)


@register(_function)
def multi_head_attention(tracker: Tracker, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Scores ``torch.nn.MultiheadAttention``, whose tensors are time first in here."""
    samples = tracker.batch_now.size
    if query.ndim != 3 or query.shape[1] != samples:
        raise ValueError(
            f"the second dimension of a query of multi-head attention must be the {samples} samples; got shape "
            f"{tuple(query.shape)}. Declare the samples by scorer.batch(size=...)"
        )
    before, tracker.dim = tracker.dim, 1
    try:
        with torch._C._EnableTorchFunction():
            return _composition(query, *args, **kwargs)
    finally:
        tracker.dim = before
