"""HAMP at test time: what an attacker may see of a logit is its rank."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cwfast.training import Defense, Fitted, Task


class HAMPOutputs(Defense):
    """Any defense, whose models then answer each query with the logits of a random input, in the query's order.

    The predicted class stays, and with it the accuracy; values say nothing any more. HAMP is
    ``HAMPOutputs(PlainTraining(HAMP()))``; CWRF on it ``HAMPOutputs(CWRF(rate, loss=HAMP()))``. An attack that needs
    only the order of the logits is not hindered.

    The random inputs are uniform, fresh for each query, from a generator that begins with the model's seed. Inputs
    ``[N, F]`` are drawn feature by feature: one of its two values if the reference samples have no more, else between
    the smallest and the largest of theirs. Images ``[N, C, ...]`` are drawn pixel by pixel in the range of their
    channel. The authors draw images from the 255 grey levels below 1, and binary features as here.

    Args:
        defense: trains the models.

    Source:
        Chen & Pattabiraman, NDSS 2024, and its code.
    """

    def __init__(self, defense: Defense) -> None:
        self.defense = defense

    def __repr__(self) -> str:
        return f"HAMPOutputs({self.defense!r})"

    def fit_many(
        self,
        task: Task,
        train_ids: Sequence[Tensor],
        reference_ids: Tensor,
        seeds: Sequence[int],
        *,
        trained: Sequence[Fitted] | None = None,
        **more: Any,
    ) -> list[Fitted]:
        """As the defense's own; ``more`` is for that.

        Raises:
            ValueError: there is no reference sample.
        """
        if len(reference_ids) == 0:
            raise ValueError("reference_ids must hold at least one sample, for the range of random inputs; got none")
        reference = task.dataset.inputs[reference_ids]
        fitted = self.defense.fit_many(task, train_ids, reference_ids, seeds, trained=trained, **more)
        for one, seed in zip(fitted, seeds, strict=True):
            generator = torch.Generator(reference.device).manual_seed(seed)
            one.predict = functools.partial(_answer, one.predict, reference, generator)
        return fitted


def _answer(predict: Any, reference: Tensor, generator: torch.Generator, inputs: Tensor) -> Tensor:
    logits: Tensor = predict(inputs)
    return ranked_values(logits, predict(random_inputs(reference, len(inputs), generator)))


def ranked_values(logits: Tensor, values: Tensor) -> Tensor:
    """``[N, C]``: each row of ``values`` in the order of the row of ``logits``; equal logits get their largest."""
    rank = torch.searchsorted(logits.sort(dim=1).values, logits.contiguous(), right=True) - 1
    return values.sort(dim=1).values.gather(1, rank)


def random_inputs(reference: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``[count, ...]`` uniform inputs in the range of ``reference [N, F]`` or ``[N, C, ...]``: see ``HAMPOutputs``."""
    dims = [0, *range(2, reference.ndim)]
    low, high = reference.amin(dims, keepdim=True), reference.amax(dims, keepdim=True)
    drawn = torch.rand(
        (count, *reference.shape[1:]), generator=generator, dtype=reference.dtype, device=reference.device
    )
    binary = ((reference == low) | (reference == high)).all(dim=0, keepdim=True) & (reference.ndim == 2)
    return torch.lerp(low, high, torch.where(binary, drawn.round(), drawn))
