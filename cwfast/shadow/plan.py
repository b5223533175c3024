"""Who trains on what, fixed before anything is trained."""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cwfast.checkpoint.files import atomic_write
from cwfast.errors import CheckpointError

FORMAT = "cwfast-plan/1"


@dataclass(frozen=True, eq=False)
class Plan:
    """K models, N audited samples. Two plans are the same if their ``sha256`` is.

    Attributes:
        ids: int64 [N]: the audited samples' indices in the data set, all different.
        membership: bool [K, N]: model k trains on sample ``ids[i]``.
        reference: int64 [R]: samples that no model trains on and none is audited on; a defense may use them.
        seeds: K of them, one per model: initial weights, order of the samples.

    Raises:
        TypeError, ValueError: something does not hold what is written above.
    """

    ids: Tensor
    membership: Tensor
    reference: Tensor
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, value in (("ids", self.ids), ("reference", self.reference)):
            if value.dtype != torch.int64 or value.ndim != 1:
                raise TypeError(f"{name} must be int64 with one dimension; got {value.dtype} {tuple(value.shape)}")
            if len(value.unique()) != len(value) or (len(value) and int(value.min()) < 0):
                raise ValueError(f"{name} must be distinct and at least 0; got repeats or a negative index")
        if self.membership.dtype != torch.bool or self.membership.shape != (len(self.seeds), len(self.ids)):
            given = f"{self.membership.dtype} {tuple(self.membership.shape)}"
            raise ValueError(f"membership must be bool [K, N] = {(len(self.seeds), len(self.ids))}; got {given}")
        if not self.seeds or not len(self.ids):
            raise ValueError(f"a plan must have a model and a sample; got {tuple(self.membership.shape)}")
        if not all(isinstance(seed, int) and 0 <= seed < 2**63 for seed in self.seeds):
            raise ValueError("seeds must be integers from 0 to 2^63 - 1")
        shared = int(torch.isin(self.reference, self.ids).sum())
        if shared:  # they would be members in all but name: a defense trains on them for every model
            raise ValueError(f"reference must share no sample with the audited ones; got {shared} of both")

    @classmethod
    def halves(cls, pool: Tensor, reference: Tensor, models: int, seed: int) -> "Plan":
        """Models 2j and 2j + 1 train on complementary halves of the pool, so each sample is in exactly half the models.

        Args:
            pool: int64 [N], N even (the models of a fleet train on equally many samples): the audited samples.
            reference: int64 [R], none of the pool.
            models: an even number.
            seed: of the halves, and of the models' seeds: ``1000 * seed + k``.

        Raises:
            ValueError: one of them is not so.

        Source:
            Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022, section IV; the pairs:
            Zarifzadeh, Liu & Shokri, "Low-Cost High-Power Membership Inference Attacks", ICML 2024, section 4.
        """
        if models < 2 or models % 2:
            raise ValueError(f"models must be an even number, at least 2; got {models}")
        if pool.ndim != 1 or len(pool) < 2 or len(pool) % 2:
            raise ValueError(f"pool must hold an even number of samples, at least 2; got shape {tuple(pool.shape)}")
        generator = torch.Generator().manual_seed(seed)
        membership = torch.zeros(models, len(pool), dtype=torch.bool)
        for first in range(0, models, 2):
            membership[first, torch.randperm(len(pool), generator=generator)[: len(pool) // 2]] = True
            membership[first + 1] = ~membership[first]
        return cls(pool, membership, reference, tuple(1000 * seed + k for k in range(models)))

    @property
    def models(self) -> int:
        """K."""
        return len(self.seeds)

    def train_ids(self, model: int) -> Tensor:
        """int64: what a model trains on, in the order of ``ids``."""
        return self.ids[self.membership[model]]

    @cached_property
    def sha256(self) -> str:
        """Of all of it."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    @property
    def expected(self) -> dict[str, Any]:
        """What the signals of this plan must be: for ``Signals.require`` and the ``plan`` of ``mia.audit``."""
        return {"membership": self.membership, "ids": self.ids, "plan": self.sha256, "seeds": list(self.seeds)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, whole or not at all; a row of the membership is its bits in hexadecimal, the lowest first.

        Raises:
            OSError: the folder does not exist or cannot be written.
        """
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({**self._content(), "sha256": self.sha256}) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: it is no such file, or its content is not what its hash says.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"it says format {content['format']!r}")
            ids = torch.tensor(content["ids"], dtype=torch.int64)
            rows = [np.frombuffer(bytes.fromhex(row), np.uint8) for row in content["membership"]]
            flags = np.stack([np.unpackbits(row, count=len(ids), bitorder="little") for row in rows])
            reference = torch.tensor(content["reference"], dtype=torch.int64)
            plan = cls(ids, torch.from_numpy(flags).bool(), reference, tuple(content["seeds"]))
            if plan.sha256 != content["sha256"]:
                raise ValueError("its SHA-256 differs")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} must hold a plan as it was written; {error}") from error
        return plan

    def _content(self) -> dict[str, Any]:
        rows = np.packbits(self.membership.numpy(), axis=1, bitorder="little")
        return {
            "format": FORMAT,
            "ids": self.ids.tolist(),
            "reference": self.reference.tolist(),
            "seeds": list(self.seeds),
            "membership": [row.tobytes().hex() for row in rows],
        }
