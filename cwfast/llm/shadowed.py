"""LiRA, RMIA and BASE with fine-tuned models as references: ``cwfast.mia`` on a text's mean log-probability."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cwfast.llm.likelihoods import loss
from cwfast.llm.storage import Floats, TokenRecords
from cwfast.mia import attacks as mia
from cwfast.mia._inputs import Array


def lira(records: TokenRecords, *, shadows: Sequence[TokenRecords], membership: Array, **options: Any) -> Floats:
    """LiRA on phi = LL - ln(1 - e^LL), the log-odds of the geometric mean of a text's token probabilities.

    Args:
        records: of the N texts by the target.
        shadows: of the same texts by K other models, such as LoRA fine-tunes of the base on random halves.
        membership: bool [1 + K, N], who was trained on what, the target first.
        options: of ``cwfast.mia.lira``.
    """
    logprob = _signal(records, shadows)
    phi = logprob - np.log(-np.expm1(np.minimum(logprob, -1e-12)))
    return mia.lira(phi, membership, 0, **options)


def rmia(records: TokenRecords, *, shadows: Sequence[TokenRecords], membership: Array, **options: Any) -> Floats:
    """RMIA on LL; gamma is 1 unless given, as ratios of such means are close to 1.

    Args:
        records: of the N texts by the target.
        shadows: as for ``lira``.
        membership: as for ``lira``.
        options: of ``cwfast.mia.rmia``.
    """
    return mia.rmia(_signal(records, shadows), membership, 0, **{"gamma": 1.0, **options})


def base(records: TokenRecords, *, shadows: Sequence[TokenRecords], membership: Array, **options: Any) -> Floats:
    """BASE on LL.

    Args:
        records: of the N texts by the target.
        shadows: as for ``lira``.
        membership: as for ``lira``.
        options: of ``cwfast.mia.base``.
    """
    return mia.base(_signal(records, shadows), membership, 0, **options)


def _signal(records: TokenRecords, shadows: Sequence[TokenRecords]) -> Floats:
    if not shadows:
        raise ValueError("shadows must be records of at least one model; got none")
    for i, one in enumerate(shadows):
        if len(one) != len(records) or not np.array_equal(one.tokens, records.tokens):
            raise ValueError(f"shadows must be records of the same tokens; those of shadow {i} differ")
    return np.minimum(np.stack([loss(one) for one in (records, *shadows)]), 0.0)
