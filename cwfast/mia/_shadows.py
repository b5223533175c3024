"""Which models serve against a target, and statistics of the others for every target in one pass.

Which one is left out of a balanced split, and why: `cwfast.mia.attacks`.
Either way a side (IN or OUT) loses at most one model per sample: the target itself or the one left out for it. So the
statistics of a side without model k, for every k, serve all targets.
"""

from typing import NamedTuple

import numpy as np

from cwfast.mia._inputs import Bools, Floats, Ints


class TooFewModels(ValueError):
    """An attack needs more IN or OUT models than a membership leaves it."""


class Side(NamedTuple):
    """The models of one side and, per target, the one that is not used.

    Attributes:
        use: bool [K, N].
        lost: int64 [targets, N]; a model that is not of this side stands for none.
        left: int64 [targets, N], how many models that leaves.
    """

    use: Bools
    lost: Ints
    left: Ints

    def pick(self, without: Floats, row: int) -> Floats:
        """[N], for one target, of [K, N] "without model k"."""
        return np.take_along_axis(without, self.lost[row][None], axis=0)[0]


class Moments(NamedTuple):
    """Of the used entries of a column but entry k: [K, N] each; entries that are not used leave nothing out."""

    mean: Floats
    squares: Floats  # sum of squares about the mean
    median: Floats | None


def sides(member: Bools, targets: list[int]) -> tuple[Side, Side]:
    """IN and OUT models for these targets."""
    following = None
    trained = member.sum(axis=0)
    mixed = (trained > 0) & (trained < len(member))
    lost = np.empty((2, len(targets), member.shape[1]), np.int64)
    for row, target in enumerate(targets):
        own = member[target]
        lost[:, row] = target
        yes, no = mixed & own, mixed & ~own
        if yes.any() and no.any() and (trained[yes] - 1).mean() < trained[no].mean() - 0.5:
            following = _left_out(member, mixed) if following is None else following
            lost[0, row, no] = following[target, no]
            lost[1, row, yes] = following[target, yes]
    result = []
    for use, gone in ((member, lost[0]), (~member, lost[1])):
        result.append(Side(use, gone, use.sum(axis=0) - np.take_along_axis(use, gone, axis=0)))
    return result[0], result[1]


def enough(count: Ints, side: str, targets: list[int], least: int, some: int = 1) -> None:
    """Against every target, each sample has at least ``least`` of these models, and some sample has ``some``.

    Raises:
        TooFewModels: it has not.
    """
    for target, left in zip(targets, count, strict=True):
        rest = f"{side} models besides target {target} (and, in a balanced split, besides one more)"
        if left.min() < least:
            worst = int(left.argmin())
            raise TooFewModels(
                f"membership must give every sample at least {least} {rest}; sample {worst} has {left[worst]}"
            )
        if left.max() < some:
            raise TooFewModels(f"membership must give some sample at least {some} {rest}; each has {left.max()}")


def moments(x: Floats, use: Bools, *, median: bool = False) -> Moments:
    """Mean, sum of squares about it and median of the used entries of x [K, N] but one, for each that may be left out.

    Sums run from both ends up to the entry, so nothing is subtracted again, and about the column's median, from which
    no mean of the others is further than their deviation: no digits are lost to an outlier that is left out.
    """
    rising = np.where(use, x, np.inf)
    if median:
        order = rising.argsort(axis=0)
        rising = np.take_along_axis(rising, order, axis=0)
    else:
        rising.sort(axis=0)
    total = use.sum(axis=0)
    center = np.take_along_axis(rising, np.maximum(total - 1, 0)[None] // 2, axis=0)[0]
    center = np.where(total > 0, center, 0)
    count = total - use
    off = np.where(use, x - center, 0)
    with np.errstate(invalid="ignore", divide="ignore"):  # of no entry there is no mean
        sums = _all_but_one(off)
        mean = sums / count
        squares = np.maximum(_all_but_one(off * off) - sums * mean, 0)
    if not median:
        return Moments(center + mean, squares, None)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(len(x))[:, None], axis=0)
    rank = np.where(use, rank, len(x))
    middle = np.zeros_like(x)
    for place in (np.maximum(count - 1, 0) // 2, count // 2):
        middle += np.take_along_axis(rising, np.minimum(place + (place >= rank), len(x) - 1), axis=0) / 2
    return Moments(center + mean, squares, middle)


def sums_of_exp(x: Floats, use: Bools) -> tuple[Floats, Floats]:
    """(top, sum): sum of e^(x - top) over the used entries of a column but entry k, [K, N] each; x may be -inf.

    ``top`` is the largest of those that are left, so the sum neither overflows nor vanishes (0 only for no entry above
    -inf).
    """
    masked = np.where(use, x, -np.inf)
    first, second = np.full((2, x.shape[1]), -np.inf)
    for row in masked:  # row by row: numpy's reductions along columns are several times slower
        second = np.maximum(second, np.minimum(first, row))
        first = np.maximum(first, row)
    some, several = first > -np.inf, second > -np.inf
    largest = np.zeros(x.shape, bool)
    seen = np.zeros(x.shape[1], bool)
    for row, found in zip(masked, largest, strict=True):
        np.equal(row, first, out=found)
        found &= ~seen  # of equal ones the first
        seen |= found
    masked[largest] = -np.inf
    terms = np.exp(masked - np.where(several, second, 0))
    with np.errstate(invalid="ignore"):  # of no entry
        share = np.where(several, np.exp(second - first), 0)
    total = np.zeros(x.shape[1])
    for row in terms:
        total += row
    sums = np.where(largest, total, some + _all_but_one(terms) * share)  # the largest is 1
    return np.where(largest, second, first), sums


def _all_but_one(x: Floats) -> Floats:
    """[K, N]: the sum of each column without entry k, from both ends up to it."""
    result = np.zeros_like(x)
    for k in range(1, len(x)):
        np.add(result[k - 1], x[k - 1], out=result[k])
    above = np.zeros(x.shape[1])
    for k in range(len(x) - 2, -1, -1):
        above += x[k + 1]
        result[k] += above
    return result


def _left_out(member: Bools, mixed: Bools) -> Ints:
    """[K, N]: the model of the other side that is left out for k: its complement if there is one, else the next."""
    found = _next_of_other_side(member)
    split = member[:, mixed]
    for k, row in enumerate(split):
        complement = (split != row).all(axis=1)
        if complement.any():
            found[k, mixed] = complement.argmax()
    return found


def _next_of_other_side(member: Bools) -> Ints:
    """[K, N]: the first model after k, cyclically, that is IN where k is OUT or the reverse; k itself where none is."""
    models, samples = member.shape
    found = np.empty((models, samples), np.int64)
    ahead = np.full((2, samples), -1)  # the nearest OUT and IN model met so far
    for step in range(2 * models - 1, -1, -1):
        k = step % models
        found[k] = np.where(member[k], ahead[0], ahead[1])
        ahead[0, ~member[k]] = k
        ahead[1, member[k]] = k
    return np.where(found < 0, np.arange(models)[:, None], found)
