"""What attacks on a language model are given, the records that they need, and their scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cwfast.errors import CheckpointError, UnsupportedLayer
from cwfast.llm import variants
from cwfast.llm.attacks import ATTACKS, attack
from cwfast.llm.gradients import gradient_norms
from cwfast.llm.recording import records
from cwfast.llm.storage import Floats, TokenRecords
from cwfast.llm.texts import all_as_read

PREFIX_SHOTS = 3
_SOURCES = {  # why an attack cannot run, by what it lacks
    "reference": "a reference model (--reference)",
    "kl": "a reference model (--reference)",
    "counts": "a corpus of other texts (--corpus)",
    "prefixed": "non-members that are not audited (--shots)",
    "member_prefixed": "members that are not audited (--member-shots)",
    "shadows": "shadow models (--shadow)",
    "membership": "shadow models (--shadow)",
}


@dataclass(frozen=True)
class Inputs:
    """What is audited, and what some attacks need besides."""

    model: Any
    tokenizer: Any
    members: Sequence[str]
    nonmembers: Sequence[str]
    reference: Any = None
    shots: Sequence[str] = ()  # non-members, not audited
    member_shots: Sequence[str] = ()
    corpus: Sequence[str] = ()
    shadows: Sequence[tuple[Any, Sequence[str]]] = ()  # a model or what loads it, and the texts it was trained on
    max_tokens: int | None = None
    seed: int = 0
    copies: int = 5
    how: Mapping[str, Any] = field(default_factory=dict)  # further arguments of records()
    out: Path | None = None
    progress: Callable[[str], object] = lambda stage: None

    @property
    def texts(self) -> list[str]:
        """Members, then non-members."""
        return [*self.members, *self.nonmembers]

    @cached_property
    def read(self) -> list[str]:
        """The texts as far as attacks read them: controls, and changed copies, are of no more than that."""
        return all_as_read(self.tokenizer, self.texts, self.max_tokens)

    @property
    def flags(self) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """bool [N]."""
        return np.arange(len(self.texts)) < len(self.members)

    def lacks(self, name: str) -> str | None:
        """What an attack would need and is not there, or None."""
        have = {
            "reference": self.reference is not None,
            "kl": self.reference is not None,
            "counts": bool(self.corpus),
            "prefixed": bool(self.shots),
            "member_prefixed": bool(self.member_shots),
            "shadows": len(self.shadows) > 1,
            "membership": len(self.shadows) > 1,
        }
        return next((_SOURCES[need] for need in ATTACKS[name].needs if not have.get(need, True)), None)


def scores(
    inputs: Inputs, attacks: Sequence[str], skip: bool
) -> tuple[dict[str, Floats], TokenRecords, dict[str, str]]:
    """Scores [N] of each attack, the records, and with ``skip`` why an attack could not run."""
    texts, needs = inputs.texts, {need for name in attacks for need in ATTACKS[name].needs}
    made: dict[str, Any] = {}
    failed: dict[str, str] = {}  # what could not be made, and why

    def recorded(which: str, given: Sequence[str], **more: Any) -> TokenRecords:
        folder = None if inputs.out is None else inputs.out / "records" / which
        more = {**inputs.how, "max_tokens": inputs.max_tokens, "out": folder, **more}
        inputs.progress(f"reading {len(given):,} texts ({which})")
        return records(more.pop("model", inputs.model), inputs.tokenizer, given, **more)

    def tried(name: str, make: Callable[[], Any], reasons: dict[str, str]) -> Any:
        try:
            return make()
        except CheckpointError:
            raise
        except (ValueError, TypeError, UnsupportedLayer) as error:
            if not skip:
                raise
            reasons[name] = f"cannot run here: {error}"
            return None

    def changed(name: str, given: Sequence[str]) -> TokenRecords:
        return recorded(name, given, max_tokens=None)  # they are of what is read already

    def prefixed(shots: Sequence[str]) -> Callable[[str], TokenRecords]:
        return lambda name: recorded(name, texts, prefix=_prefix(inputs, shots))

    def norms(name: str) -> Any:
        inputs.progress(f"gradients of {len(texts):,} texts")
        file = None if inputs.out is None else inputs.out / "records" / f"{name}.safetensors"
        how: dict[str, Any] = {"max_tokens": inputs.max_tokens, "autocast": inputs.how.get("autocast"), "out": file}
        return gradient_norms(inputs.model, inputs.tokenizer, texts, **how)

    def shadow(i: int) -> TokenRecords:
        one = inputs.shadows[i][0]
        return recorded(f"shadow-{i}", texts, model=one if isinstance(one, nn.Module) else one())

    copies: dict[str, Any] = {"copies": inputs.copies, "seed": inputs.seed}
    makers: dict[str, Callable[[str], Any]] = {
        "lower": lambda name: changed(name, variants.lowercased(inputs.read)),
        "neighbours": lambda name: changed(name, variants.neighbours(inputs.read, **copies)),
        "swapped": lambda name: changed(name, variants.swapped(inputs.read, **copies)),
        "prefixed": prefixed(inputs.shots),
        "member_prefixed": prefixed(inputs.member_shots),
        "counts": lambda _: variants.token_counts(
            inputs.tokenizer, inputs.corpus, inputs.model.get_output_embeddings().weight.shape[0]
        ),
        "norms": norms,
        "shadows": lambda _: [shadow(i) for i in range(len(inputs.shadows))],
    }
    own = None
    if "kl" in needs:
        own = tried("kl", lambda: recorded("texts-kl", texts, reference=inputs.reference, kl=True), failed)
    if own is None:
        own = recorded("texts", texts, reference=inputs.reference, kl=False)
    for need, make in makers.items():
        if need in needs:
            made[need] = tried(need, lambda need=need, make=make: make(need), failed)  # type: ignore[misc]
    if "shadows" in needs:
        sides = [set(inputs.members), *(set(known) for _, known in inputs.shadows)]
        made["membership"] = np.array([[text in side for text in texts] for side in sides])
    scored: dict[str, Floats] = {}
    left_out: dict[str, str] = {}
    for name in attacks:
        lost = next((failed[need] for need in ATTACKS[name].needs if need in failed), None)
        if lost is not None:
            left_out[name] = lost
            continue
        given = {need: made[need] for need in ATTACKS[name].needs if need in made}
        score = tried(name, lambda name=name, given=given: attack(name, own, **given), left_out)  # type: ignore[misc]
        if score is not None:
            scored[name] = score
    if not scored:
        raise ValueError(f"at least one attack must be able to run; {next(iter(left_out.values()))}")
    return scored, own, left_out


def _prefix(inputs: Inputs, shots: Sequence[str]) -> list[int]:
    """The first shots, each cut as the texts are, one after another."""
    rows = inputs.tokenizer(list(shots[:PREFIX_SHOTS]), add_special_tokens=False)["input_ids"]
    return [token for row in rows for token in row[: inputs.max_tokens]]
