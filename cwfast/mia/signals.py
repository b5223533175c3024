"""What attacks need of every model on every sample: signals, who was trained on what, and where they come from."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cwfast import ops
from cwfast.checkpoint.files import atomic_write
from cwfast.errors import CheckpointError
from cwfast.mia._inputs import Array, choice
from cwfast.mia.published import phi_carlini

FORMAT = "cwfast-signals/1"
NAMES = ("loss", "confidence", "phi", "entropy", "modified_entropy", "correct", "margin", "gradient_norm")


@dataclass(frozen=True)
class Signals:
    """Numbers of K models on N samples, Q queries of each, and who was trained on what.

    Attributes:
        values: by name (of ``NAMES``), each [K, N, Q] on the CPU, floating point (``correct``: bool).
        membership: bool [K, N]: model k was trained on sample i.
        labels: int64 [N], or None.
        ids: int64 [N]: the samples' numbers in their data set, all different; 0 .. N - 1 by default.
        manifest: JSON-able: whatever tells these signals from others. By custom ``model``, ``data`` (its hash),
            ``defense`` and ``seeds`` (K of them), and what a plan of shadow models adds.

    Raises:
        TypeError, ValueError: something does not hold what is written above.
    """

    values: Mapping[str, Tensor]
    membership: Tensor
    labels: Tensor | None = None
    ids: Tensor | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"values must hold at least one of {', '.join(NAMES)}; got none")
        shape = next(iter(self.values.values())).shape
        if len(shape) != 3 or 0 in shape:
            raise ValueError(f"values must have shape [K, N, Q], none of them 0; got {tuple(shape)}")
        for name, value in self.values.items():
            if name not in NAMES:
                raise ValueError(f"values must be named {', '.join(NAMES)}; got {name!r}")
            right = value.dtype == torch.bool if name == "correct" else value.is_floating_point()
            if not right:
                expected = "dtype bool" if name == "correct" else "a floating-point dtype"
                raise TypeError(f"{name} must have {expected}; got {value.dtype}")
            if value.shape != shape:
                raise ValueError(f"{name} must have the shape of the others, {tuple(shape)}; got {tuple(value.shape)}")
        samples = shape[1]
        if self.membership.dtype != torch.bool or self.membership.shape != shape[:2]:
            given = f"{self.membership.dtype} {tuple(self.membership.shape)}"
            raise ValueError(f"membership must be bool [K, N] = {tuple(shape[:2])}; got {given}")
        if self.ids is None:
            object.__setattr__(self, "ids", torch.arange(samples))
        for name, numbers in (("labels", self.labels), ("ids", self.ids)):
            if numbers is not None and (numbers.dtype != torch.int64 or numbers.shape != (samples,)):
                given = f"{numbers.dtype} {tuple(numbers.shape)}"
                raise ValueError(f"{name} must be int64 [N] = [{samples}]; got {given}")
        if self.ids is not None and len(self.ids.unique()) != samples:
            raise ValueError(f"ids must be distinct; got {samples - len(self.ids.unique())} repeats")
        text = json.dumps(dict(self.manifest), allow_nan=False, sort_keys=True)  # TypeError: not JSON-able
        object.__setattr__(self, "manifest", json.loads(text))

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        labels: Tensor,
        membership: Array,
        *,
        ids: Tensor | None = None,
        manifest: Mapping[str, Any] | None = None,
        phi_mode: str = "lse",
        backend: str = "auto",
    ) -> "Signals":
        """All that ``cwfast.ops.logit_stats`` gives.

        Args:
            logits: [K, N, C] or [K, N, Q, C], floating point, on any device; read one model at a time.
            labels: [N] int64, each in 0 .. C - 1.
            membership: bool [K, N].
            ids: see the class.
            manifest: see the class.
            phi_mode: "lse", or "carlini" for phi as LiRA's released code has it (``phi_carlini``).
            backend: of ``logit_stats``.

        Raises:
            TypeError, ValueError: a wrong dtype or shape, or a sample whose largest logit is not finite.
        """
        choice("phi_mode", phi_mode, ("lse", "carlini"))
        if logits.ndim not in (3, 4):
            raise ValueError(f"logits must have shape [K, N, C] or [K, N, Q, C]; got {tuple(logits.shape)}")
        full = logits if logits.ndim == 4 else logits[:, :, None]
        models, samples, queries, classes = full.shape
        if labels.shape != (samples,):
            raise ValueError(f"labels must have shape [N] = [{samples}]; got {tuple(labels.shape)}")
        each = labels.to(full.device).repeat_interleave(queries)
        found = [ops.logit_stats(one.reshape(-1, classes), each, backend=backend) for one in full]
        values = {
            name: torch.stack([getattr(one, name) for one in found]).cpu().reshape(models, samples, queries)
            for name in (found[0]._fields if found else ())
        }
        lost = int(values["loss"].isnan().sum()) if values else 0
        if lost:
            raise ValueError(f"logits must have a finite largest logit in each row; got {lost} rows without")
        if values and phi_mode == "carlini":
            values["phi"] = torch.stack([phi_carlini(one[None], labels)[0] for one in full]).cpu()
        flags = torch.as_tensor(np.asarray(membership) if not isinstance(membership, Tensor) else membership).cpu()
        return cls(values, flags, labels.cpu(), ids, manifest or {})

    def __getitem__(self, name: str) -> Tensor:
        """A signal [K, N, Q]; "logprob" is the negative loss."""
        if name == "logprob" and "loss" in self.values:
            return -self.values["loss"]
        if name not in self.values:
            have = ", ".join(self.values)
            raise KeyError(f"these signals must hold {name!r} for that; they hold {have}")
        return self.values[name]

    @property
    def sha256(self) -> str:
        """Of all tensors and the manifest."""
        digest = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode())
        for name, value in sorted(self._tensors().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def require(self, plan: Mapping[str, Any]) -> None:
        """Refuse signals that are not those of a plan.

        Args:
            plan: any of ``membership`` (bool [K, N]), ``ids``, ``labels`` and entries of the manifest, as they must be.

        Raises:
            ValueError: one of them differs, or the manifest lacks it; the message names it.
        """
        for name, wanted in plan.items():
            if name in ("membership", "ids", "labels"):
                have = getattr(self, name)
                given = wanted if isinstance(wanted, Tensor) else torch.as_tensor(np.asarray(wanted))
                if have is None or have.shape != given.shape:
                    shape = None if have is None else tuple(have.shape)
                    raise ValueError(f"the signals' {name} must be the plan's, {tuple(given.shape)}; got {shape}")
                if not torch.equal(have, given.cpu()):
                    count = int((have != given.cpu()).sum())
                    raise ValueError(f"the signals' {name} must be the plan's; got {count} entries that differ")
            elif name not in self.manifest:
                raise ValueError(f"the signals' manifest must say {name!r}, as the plan does; it says nothing")
            elif self.manifest[name] != json.loads(json.dumps(wanted)):
                raise ValueError(f"the signals' {name} must be {wanted!r}, the plan's; got {self.manifest[name]!r}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all; the manifest and a hash of everything lie in its header.

        Raises:
            OSError: the folder does not exist or cannot be written.
        """
        from safetensors.torch import save

        header = {"format": FORMAT, "manifest": json.dumps(self.manifest), "sha256": self.sha256}
        content = save({name: value.contiguous() for name, value in self._tensors().items()}, metadata=header)
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Signals":
        """Read what ``save`` wrote; nothing is unpickled.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: it is no such file, or its content is not what its hash says.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"signals must be a file; there is none at {path}")
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{path} must be a safetensors file; {error}") from error
        if header.get("format") != FORMAT:
            raise CheckpointError(f"{path} must say format {FORMAT}; got {header.get('format')!r}")
        try:
            fixed = {name: tensors.pop(name, None) for name in ("membership", "labels", "ids")}
            if fixed["membership"] is None:
                raise ValueError("it has no membership")
            signals = cls(tensors, fixed["membership"], fixed["labels"], fixed["ids"], json.loads(header["manifest"]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} must hold signals; {error}") from error
        if signals.sha256 != header.get("sha256"):
            raise CheckpointError(f"{path} must hold the data it was written with; its SHA-256 differs")
        return signals

    def _tensors(self) -> dict[str, Tensor]:
        more = {"membership": self.membership, "labels": self.labels, "ids": self.ids}
        return {**self.values, **{name: value for name, value in more.items() if value is not None}}
