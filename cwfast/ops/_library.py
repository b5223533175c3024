"""The one torch.library namespace: ``torch.ops.cwfast``. define/impl, because custom_op costs 4 to 7 times the call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

_LIBRARY = torch.library.Library("cwfast", "DEF")


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: tuple[Callable[..., Any], Callable[..., None]] | None = None,
) -> None:
    """Define one op for every device; ``fake`` gives its result without data, for torch.compile.

    ``backward``: the two functions of ``torch.library.register_autograd``, where the op is differentiable.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # One kernel below autograd serves all devices.
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cwfast::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"cwfast::{name}", backward[0], setup_context=backward[1], lib=_LIBRARY)


def written(tensors: Tensor | Sequence[Tensor]) -> None:
    """Tell autograd that these were changed through raw pointers, which bumps no version by itself."""
    increment_version(tensors)
