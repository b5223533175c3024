"""Masks and initial values by the names of a checkpoint's tensors, for the model that these become."""

import os
from typing import Any

import torch
from torch import Tensor

from cwfast._parameters import Initial
from cwfast.checkpoint import Checkpoint
from cwfast.checkpoint.identity import sha256_of
from cwfast.llm.score_files import on_disk
from cwfast.llm.swapping import loaded
from cwfast.masks import MaskSet


def as_parameters(model: Any, masks: MaskSet) -> MaskSet:
    """The same weights by the names of the model's parameters, in their order.

    transformers 5 makes one parameter of the experts of a layer: its entries are followed back to the checkpoint's
    tensors, with 8 bytes an entry of the largest such parameter meanwhile.

    Raises:
        ValueError: a tensor of ``masks`` has another shape than the model would write, or becomes no parameter.
    """
    parameters = dict(model.named_parameters())
    if parameters.keys() >= masks.shapes.keys():
        names = [name for name in parameters if name in masks.shapes]
        shapes = {name: masks.shapes[name] for name in names}
        bits = {name: masks.picks(name) for name in names}
        return MaskSet(bits, shapes, zero_score_selected=masks.zero_score_selected, base=masks.base)
    found, left = {}, set(masks.names)
    for name, parameter in parameters.items():
        places = torch.arange(parameter.numel()).reshape(parameter.shape)
        chosen = torch.zeros(parameter.numel(), dtype=torch.bool)
        stored = on_disk(model, {name: places}) if name not in left else {name: places}
        known = left.intersection(stored)
        for tensor in known:
            chosen[_selected(masks, tensor, stored[tensor])] = True
        if known:
            left -= known
            found[name] = chosen.reshape(parameter.shape)
    if left:
        raise ValueError(f"masks must be of this model, which has no parameter {min(left)!r}")
    plain = MaskSet.from_masks(found)
    return MaskSet(plain.bits, plain.shapes, zero_score_selected=masks.zero_score_selected, base=masks.base)


def values_for(model: Any, masks: MaskSet, initial: Initial) -> Initial:
    """What ``rewind_`` takes as the initial values of ``masks``, which have the names of the model's parameters.

    A folder that has a layer's experts one by one, where the model has them as one parameter, is loaded whole, as the
    model's class.

    Raises:
        ValueError: ``initial`` is a file or folder, and not the base that the masks say they were made with.
        CheckpointError: it lacks a weight of the model.
    """
    if not isinstance(initial, str | os.PathLike):
        return initial
    source = Checkpoint(initial)
    for name, expected in (masks.base or {}).items():
        if not masks.counts.get(name, 1):
            continue
        found = sha256_of(source.pieces(name)) if name in source else "none"
        if found != expected:
            raise ValueError(
                f"initial must be the base that the masks were made with; the SHA-256 of {name!r} in {source.path} is "
                f"{found[:16]}..., in the masks {expected[:16]}..."
            )
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    wanted = [aliases[id(parameter)] for name, parameter in model.named_parameters() if name in masks.shapes]
    return initial if all(any(n in source for n in known) for known in wanted) else loaded(model, initial)


def _selected(masks: MaskSet, tensor: str, places: Tensor) -> Tensor:
    """Where in the parameter the selected entries of one of its tensors come from."""
    if masks.shapes[tensor] != tuple(places.shape):
        raise ValueError(
            f"masks must be of this model, which stores {tensor!r} as {tuple(places.shape)}; got {masks.shapes[tensor]}"
        )
    return places.reshape(-1)[masks.indices(tensor).to(places.device)]
