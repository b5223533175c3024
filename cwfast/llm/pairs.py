"""Attacks that compare the model with a reference, token by token: difference, ratio, EZ-MIA, WBC, InfoRMIA."""

from collections.abc import Sequence

import numpy as np

from cwfast.llm import _segments
from cwfast.llm.storage import Floats, TokenRecords

WINDOWS = (2, 3, 4, 6, 9, 13, 18, 25, 32, 40)


def reference(records: TokenRecords) -> Floats:
    """LL - LL of the reference.

    Source: Carlini et al., USENIX Security 2021; Watson et al., "On the Importance of Difficulty Calibration", 2022.
    """
    return _segments.means(records, _gain(records))


def ratio(records: TokenRecords) -> Floats:
    """-nll / nll of the reference."""
    own, other = (_segments.means(records, records[name]) for name in ("logprob", "reference.logprob"))
    return own / np.maximum(-other, 1e-10)


def reference_only(records: TokenRecords) -> Floats:
    """LL of the reference: a control. A model that saw neither side must not tell them apart."""
    return _segments.means(records, records["reference.logprob"])


def ez_mia(records: TokenRecords) -> Floats:
    """ln((sum of gains + e) / (sum of losses + e)) over tokens that the model gets wrong, e = 1e-12.

    The gain of a token is log p - log p of the reference. The first scored token of a text is left out; a text with
    fewer than two wrong tokens has score 0, which speaks neither way. (The authors' code gives the ratio itself, and 0
    where there is no loss, which would be its largest score.)

    Source: EZ-MIA, arXiv 2601.12104, and the authors' code.
    """
    use = (records["correct"] == 0) & (_segments.position(records) > 0)
    gain = np.where(use, _gain(records), 0.0)
    up, down = (_segments.sums(records, np.maximum(part, 0.0)) for part in (gain, -gain))
    enough = _segments.sums(records, use.astype(np.float64)) >= 2
    return np.where(enough, np.log(up + 1e-12) - np.log(down + 1e-12), 0.0)


def wbc(records: TokenRecords, *, windows: Sequence[int] = WINDOWS) -> Floats:
    """Mean over window lengths w of the share of windows in which the reference's loss is larger than the model's.

    Strictly larger; a text shorter than w is one window.

    Source: WBC, arXiv 2601.02751.
    """
    if not windows or min(windows) < 1:
        raise ValueError(f"windows must be at least one length, each at least 1; got {tuple(windows)}")
    gain, place = _gain(records), _segments.position(records)
    length = np.repeat(records.lengths, records.lengths)
    score = np.zeros(len(records))
    for width in windows:
        own = np.minimum(width, length)
        total = np.zeros(len(gain))
        for j in range(width):  # no differences of running sums: ties must stay ties
            total += np.where(j < own, gain[np.minimum(np.arange(len(gain)) + j, len(gain) - 1)], 0.0)
        whole = place + own <= length
        won = _segments.sums(records, (whole & (total > 0)).astype(np.float64))
        score += won / _segments.sums(records, whole.astype(np.float64))
    return score / len(windows)


def informia(records: TokenRecords, *, k: float = 1.0) -> Floats:
    """Mean of log p(x_t) - log p_ref(x_t) + KL(p_ref || p), over all tokens, or the share k with the smallest.

    Source: InfoRMIA, arXiv 2510.05582, at token level, with one reference.
    """
    return _segments.lowest_mean(records, _gain(records) + records["kl"], k)


def _gain(records: TokenRecords) -> Floats:
    return records["logprob"] - records["reference.logprob"]
