"""Token records: numbers of every scored token of N texts, and the folder of safetensors shards that holds them."""

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

from cwfast.checkpoint.files import atomic_write, sha256
from cwfast.errors import CheckpointError

FORMAT = "cwfast-token-records/1"
INDEX = "records.json"
FIXED = ("documents", "offsets", "tokens", "zlib")  # names of tensors that are no statistic of tokens
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class TokenRecords:
    """Statistics of the scored tokens of N texts, text after text; T tokens in all.

    Attributes:
        offsets: int64 [N + 1]; text i has the tokens ``offsets[i] .. offsets[i + 1]``, at least one.
        tokens: int64 [T], their ids.
        values: by name, each [T, ...]: what ``cwfast.ops.lm_token_stats`` gives (``logprob``, ``logsumexp``, ``mean``,
            ``variance``, ``entropy``, ``rank``, ``correct``; with topk ``topk_logprob``, ``topk_index`` [T, k]); of a
            reference model the same with ``reference.`` before it; ``kl``: KL(reference || model).
        zlib: int64 [N], bytes of the scored text compressed by zlib; None where no text was there.
        manifest: JSON-able: models (fingerprints), settings, hash of the token ids.
    """

    offsets: Tensor
    tokens: Tensor
    values: Mapping[str, Tensor]
    zlib: Tensor | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ends, size = self.offsets, len(self.tokens)
        if ends.dtype != torch.int64 or ends.ndim != 1 or len(ends) < 1 or int(ends[0]) != 0 or int(ends[-1]) != size:
            raise ValueError(f"offsets must be int64 [N + 1] from 0 to {size}, the number of tokens; got {ends.dtype}")
        if bool((ends.diff() < 1).any()):
            raise ValueError("offsets must give each text at least one token; got a text with none")
        wrong = [name for name, value in self.values.items() if len(value) != size]
        if wrong:
            raise ValueError(f"{wrong[0]} must have {size} rows, one per token; got {len(self.values[wrong[0]])}")
        if self.zlib is not None and self.zlib.shape != (len(self),):
            raise ValueError(f"zlib must have shape [N] = ({len(self)},); got {tuple(self.zlib.shape)}")

    def __len__(self) -> int:
        """N, the number of texts."""
        return len(self.offsets) - 1

    def __getitem__(self, name: str) -> Floats:
        """A statistic as float64 [T, ...].

        Raises:
            KeyError: these records lack it.
        """
        if name not in self.values:
            hint = ": give records() a reference" if name.startswith("reference.") else ""
            hint = ": give records() a reference and kl=True" if name == "kl" else hint
            raise KeyError(f"these records must hold {name!r} for that; they hold {', '.join(self.values)}{hint}")
        return self.values[name].double().numpy()

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[N], scored tokens of each text."""
        return self.offsets.diff().numpy()

    def of_reference(self) -> "TokenRecords":
        """The reference's statistics as records of its own.

        Raises:
            ValueError: there is none in these records.
        """
        before = "reference."
        values = {name.removeprefix(before): value for name, value in self.values.items() if name.startswith(before)}
        if not values:
            raise ValueError("records must be made with a reference; these were not")
        return TokenRecords(self.offsets, self.tokens, values, self.zlib, {**self.manifest, "of": "reference"})

    def select(self, chosen: "torch.Tensor | list[int]") -> "TokenRecords":
        """The records of some texts, in that order."""
        index = torch.as_tensor(chosen, dtype=torch.int64)
        at = torch.cat([torch.arange(0), *(torch.arange(*self.offsets[i : i + 2].tolist()) for i in index.tolist())])
        lengths = self.offsets.diff()[index]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        zlib = None if self.zlib is None else self.zlib[index]
        values = {name: value[at] for name, value in self.values.items()}
        return TokenRecords(offsets, self.tokens[at], values, zlib, {**self.manifest, "selected": len(index)})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a folder: one safetensors shard, and ``records.json`` with its hash and the manifest.

        Raises:
            OSError: it cannot be written.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        write_shard(folder / shard_name(0), torch.arange(len(self)), self, "")
        write_index(folder, self.manifest, [shard_name(0)])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TokenRecords":
        """Read what ``save`` or ``records(out=...)`` wrote; nothing is unpickled.

        Raises:
            FileNotFoundError: there is no ``records.json`` in the folder.
            CheckpointError: something in it is broken, or not what its hash says.
        """
        index = Path(path) / INDEX
        if not index.is_file():
            raise FileNotFoundError(f"records must be a folder with {INDEX}; there is none at {path}")
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            named = [(str(shard["file"]), str(shard["sha256"])) for shard in content["shards"]]
            if content["format"] != FORMAT:
                raise ValueError(f"its format must be {FORMAT}; it is {content['format']!r}")
            manifest = dict(content["manifest"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{index} must be an index of token records; {error}") from error
        shards = []
        for name, expected in named:
            file = index.parent / name
            if Path(name).name != name or not file.is_file():
                raise CheckpointError(f"{index} must name files beside it; got {name!r}")
            if sha256(file) != expected:
                raise CheckpointError(f"{file} must hold the data it was written with; its SHA-256 differs")
            shards.append(read_shard(file)[:2])
        try:
            return joined(shards, manifest)
        except (ValueError, KeyError, RuntimeError, IndexError) as error:
            raise CheckpointError(f"{path} must hold token records; {error}") from error


def joined(shards: list[tuple[Tensor, TokenRecords]], manifest: Mapping[str, Any]) -> TokenRecords:
    """Records of all texts, in their order, from shards that hold some each.

    Raises:
        ValueError: they do not hold each text once, or differ in what they hold.
    """
    if not shards:
        raise ValueError("there must be at least one shard; there is none")
    order = torch.cat([documents for documents, _ in shards])
    if not torch.equal(order.sort().values, torch.arange(len(order))):
        raise ValueError("shards must hold each text once; they do not")
    parts = [part for _, part in shards]
    if len({(tuple(part.values), part.zlib is None) for part in parts}) > 1:
        raise ValueError("shards must hold the same statistics; they do not")
    lengths = torch.cat([part.offsets.diff() for part in parts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    whole = TokenRecords(
        offsets,
        torch.cat([part.tokens for part in parts]),
        {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values},
        None if parts[0].zlib is None else torch.cat([part.zlib for part in parts if part.zlib is not None]),
    )
    back = whole.select(order.argsort())
    return TokenRecords(back.offsets, back.tokens, back.values, back.zlib, manifest)


def shard_name(i: int) -> str:
    """Of the file of shard i."""
    return f"shard-{i:05d}.safetensors"


def write_shard(path: Path, documents: Tensor, part: TokenRecords, plan: str) -> None:
    """One file, whole or not at all; ``plan`` tells whether it belongs to a run."""
    from safetensors.torch import save

    tensors = {"documents": documents, "offsets": part.offsets, "tokens": part.tokens}
    tensors |= {} if part.zlib is None else {"zlib": part.zlib}
    tensors |= {f"token.{name}": value for name, value in part.values.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    header = {"format": FORMAT, "plan": plan, "order": json.dumps(list(part.values)), "sha256": _digest(tensors)}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(tensors, metadata=header))


def read_shard(path: Path) -> tuple[Tensor, TokenRecords, str]:
    """(documents, records, plan) of a file.

    Raises:
        CheckpointError: it is no whole shard.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise ValueError(f"its format must be {FORMAT}; it is {header.get('format')!r}")
        if _digest(tensors) != header.get("sha256"):
            raise ValueError("its SHA-256 differs")
        values = {name: tensors[f"token.{name}"] for name in json.loads(header["order"])}
        zlib = tensors.get("zlib")
        return tensors["documents"], TokenRecords(tensors["offsets"], tensors["tokens"], values, zlib), header["plan"]
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} must be a shard of token records; {error}") from error


def write_index(folder: Path, manifest: Mapping[str, Any], names: list[str]) -> None:
    """``records.json``: written last, so that a folder with it is complete."""
    shards = [{"file": name, "sha256": sha256(folder / name)} for name in names]
    content = {"format": FORMAT, "manifest": dict(manifest), "shards": shards}
    with atomic_write(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
