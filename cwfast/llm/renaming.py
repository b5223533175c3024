"""Masks by the names of a checkpoint's tensors, as ``cwfast select`` writes them, for the model that they become."""

from typing import Any

import torch
from torch import Tensor

from cwfast.llm.score_files import on_disk
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
        return MaskSet(bits, shapes, zero_score_selected=masks.zero_score_selected)
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
    return MaskSet.from_masks(found)


def _selected(masks: MaskSet, tensor: str, places: Tensor) -> Tensor:
    """Where in the parameter the selected entries of one of its tensors come from."""
    if masks.shapes[tensor] != tuple(places.shape):
        raise ValueError(
            f"masks must be of this model, which stores {tensor!r} as {tuple(places.shape)}; got {masks.shapes[tensor]}"
        )
    return places.reshape(-1)[masks.indices(tensor).to(places.device)]
