"""A dataset with its roles, and batches of it."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Samples and their roles.

    Attributes:
        name: what it is called in reports.
        inputs: ``[N, ...]`` float32.
        targets: ``[N]`` int64 class labels, as the models see them.
        pool: indices of samples that are members of some models and non-members of others; only these are audited.
        reference: indices of non-members of every model, which a defense may use; never audited.
        test: indices for accuracy.
        randomised: ``[N]`` bool: the label was replaced by a wrong one.
        note: where the data come from, and what was done to them.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    pool: Tensor
    reference: Tensor
    test: Tensor
    randomised: Tensor
    note: str

    @property
    def sha256(self) -> str:
        """Of the bytes of inputs and targets, as they are now."""
        digest = hashlib.sha256()
        for tensor in (self.inputs, self.targets):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


def check_reiterable(**sets: Iterable[object]) -> None:
    """Each can be iterated as often as wanted: a list or a DataLoader, not a generator.

    Raises:
        TypeError: not so; the message names the first.
    """
    for name, batches in sets.items():
        if not isinstance(batches, Iterable):
            raise TypeError(f"{name} must be an iterable of batches (inputs, targets); got {type(batches).__name__}")
        if isinstance(batches, Iterator):
            raise TypeError(
                f"{name} must be iterable more than once, such as a list or a DataLoader; got {type(batches).__name__}"
            )


class Batches:
    """Re-iterable batches ``(inputs, targets)`` of some samples, in an order drawn once from ``seed``.

    Args:
        dataset: the samples.
        ids: which of them.
        size: samples a batch.
        seed: of the order.
        wrap: fill the last batch from the start of the order, so that all have ``size`` samples; else it is shorter.
    """

    def __init__(self, dataset: Dataset, ids: Tensor, size: int, seed: int, *, wrap: bool = False) -> None:
        order = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
        missing = -len(order) % size if wrap else 0
        self._dataset, self._size = dataset, size
        self._order = torch.cat([order, order.repeat(-(-missing // max(1, len(order))))[:missing]])

    def __len__(self) -> int:
        return -(-len(self._order) // self._size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for ids in self._order.split(self._size):
            yield self._dataset.inputs[ids], self._dataset.targets[ids]
