"""Datasets that come inside installed packages: nothing is downloaded."""

import torch

from cwfast.data import Dataset


def digits(*, pool: int = 1200, reference: int = 300, random_label_share: float = 0.2, seed: int = 0) -> Dataset:
    """scikit-learn's handwritten digits (1,797 images of 8 x 8, 10 classes), inputs scaled to 0 .. 1.

    Args:
        pool: samples that models train on or leave out.
        reference: samples for defenses; the rest is the test set.
        random_label_share: share of pool and reference whose label is replaced by another class drawn uniformly: what a
            model can only memorise. The test set keeps its labels.
        seed: of the splits and the labels.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: no samples would be left for the test set, or the share is not within 0 .. 1.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits data come with scikit-learn: pip install 'cwfast[demo]'") from error
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.from_numpy(images).float() / 16, torch.from_numpy(labels).long()
    if not 0 < pool + reference < len(targets):
        raise ValueError(
            f"pool + reference must leave some of the {len(targets)} digits for the test; got {pool} + {reference}"
        )
    if not 0 <= random_label_share <= 1:
        raise ValueError(f"random_label_share must lie between 0 and 1; got {random_label_share}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator)
    roles = order[:pool], order[pool : pool + reference], order[pool + reference :]
    randomised = torch.zeros(len(targets), dtype=torch.bool)
    for ids in roles[:2]:  # the same share in both, so that the reference is distributed as the members are
        randomised[ids[: round(random_label_share * len(ids))]] = True
    shift = torch.randint(1, 10, targets.shape, generator=generator)
    targets = torch.where(randomised, (targets + shift) % 10, targets)
    note = (
        f"scikit-learn's digits (UCI, handwritten); {random_label_share:.0%} of the labels of pool and reference "
        "replaced by another class, test labels untouched"
    )
    return Dataset("digits", inputs, targets, *roles, randomised, note)
