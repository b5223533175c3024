"""Attacks that look at a text again: changed, after other texts, or by its gradient."""

import numpy as np

from cwfast.llm import _segments
from cwfast.llm.likelihoods import loss
from cwfast.llm.storage import Floats, TokenRecords
from cwfast.mia._inputs import Array, to_numpy


def lowercase(records: TokenRecords, *, lower: TokenRecords) -> Floats:
    """nll of the text in lower case / nll.

    Source: Carlini et al., USENIX Security 2021.
    """
    _fits("lower", lower, records, 1)
    return loss(lower) / np.minimum(loss(records), -1e-10)


def neighbourhood(records: TokenRecords, *, neighbours: TokenRecords) -> Floats:
    """LL - mean over a text's J neighbours of theirs.

    Args:
        records: of the N texts.
        neighbours: of J N texts: J for the first, then J for the second, ...

    Source: Mattern et al., "Membership Inference Attacks against Language Models via Neighbourhood Comparison", 2023
        (neighbours there come from a masked language model).
    """
    copies = _copies("neighbours", neighbours, records)
    return loss(records) - loss(neighbours).reshape(-1, copies).mean(axis=1)


def pac(records: TokenRecords, *, swapped: TokenRecords, top: float = 0.05, bottom: float = 0.3) -> Floats:
    """Mean over a text's J copies with swapped words of D, minus its own; D = mean of the largest log p - the smallest.

    max(1, int(top L)) are the largest and max(1, int(bottom L)) the smallest.

    Args:
        records: of the N texts.
        swapped: of J N texts, as in ``neighbourhood``.
        top: share of the largest.
        bottom: share of the smallest.

    Source: Ye et al., "Data Contamination Calibration for Black-box LLMs" (PAC), 2024.
    """
    copies = _copies("swapped", swapped, records)
    own, other = (
        -_segments.lowest_mean(one, -one["logprob"], top) - _segments.lowest_mean(one, one["logprob"], bottom)
        for one in (records, swapped)
    )
    return other.reshape(-1, copies).mean(axis=1) - own


def recall(records: TokenRecords, *, prefixed: TokenRecords) -> Floats:
    """LL after a prefix of non-members / LL.

    Args:
        records: of the N texts.
        prefixed: of the same texts, made with ``prefix=``; the texts in it must not be audited themselves.

    Source: Xie et al., "ReCaLL: Membership Inference via Relative Conditional Log-Likelihoods", EMNLP 2024.
    """
    _fits("prefixed", prefixed, records, 1)
    return loss(prefixed) / np.minimum(loss(records), -1e-10)


def con_recall(
    records: TokenRecords, *, prefixed: TokenRecords, member_prefixed: TokenRecords, gamma: float = 0.5
) -> Floats:
    """(nll after a prefix of non-members - gamma nll after one of members) / nll.

    Args:
        records: of the N texts.
        prefixed: after non-members.
        member_prefixed: after members, which an attacker has to know; they must not be audited themselves.
        gamma: weight of the members' prefix.

    Source: Wang et al., "Con-ReCall: Detecting Pre-training Data in LLMs via Contrastive Decoding", COLING 2025.
    """
    _fits("prefixed", prefixed, records, 1)
    _fits("member_prefixed", member_prefixed, records, 1)
    return (loss(prefixed) - gamma * loss(member_prefixed)) / np.minimum(loss(records), -1e-10)


def gradient_norm(records: TokenRecords, *, norms: Array) -> Floats:
    """-(norm of the gradient of the text's loss).

    Args:
        records: of the N texts.
        norms: [N], of ``gradient_norms``.

    Source: Duan et al., "Do Membership Inference Attacks Work on Large Language Models?" (MIMIR), COLM 2024.
    """
    found = to_numpy("norms", norms, "f")
    if found.shape != (len(records),):
        raise ValueError(f"norms must have shape [N] = ({len(records)},); got {found.shape}")
    return -found


def _fits(name: str, other: TokenRecords, records: TokenRecords, copies: int) -> None:
    if len(other) != copies * len(records):
        raise ValueError(f"{name} must be records of {copies * len(records)} texts; got {len(other)}")


def _copies(name: str, other: TokenRecords, records: TokenRecords) -> int:
    copies = max(1, len(other) // max(1, len(records)))
    _fits(name, other, records, copies)
    return copies
