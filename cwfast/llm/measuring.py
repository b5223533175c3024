"""What one fine-tuned model gives away and what it is worth: attacks, and perplexity of texts that nobody trained on.

Many models are measured on the same texts: what does not depend on them (the base model's records, the shadows') is
made once.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from cwfast.llm import _segments
from cwfast.llm._segments import Bools
from cwfast.llm.attacks import ATTACKS, attack
from cwfast.llm.auditing import judged
from cwfast.llm.recording import records
from cwfast.llm.storage import TokenRecords
from cwfast.llm.windows import documents

Ids = Sequence[Sequence[int]]
DEFAULT = ("reference", "ez_mia", "wbc", "min_k_pp", "loss")  # of attacks, the main one first
WITH_SHADOWS = ("rmia",)


class Meter:
    """Measures models on one set of texts.

    Args:
        base: the model before fine-tuning, the reference of the attacks that take one; or its records (``read``).
        members: token ids of texts that the models were trained on.
        nonmembers: of texts from the same source that they were not.
        heldout: of texts whose perplexity is told; they may be the non-members.
        attacks: names of ``cwfast.llm.ATTACKS`` that need no more than a reference, or "rmia" with shadows.
        shadows: models trained like the audited one on other texts: a function that loads it (one is in memory at a
            time) or its records, and a bool [N] of which members and non-members it was trained on.
        fprs: false-positive rates for TPR at FPR.
        bootstrap: replicates for all intervals, at least 1.
        confidence: of the intervals.
        seed: of the bootstrap: replicates of two models are pairs.
        batch_tokens: of a batch.

    Raises:
        ValueError: an attack that needs what is not there, records of other texts; and as ``records`` does.
    """

    def __init__(
        self,
        base: Any,
        members: Ids,
        nonmembers: Ids,
        heldout: Ids,
        *,
        attacks: Sequence[str] = DEFAULT,
        shadows: Sequence[tuple[Callable[[], Any] | TokenRecords, Bools]] = (),
        fprs: Sequence[float] = (0.01,),
        bootstrap: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
        batch_tokens: int = 1024,
    ) -> None:
        if bootstrap < 1:
            raise ValueError(f"bootstrap must be at least 1; got {bootstrap}")
        self.attacks = (*attacks, *(WITH_SHADOWS if shadows else ()))
        for name in self.attacks:
            needs = set(ATTACKS[name].needs) - {"reference", *(("shadows", "membership") if shadows else ())}
            if needs:
                raise ValueError(f"attacks must need no more than a reference; {name} needs {', '.join(sorted(needs))}")
        self._texts, ends = _arranged(members, nonmembers, heldout)
        self._parts = {name: range(*ends[name]) for name in ("members", "nonmembers", "heldout")}
        self.flags = np.arange(ends["nonmembers"][1]) < len(members)
        self._how: dict[str, Any] = {"fprs": fprs, "bootstrap": bootstrap, "confidence": confidence, "seed": seed}
        self._batch_tokens = batch_tokens
        self._base = self._read(base)
        own = (one if isinstance(one, TokenRecords) else one() for one, _ in shadows)
        self._shadows = [self._audited(self._read(one)) for one in own]
        self._membership = np.array([self.flags, *(trained for _, trained in shadows)], dtype=bool)

    def __call__(self, model: Any) -> dict[str, Any]:
        """What came out for a model, or for its records (``read``), JSON-able.

        Returns:
            ``perplexity`` with ``perplexity_low`` and ``perplexity_high`` (bootstrap over texts), ``loss`` of the
            mean token of members, non-members and held-out texts, ``attacks`` by name (``auditing.judged``), and
            ``draws`` of log-perplexity and of each attack's AUC, replicate by replicate, for paired differences.
        """
        return self._measured(self._read(model))

    def base(self) -> dict[str, Any]:
        """The same of the base model, which needs no pass; attacks that compare with it can only guess."""
        return self._measured(self._base)

    def _measured(self, every: TokenRecords) -> dict[str, Any]:
        parts = {name: every.select(list(which)) for name, which in self._parts.items()}
        loss = {name: _token_loss(part) for name, part in parts.items()}
        own = self._audited(every)
        before = {f"reference.{name}": value for name, value in self._audited(self._base).values.items()}
        both = TokenRecords(own.offsets, own.tokens, {**own.values, **before}, own.zlib, own.manifest)
        found, draws = {}, {}
        for name in self.attacks:
            more = {"shadows": self._shadows, "membership": self._membership} if name in WITH_SHADOWS else {}
            found[name] = judged(attack(name, both, **more), self.flags, {**self._how, "draws": True})
            draws[name] = found[name].pop("auc_draws")
        draws["log_perplexity"] = self._loss_draws(parts["heldout"])
        tail = (1 - self._how["confidence"]) / 2
        low, high = np.exp(np.quantile(draws["log_perplexity"], [tail, 1 - tail])).tolist()
        return {
            "perplexity": float(np.exp(loss["heldout"])),
            "perplexity_low": low,
            "perplexity_high": high,
            "loss": loss,
            "attacks": found,
            "draws": draws,
        }

    def _loss_draws(self, heldout: TokenRecords) -> list[float]:
        """The mean token's loss over texts drawn with replacement, the same draws for every model."""
        sums, lengths = -_segments.sums(heldout, heldout["logprob"]), heldout.lengths
        rng = np.random.default_rng(self._how["seed"])
        drawn = rng.integers(0, len(sums), (self._how["bootstrap"], len(sums)))
        return (sums[drawn].sum(axis=1) / lengths[drawn].sum(axis=1)).tolist()

    def _read(self, model: Any) -> TokenRecords:
        if not isinstance(model, TokenRecords):
            return records(model, None, self._texts, batch_tokens=self._batch_tokens)
        scored = [text[1:] for text in self._texts]
        if model.lengths.tolist() != list(map(len, scored)) or model.tokens.tolist() != [
            t for row in scored for t in row
        ]:
            raise ValueError("records must be of this Meter's texts (cwfast.llm.measuring.read); they are of others")
        return model

    def _audited(self, every: TokenRecords) -> TokenRecords:
        return every.select(list(range(len(self.flags))))


def read(
    model: Any,
    members: Ids,
    nonmembers: Ids,
    heldout: Ids,
    *,
    batch_tokens: int = 1024,
    out: str | os.PathLike[str] | None = None,
) -> TokenRecords:
    """The records that a ``Meter`` of these texts takes in place of the model: they can be kept, the model need not.

    Raises:
        ValueError, TypeError, UnsupportedLayer, CheckpointError: as ``records`` does, which ``out`` goes to.
    """
    return records(model, None, _arranged(members, nonmembers, heldout)[0], batch_tokens=batch_tokens, out=out)


def token_loss(model: Any, texts: Ids, *, batch_tokens: int = 1024) -> float:
    """Mean loss of the tokens of all texts, in nats, the first token of each left out.

    Raises:
        ValueError, TypeError, UnsupportedLayer: as ``records`` does.
    """
    return _token_loss(records(model, None, texts, batch_tokens=batch_tokens))


def tokenized(tokenizer: Any, texts: Sequence[str], max_tokens: int | None) -> list[list[int]]:
    """Token ids of the first ``max_tokens`` of each text, and before them BOS where the tokenizer adds it by itself.

    Raises:
        ValueError: a text without a token that would be predicted.
    """
    return [document.ids for document in documents(tokenizer, texts, max_tokens=max_tokens)]


def _arranged(members: Ids, nonmembers: Ids, heldout: Ids) -> tuple[list[list[int]], dict[str, tuple[int, int]]]:
    """What is read, each text once, and where each side begins and ends in it."""
    texts = [list(map(int, text)) for text in (*members, *nonmembers)]
    further = [list(map(int, text)) for text in heldout]
    m, n = len(members), len(texts)
    again = further == texts[m:]
    ends = {"members": (0, m), "nonmembers": (m, n), "heldout": (m, n) if again else (n, n + len(further))}
    return (texts if again else texts + further), ends


def _token_loss(own: TokenRecords) -> float:
    return float(-torch.mean(own.values["logprob"].double()))
