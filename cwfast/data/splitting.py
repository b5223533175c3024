"""Who may be a member, who is left to defenses, who measures accuracy: drawn from a seed."""

from typing import NamedTuple

import torch
from torch import Tensor

from cwfast.data.sets import Dataset


class Samples(NamedTuple):
    """What a loader reads: samples without roles.

    Attributes:
        inputs: ``[N, ...]`` float32.
        targets: ``[N]`` int64, classes from 0 on.
        note: where they come from, and what was done to them.
        test: indices of the test set where the data are published with one.
    """

    inputs: Tensor
    targets: Tensor
    note: str
    test: Tensor | None = None


def split(
    name: str,
    samples: Samples,
    *,
    seed: int = 0,
    pool: int | None = None,
    reference: int | None = None,
    random_label_share: float = 0.0,
) -> Dataset:
    """Draw the roles of samples.

    Args:
        name: of the dataset.
        samples: all of it. Where they come with a test set, pool and reference are drawn from the others, and what
            neither of them takes is left out; else it is the test set.
        seed: of the roles and the labels.
        pool: samples that models train on or leave out; None: all but the reference and a sixth for the test.
        reference: samples for defenses; None: a sixth.
        random_label_share: share of pool and reference whose label is replaced by another class drawn uniformly: what a
            model can only memorise. The test set keeps its labels.

    Raises:
        ValueError: the pool would be empty, or no sample left for the test; or the share is not within 0 .. 1.
    """
    targets, count = samples.targets, len(samples.targets)
    free = torch.ones(count, dtype=torch.bool)
    if samples.test is not None:
        free[samples.test] = False
    ids = free.nonzero().flatten()
    sixth = max(1, len(ids) // 6)
    reference = sixth if reference is None else reference
    pool = len(ids) - reference - (sixth if samples.test is None else 0) if pool is None else pool
    least = 1 if samples.test is None else 0
    if pool < 1 or reference < 0 or pool + reference + least > len(ids):
        rest = "leave some of them for the test" if samples.test is None else "not exceed them"
        raise ValueError(
            f"pool (at least 1) and reference must be drawn from {len(ids)} samples of {name} and {rest}; "
            f"got {pool} + {reference}"
        )
    if not 0 <= random_label_share <= 1:
        raise ValueError(f"random_label_share must lie between 0 and 1; got {random_label_share}")
    classes = int(targets.max()) + 1
    if random_label_share and classes < 2:
        raise ValueError("random_label_share must be 0 where there is one class: there is no other label to draw")
    generator = torch.Generator().manual_seed(seed)
    order = ids[torch.randperm(len(ids), generator=generator)]
    roles = order[:pool], order[pool : pool + reference]
    test = order[pool + reference :] if samples.test is None else samples.test
    randomised = torch.zeros(count, dtype=torch.bool)
    note = samples.note
    if random_label_share:
        for members in roles:  # the same share in both, so that the reference is distributed as the members are
            randomised[members[: round(random_label_share * len(members))]] = True
        shift = torch.randint(1, classes, targets.shape, generator=generator)
        targets = torch.where(randomised, (targets + shift) % classes, targets)
        note += (
            f"; {random_label_share:.0%} of the labels of pool and reference replaced by another class, "
            "test labels untouched"
        )
    return Dataset(name, samples.inputs, targets, *roles, test, randomised, note)
