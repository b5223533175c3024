"""Was a whole set of texts trained on? Many weak scores of many texts, one test."""

from typing import NamedTuple

import numpy as np

from cwfast.llm.storage import Floats
from cwfast.mia._inputs import Array, to_numpy
from cwfast.mia.metrics.intervals import incomplete_beta


class DatasetInference(NamedTuple):
    """A one-sided t-test of "the suspected texts score no higher than texts that surely were not trained on"."""

    p_value: float
    t: float
    degrees: float
    suspected_mean: float
    unseen_mean: float


def dataset_inference(suspected: Array, unseen: Array, *, penalty: float = 1.0, seed: int = 0) -> DatasetInference:
    """Welch's t-test of a learned sum of scores: weights from one half of the texts, the test on the other.

    Weights: ridge regression of the side (1 suspected, 0 unseen) on the scores, standardised by the first half. Both
    sides must come from one distribution, or a small p-value says no more than that they do not.

    Args:
        suspected: [N, F], F attacks' scores of the texts in question.
        unseen: [M, F], of texts that the model was surely not trained on.
        penalty: of the ridge regression, times the squared weights.
        seed: of the halves.

    Returns:
        ``DatasetInference``.

    Raises:
        ValueError: fewer than 4 texts of a side, or other features.

    Source: Maini et al., "LLM Dataset Inference: Did you train on my dataset?", NeurIPS 2024.
    """
    sides = [to_numpy(name, value, "f") for name, value in (("suspected", suspected), ("unseen", unseen))]
    if any(side.ndim != 2 or len(side) < 4 for side in sides) or sides[0].shape[1] != sides[1].shape[1]:
        raise ValueError(f"suspected and unseen must be [N >= 4, F]; got {sides[0].shape} and {sides[1].shape}")
    if not all(np.isfinite(side).all() for side in sides):
        raise ValueError("suspected and unseen must be finite; got infinite or missing scores")
    rng = np.random.default_rng(seed)
    halves = [np.array_split(side[rng.permutation(len(side))], 2) for side in sides]
    known = np.concatenate([half[0] for half in halves])
    label = np.repeat([0.5, -0.5], [len(half[0]) for half in halves])
    middle, spread = known.mean(axis=0), np.maximum(known.std(axis=0), 1e-12)
    scaled = (known - middle) / spread
    weights = np.linalg.solve(scaled.T @ scaled + penalty * np.eye(scaled.shape[1]), scaled.T @ (label - label.mean()))
    x, y = (((half[1] - middle) / spread) @ weights for half in halves)
    t, degrees = _welch(x, y)
    return DatasetInference(_above(t, degrees), t, degrees, float(x.mean()), float(y.mean()))


def _welch(x: Floats, y: Floats) -> tuple[float, float]:
    a, b = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    if a + b == 0:
        return 0.0, float(len(x) + len(y) - 2)
    degrees = (a + b) ** 2 / (a**2 / (len(x) - 1) + b**2 / (len(y) - 1))
    return float((x.mean() - y.mean()) / np.sqrt(a + b)), float(degrees)


def _above(t: float, degrees: float) -> float:
    """P[T > t] of Student's t."""
    tail = incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t)) / 2
    return tail if t > 0 else 1 - tail
