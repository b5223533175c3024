"""What patterns of parameter names mean, and which parameters compete with one another in a selection."""

import fnmatch
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Real

Scope = str | Mapping[str, float]


def groups_of(
    numel: Mapping[str, int],
    rate: float | None,
    k: int | None,
    scope: Scope,
    exclude: Sequence[str] | None,
) -> list[tuple[list[str], int]]:
    """Which parameters compete with one another, and for how many places."""
    check_patterns(exclude=exclude)
    names = [name for name in numel if first_match(name, exclude or ()) is None]
    if isinstance(scope, Mapping):
        for pattern in scope:
            if not any(first_match(name, [pattern]) is not None for name in numel):
                raise ValueError(f"each pattern of scope must match a parameter; {pattern!r} matches none")
        if rate is not None or k is not None:
            raise ValueError("scope={pattern: rate} holds the rates; rate and k must not be given beside it")
        pattern_of = {name: first_match(name, list(scope)) for name in names}
        return [([name], count(scope[p], numel[name])) for name, p in pattern_of.items() if p is not None]
    if (rate is None) == (k is None):
        raise ValueError(f"either rate or k must be given; got rate={rate}, k={k}")
    if scope == "layer":
        if rate is None:
            raise ValueError("scope 'layer' takes a rate; got k")
        return [([name], count(rate, numel[name])) for name in names]
    if scope != "global":
        raise ValueError(f"scope must be 'global', 'layer' or a mapping {{pattern: rate}}; got {scope!r}")
    return [(names, count(rate, sum(numel[name] for name in names)) if k is None else k)]  # type: ignore[arg-type]


def check_patterns(**arguments: Sequence[str] | None) -> None:
    """Each is None or a sequence of patterns: a string would be taken letter by letter.

    Raises:
        TypeError: one is a string; the message names it.
    """
    for argument, patterns in arguments.items():
        if isinstance(patterns, str):
            raise TypeError(f"{argument} must be a sequence of patterns, such as [{patterns!r}]; got a string")


def first_match(name: str, patterns: Sequence[str]) -> str | None:
    """The first ``fnmatch`` pattern that the name matches."""
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)


def count(rate: float, numel: int) -> int:
    """``floor(rate * numel)``, of the decimal that was written: 0.29 of 100 is 29."""
    if isinstance(rate, bool) or not isinstance(rate, Real):
        raise TypeError(f"rate must be a number; got {rate!r}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must lie between 0 and 1; got {rate}")
    return int(Fraction(str(rate)) * numel)
