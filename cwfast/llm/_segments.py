"""Sums over the tokens of each text."""

from typing import Any

import numpy as np

from cwfast.llm.storage import Floats, TokenRecords

Bools = np.ndarray[Any, np.dtype[np.bool_]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


def sums(records: TokenRecords, values: Floats) -> Floats:
    """[N]."""
    total: Floats = np.add.reduceat(values, records.offsets[:-1].numpy())
    return total


def means(records: TokenRecords, values: Floats) -> Floats:
    """[N]."""
    return sums(records, values) / records.lengths


def document(records: TokenRecords) -> Ints:
    """[T], which text a token is of."""
    return np.repeat(np.arange(len(records)), records.lengths)


def position(records: TokenRecords) -> Ints:
    """[T], a token's place among the scored ones of its text."""
    return np.arange(len(records.tokens)) - np.repeat(records.offsets[:-1].numpy(), records.lengths)


def lowest(records: TokenRecords, values: Floats, share: float) -> Bools:
    """[T], whether a value is among the ``max(1, int(share * L))`` lowest of its text; of equal ones the first.

    Raises:
        ValueError: share not in (0, 1], or a value NaN.
    """
    if not 0 < share <= 1:
        raise ValueError(f"k must lie in (0, 1]; got {share}")
    if np.isnan(values).any():
        raise ValueError(f"records must hold no NaN; got {int(np.isnan(values).sum())} tokens with it")
    order = np.lexsort((values, document(records)))
    wanted = np.maximum(1, (share * records.lengths).astype(np.int64))
    found = np.zeros(len(values), bool)
    found[order] = position(records) < np.repeat(
        wanted, records.lengths
    )  # positions are those of the sorted tokens too
    return found


def lowest_mean(records: TokenRecords, values: Floats, share: float) -> Floats:
    """[N], the mean of each text's lowest values, as in `lowest`."""
    chosen = lowest(records, values, share)
    return sums(records, np.where(chosen, values, 0.0)) / sums(records, chosen.astype(np.float64))
