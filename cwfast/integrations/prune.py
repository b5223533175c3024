"""``torch.nn.utils.prune``'s global pruning, without its memory and time."""

import functools
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from cwfast import ops

_CHUNK = 1 << 17  # bytes of packed bits turned into a mask at a time


def global_unstructured(
    parameters: Iterable[tuple[nn.Module, str]],
    pruning_method: type[prune.BasePruningMethod] = prune.L1Unstructured,
    importance_scores: Mapping[tuple[nn.Module, str], Tensor] | None = None,
    *,
    backend: str = "auto",
    **kwargs: Any,
) -> None:
    """Prune the entries with the lowest |score| of all parameters together; call and result are torch's.

    Each module gets ``<name>_orig`` (the parameter), ``<name>_mask`` (its dtype, 0 or 1), ``<name>`` (their product)
    and a forward hook, so that ``prune.remove``, ``prune.is_pruned`` and further rounds (by this function or torch's)
    work. Entries pruned before stay pruned and do not count.

    Equal scores: the lowest (parameter, flat index) is kept, where torch's choice is undefined. Nothing is
    concatenated or sorted: besides masks and pruned weights, N / 8 bytes and small buffers; a round in which more than
    the nonzero entries would be kept, or with ``importance_scores`` on pruned parameters, copies those scores.

    Args:
        parameters: ``(module, name)`` pairs on one device; dtypes may differ.
        pruning_method: ``prune.L1Unstructured``; other methods are torch's to compute.
        importance_scores: ``{(module, name): scores}`` of the parameter's shape; ranked by absolute value in its place.
        backend: see ``cwfast.ops.select_topk``.
        kwargs: ``amount``: a share in [0, 1] (rounded, of what is not yet pruned) or how many.

    Raises:
        TypeError: another pruning method, or ``parameters`` or ``importance_scores`` of a wrong type.
        ValueError: ``amount`` out of range, a shape that does not fit, or NaN scores; nothing has been changed.
    """
    if pruning_method is not prune.L1Unstructured:
        raise TypeError(
            "pruning_method must be torch.nn.utils.prune.L1Unstructured (torch's function takes others); "
            f"got {pruning_method!r}"
        )
    if not isinstance(parameters, Iterable):
        raise TypeError(f"parameters must be an iterable of (module, name); got {type(parameters).__name__}")
    if importance_scores is not None and not isinstance(importance_scores, Mapping):
        raise TypeError(f"importance_scores must be a mapping; got {type(importance_scores).__name__}")
    pairs = list(parameters)
    amount = prune.L1Unstructured(**kwargs).amount  # torch's check of its range
    tensors = [getattr(module, name).detach() for module, name in pairs]
    scores = [(importance_scores or {}).get(pair, t).detach() for pair, t in zip(pairs, tensors, strict=True)]
    for (_, name), tensor, score in zip(pairs, tensors, scores, strict=True):
        if score.shape != tensor.shape:
            raise ValueError(
                f"importance_scores must have the shape of {name}, {tuple(tensor.shape)}; got {tuple(score.shape)}"
            )
    before = [getattr(module, f"{name}_mask", None) for module, name in pairs]
    left = sum(t.numel() if mask is None else int((mask == 1).sum()) for t, mask in zip(tensors, before, strict=True))
    pruned = int(amount) if isinstance(amount, Integral) else round(amount * left)
    if pruned > left:
        raise ValueError(f"amount must be at most {left}, the number of entries not yet pruned; got {pruned}")
    bits = _kept(scores, tensors, before, left - pruned, backend)
    for (module, name), tensor, packed in zip(pairs, tensors, bits, strict=True):
        _apply(module, name, _dense_mask(packed, tensor))


def _kept(
    scores: list[Tensor], tensors: list[Tensor], before: list[Tensor | None], k: int, backend: str
) -> list[Tensor]:
    """Packed bits of the k entries that stay."""
    if not scores:
        return []
    common = functools.reduce(torch.promote_types, [score.dtype for score in scores])
    scores = [score.to(common) for score in scores]
    # Entries pruned before are 0 in the parameter itself: they cannot be chosen while the threshold is above 0.
    ranked_by_value = all(m is None or s is t for s, t, m in zip(scores, tensors, before, strict=True))
    if ranked_by_value:
        selection = ops.select_topk(scores, k, transform="abs", backend=backend)
        if selection.threshold > 0 or all(mask is None for mask in before):
            return selection.bits
    for i, score in enumerate(scores):
        if score.isnan().any():
            raise ValueError(f"scores must not be NaN; got some in parameters[{i}]")
    hidden = [s if m is None else s.masked_fill(m != 1, torch.nan) for s, m in zip(scores, before, strict=True)]
    return ops.select_topk(hidden, k, nan="skip", transform="abs", backend=backend).bits


def _dense_mask(bits: Tensor, like: Tensor) -> Tensor:
    """0 or 1 in the dtype and shape of ``like``: eight entries of a table row per byte."""
    byte = torch.arange(256, device=bits.device)[:, None]
    table = ((byte >> torch.arange(8, device=bits.device)) & 1).to(like.dtype)
    mask = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    flat, whole = mask.view(-1), like.numel() // 8
    for begin in range(0, whole, _CHUNK):
        end = min(begin + _CHUNK, whole)
        torch.index_select(table, 0, bits[begin:end].to(torch.int32), out=flat[begin * 8 : end * 8].view(-1, 8))
    if like.numel() % 8:
        flat[whole * 8 :] = table[int(bits[whole])][: like.numel() % 8]
    return mask


def _apply(module: nn.Module, name: str, mask: Tensor) -> None:
    """``prune.custom_from_mask``; where nothing has been pruned before, without its three temporary tensors."""
    hooks = module._forward_pre_hooks.values()
    if any(isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name for hook in hooks):
        prune.custom_from_mask(module, name, mask)
        return
    method = prune.CustomFromMask(mask)
    method._tensor_name = name
    module.register_parameter(f"{name}_orig", getattr(module, name))
    del module._parameters[name]
    module.register_buffer(f"{name}_mask", mask)
    setattr(module, name, method.apply_mask(module))
    module.register_forward_pre_hook(method)
