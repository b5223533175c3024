"""How sure a figure over seeds and models is: one variance over samples and one over models, added.

Models are targets of one fleet, samples are those of a seed's pool (for AUCs) or test set (for accuracies). A figure is
the mean over both, and other samples as well as other models would move it. The variance over samples comes from
replicates in which all models share the resampled samples; seeds draw from one data set, so that their errors are
correlated by the share of samples that they have in common. The variance over models is that of the models' own
figures. As the replicates hold some of the models' noise and the models' figures some of the samples', the sum is
rather too large than too small. Where the spread between the seeds' means is what counts, it is one of few values, and
Student's t takes the normal's place from three seeds on; of two it would be 12.7 and say nothing: their intervals are
rather too narrow. One seed shows no such spread: its interval is for its own split, reference set and test set.

Source: Owen, "The pigeonhole bootstrap", 2007 (samples and models crossed); variances added instead of resampled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
NORMAL = 1.96  # 95%
STUDENT = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 95%, of 2, 3... degrees of freedom


@dataclass(frozen=True)
class Figure:
    """AUCs or accuracies of a cell over seeds, or differences of those of two cells.

    Attributes:
        models: [seeds, models]: each model's own.
        draws: [seeds, replicates]: the mean over a seed's models, on resampled samples.
        shared: [seeds, seeds]: the share of one seed's samples that is another's too; 1 on the diagonal.
    """

    models: Floats
    draws: Floats
    shared: Floats

    @property
    def seeds(self) -> Floats:
        """[seeds]: the mean over models."""
        means: Floats = self.models.mean(axis=1)
        return means

    @property
    def mean(self) -> float:
        """Over seeds and models."""
        return float(self.models.mean())

    @property
    def variances(self) -> tuple[float, float, float]:
        """Of the mean: over samples, over models within seeds, and between the seeds' means (0 for one seed)."""
        seeds, models = self.models.shape
        by_sample = self.draws.std(axis=1, ddof=1)
        samples = float(by_sample @ self.shared @ by_sample) / seeds**2
        within = float(self.models.var(axis=1, ddof=1).mean()) / (seeds * models)
        between = float(self.seeds.var(ddof=1)) / seeds if seeds > 1 else 0.0
        return samples, within, between

    @property
    def error(self) -> float:
        """Standard error of the mean, over samples and models.

        The variance over models is that within seeds or, if it is larger, that between the seeds' means.
        """
        samples, within, between = self.variances
        return float((samples + max(within, between)) ** 0.5)

    @property
    def interval(self) -> tuple[float, float]:
        """95%: normal, but by Student's t for a spread between three seeds or more (one degree of freedom less)."""
        samples, within, between = self.variances
        half = NORMAL * self.error
        if between > within and len(self.models) > 2:
            student = STUDENT[min(len(self.models) - 2, len(STUDENT)) - 1]  # of more seeds: rather too wide
            half = float((NORMAL**2 * samples + student**2 * between) ** 0.5)
        return self.mean - half, self.mean + half

    def less(self, other: "Figure") -> "Figure":
        """The difference, in pairs: the same seeds, models and resampled samples."""
        fewest = min(self.draws.shape[1], other.draws.shape[1])
        draws = self.draws[:, :fewest] - other.draws[:, :fewest]
        return Figure(self.models - other.models, draws, self.shared)

    def told(self, name: str) -> dict[str, float]:
        """``name``, ``name_low`` and ``name_high``."""
        low, high = self.interval
        return {name: self.mean, f"{name}_low": low, f"{name}_high": high}


@dataclass(frozen=True)
class Measured:
    """One cell over the seeds of one data set; the same seeds, models and samples for all that are compared.

    Attributes:
        row: what the report says of it.
        accuracy: on the test set.
        auc: of the main attack.
    """

    row: Mapping[str, Any]
    accuracy: Figure
    auc: Figure


def stacked(parts: Sequence[tuple[Measured, int]]) -> tuple[Figure, Figure]:
    """Accuracy and AUC of a curve of which each seed shows another cell.

    Args:
        parts: for each seed in turn: the cell, and the seed's row in it.
    """
    found = []
    for figures in ([(cell.accuracy, k) for cell, k in parts], [(cell.auc, k) for cell, k in parts]):
        models = np.stack([one.models[k] for one, k in figures])
        found.append(Figure(models, np.stack([one.draws[k] for one, k in figures]), figures[0][0].shared))
    return found[0], found[1]


def shared(samples: Sequence[Sequence[int]]) -> Floats:
    """[seeds, seeds]: of the samples of each two seeds, the share in common (of the smaller number)."""
    sets = [set(one) for one in samples]
    return np.array([[len(a & b) / min(len(a), len(b)) for b in sets] for a in sets])
