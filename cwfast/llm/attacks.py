"""Attacks as reductions over token records; every score: larger = more likely a member.

``LL`` is the mean log-probability of a text's scored tokens, ``nll = -LL``, ``L`` their number.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cwfast.llm.likelihoods import dc_pdd, loss, min_k, min_k_pp, surp, zlib
from cwfast.llm.pairs import ez_mia, informia, ratio, reference, reference_only, wbc
from cwfast.llm.repeated import con_recall, gradient_norm, lowercase, neighbourhood, pac, recall
from cwfast.llm.shadowed import base, lira, rmia
from cwfast.llm.storage import Floats, TokenRecords


class Attack(NamedTuple):
    """A function of token records, its options, and what it needs besides records of the texts.

    ``needs``: "reference" and "kl" (records made with them), or keyword arguments by name.
    """

    function: Callable[..., Floats]
    needs: tuple[str, ...] = ()
    options: Mapping[str, Any] = {}


ATTACKS: dict[str, Attack] = {
    "loss": Attack(loss),
    "zlib": Attack(zlib),
    "min_k": Attack(min_k),
    "min_k_pp": Attack(min_k_pp),
    "surp": Attack(surp),
    "dc_pdd": Attack(dc_pdd, ("counts",)),
    "lowercase": Attack(lowercase, ("lower",)),
    "neighbourhood": Attack(neighbourhood, ("neighbours",)),
    "pac": Attack(pac, ("swapped",)),
    "recall": Attack(recall, ("prefixed",)),
    "con_recall": Attack(con_recall, ("prefixed", "member_prefixed")),
    "gradient_norm": Attack(gradient_norm, ("norms",)),
    "reference": Attack(reference, ("reference",)),
    "ratio": Attack(ratio, ("reference",)),
    "ez_mia": Attack(ez_mia, ("reference",)),
    "wbc": Attack(wbc, ("reference",)),
    "informia": Attack(informia, ("reference", "kl")),
    "lira": Attack(lira, ("shadows", "membership")),
    "rmia": Attack(rmia, ("shadows", "membership")),
    "base": Attack(base, ("shadows", "membership")),
}


def attack(name: str, records: TokenRecords, **given: Any) -> Floats:
    """Scores of the texts by an attack of ``ATTACKS``.

    Args:
        name: of the attack.
        records: of the N texts.
        given: what the attack needs besides, and its options.

    Returns:
        float64 [N], larger = more likely a member.

    Raises:
        ValueError: an unknown attack.
        KeyError: the records lack what it reads.
        TypeError: an argument that it needs is missing, or one that it does not know.
    """
    if name not in ATTACKS:
        raise ValueError(f"name must be among {', '.join(ATTACKS)}; got {name!r}")
    chosen = ATTACKS[name]
    missing = [need for need in chosen.needs if need not in ("reference", "kl") and need not in given]
    if missing:
        raise TypeError(f"the attack {name} must be given {missing[0]}; got {', '.join(given) or 'nothing besides'}")
    return chosen.function(records, **{**chosen.options, **given})


__all__ = [
    "ATTACKS",
    "Attack",
    "attack",
    "base",
    "con_recall",
    "dc_pdd",
    "ez_mia",
    "gradient_norm",
    "informia",
    "lira",
    "loss",
    "lowercase",
    "min_k",
    "min_k_pp",
    "neighbourhood",
    "pac",
    "ratio",
    "recall",
    "reference",
    "reference_only",
    "rmia",
    "surp",
    "wbc",
    "zlib",
]
