"""Controls without a model: can the two sides be told apart by their words, and do they share text?"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from cwfast.llm.storage import Floats
from cwfast.mia._inputs import Array, to_numpy

_WORDS = 5000  # the most frequent ones that the baseline counts


class Rows(NamedTuple):
    """A sparse matrix: row i has ``value`` at ``column``, both from ``start[i]`` to ``start[i + 1]``."""

    column: torch.Tensor
    value: torch.Tensor
    start: torch.Tensor  # without the last end
    columns: int

    @classmethod
    def of(cls, rows: Sequence[Sequence[tuple[int, float]]], columns: int) -> "Rows":
        """From (column, value) of each row."""
        entries = np.array([one for row in rows for one in row], np.float64).reshape(-1, 2)
        ends = torch.tensor([0, *map(len, rows)]).cumsum(0)
        return cls(
            torch.from_numpy(entries[:, 0].astype(np.int64)), torch.from_numpy(entries[:, 1]), ends[:-1], columns
        )

    def times(self, weights: torch.Tensor) -> torch.Tensor:
        """[rows], differentiable in weights [columns]."""
        return torch.nn.functional.embedding_bag(
            self.column, weights[:, None], self.start, mode="sum", per_sample_weights=self.value
        )[:, 0]


def bag_of_words(
    texts: Sequence[str], members: Array, *, folds: int = 5, penalty: float = 1.0, seed: int = 0
) -> Floats:
    """Scores of texts by logistic regression on ln(1 + count) of words, fitted on the other folds; no model is asked.

    An AUC above 0.5 means that members and non-members come from different distributions, and that no attack's AUC says
    anything about the model alone.

    Args:
        texts: N of them.
        members: bool [N].
        folds: with equal shares of both sides, drawn by ``seed``.
        penalty: times half of the squared weights, beside the sum of the losses.
        seed: of the folds.

    Returns:
        float64 [N] in (0, 1): the rank of a text's score within its fold, as folds have different offsets.

    Raises:
        ValueError: fewer texts of a side than folds.
    """
    flags = to_numpy("members", members, "b")
    if flags.shape != (len(texts),):
        raise ValueError(f"members must have shape [N] = ({len(texts)},); got {flags.shape}")
    if folds < 2 or min(flags.sum(), (~flags).sum()) < folds:
        raise ValueError(f"folds must be at least 2 and at most the texts of a side; got {folds}")
    rng = np.random.default_rng(seed)
    fold = np.empty(len(texts), np.int64)
    for side in (flags, ~flags):
        fold[rng.permutation(np.flatnonzero(side))] = np.arange(side.sum()) % folds
    counted = [Counter(text.lower().split()) for text in texts]
    scores = np.empty(len(texts))
    for held in range(folds):
        test = fold == held
        total: Counter[str] = Counter()
        for i in np.flatnonzero(~test).tolist():
            total.update(counted[i].keys())
        column = {word: j for j, (word, _) in enumerate(total.most_common(_WORDS))}
        rows = [[(column[word], np.log1p(n)) for word, n in words.items() if word in column] for words in counted]
        train, unseen = (Rows.of([rows[i] for i in np.flatnonzero(side)], len(column)) for side in (~test, test))
        with torch.no_grad():
            found = unseen.times(_logistic(train, flags[~test], penalty)).numpy()
        ordered = np.sort(found)  # ties, as between texts that share no word with others, take their middle rank
        scores[test] = (np.searchsorted(ordered, found) + np.searchsorted(ordered, found, "right")) / (2 * len(found))
    return scores


def duplicates(members: Sequence[str], nonmembers: Sequence[str], *, n: int = 8, share: float = 0.2) -> dict[str, Any]:
    """How many texts of one side have at least a ``share`` of their runs of ``n`` words in the other side.

    A member's near-copy among the non-members makes every attack look worse than it is.

    Args:
        members: texts of one side.
        nonmembers: of the other.
        n: words of a run; a shorter text is one run.
        share: that makes a near-duplicate.

    Returns:
        ``exact`` (texts of the non-members that are members' word for word), ``members`` and ``nonmembers`` (how many
        near-duplicates each side has), ``largest`` (share of any text), ``n``, ``share``.
    """
    runs = [[_runs(text, n) for text in side] for side in (members, nonmembers)]
    whole = [set().union(*side) for side in runs]
    shares = [[len(own & other) / len(own) for own in side] for side, other in zip(runs, whole[::-1], strict=True)]
    known = {" ".join(text.split()) for text in members}
    return {
        "exact": sum(" ".join(text.split()) in known for text in nonmembers),
        "members": sum(one >= share for one in shares[0]),
        "nonmembers": sum(one >= share for one in shares[1]),
        "largest": max((one for side in shares for one in side), default=0.0),
        "n": n,
        "share": share,
    }


def _runs(text: str, n: int) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def _logistic(features: Rows, flags: Floats, penalty: float) -> torch.Tensor:
    """Weights by L-BFGS, with an intercept that is not returned: it moves all scores alike."""
    y = torch.from_numpy(flags.astype(np.float64))
    weights = torch.zeros(features.columns + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        z = features.times(weights[:-1]) + weights[-1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum")
        loss = loss + penalty / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()[:-1]
