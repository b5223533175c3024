"""Where the scores of a model's parameters lie on disk: as the weights do, whatever transformers makes of these."""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cwfast.checkpoint import Checkpoint
from cwfast.errors import CheckpointError


class Plan(NamedTuple):
    """What is scored together, and what that is called on disk."""

    groups: list[list[str]]  # parameters of each pass
    tensors: list[dict[str, tuple[int, ...]]]  # of each pass, by their names in the folder
    unscored: list[str]  # tensors of the folder that are no parameters that were scored


def plan(source: Checkpoint, model: Any, parameters: Mapping[str, Tensor], per_pass: int | None) -> Plan:
    """Passes of consecutive parameters with at most ``per_pass`` weights (one module's parameters at least).

    Args:
        source: the folder that the model was loaded from.
        model: as transformers loaded it.
        parameters: of the model, to be scored.
        per_pass: None: one pass.

    Raises:
        ValueError: ``per_pass`` is below 1.
        CheckpointError: the folder does not hold the model's tensors, or a tied parameter under several names.
    """
    if per_pass is not None and per_pass < 1:
        raise ValueError(f"params_per_pass must be at least 1; got {per_pass}")
    groups: list[list[str]] = []
    room = 0
    for _, names in itertools.groupby(parameters, lambda name: name.rpartition(".")[0]):
        own = list(names)  # of one module: the rows of stacked experts are followed from one of them to the next
        numel = sum(parameters[name].numel() for name in own)
        if not groups or (per_pass is not None and numel > room):
            groups.append([])
            room = per_pass or 0
        groups[-1] += own
        room -= numel
    shapes = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in parameters.items()}
    tensors = []
    for group in groups:
        found = on_disk(model, {name: shapes[name] for name in group})
        tensors.append({name: tuple(tensor.shape) for name, tensor in found.items()})
        for name, shape in tensors[-1].items():
            have = source.entries.get(name)
            if have is None or have.shape != shape:
                raise CheckpointError(
                    f"{source.path} must hold {name!r} of shape {shape}, as {type(model).__name__} does; it has "
                    f"{'none' if have is None else have.shape}"
                )
    scored = {name for shapes_of in tensors for name in shapes_of}
    _check_ties(source, model, scored)
    return Plan(groups, tensors, [name for name in source.entries if name not in scored])


def _check_ties(source: Checkpoint, model: Any, scored: set[str]) -> None:
    """No copy of a scored parameter is in the folder by another name: a rewind would leave it as it was trained."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in source.entries:
            aliases.setdefault(id(parameter), []).append(name)
    for names in aliases.values():
        if len(names) > 1 and not scored.isdisjoint(names):
            raise CheckpointError(
                f"{source.path} must hold each parameter once; {' and '.join(map(repr, names))} are one, tied: load it "
                "with transformers and save it again (save_pretrained)"
            )


def on_disk(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of parameters -> by the names in a checkpoint, as ``save_pretrained`` would write them.

    transformers 5 merges the experts of a layer when it loads them, and renames some parameters.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 loads tensors as they are
        return dict(tensors)
    found: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return found


def by_file(source: Checkpoint, plan: Plan) -> dict[str, dict[str, tuple[int, ...]]]:
    """``{file: {tensor: shape}}``: each file of the folder with those of its tensors that are scored, in its order."""
    shapes = {name: shape for tensors in plan.tensors for name, shape in tensors.items()}
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for _, name in sorted((source.entries[name].begin, name) for name in shapes):
        files.setdefault(source.entries[name].file.name, {})[name] = shapes[name]
    return dict(sorted(files.items()))


def size(plan: Plan) -> int:
    """How many weights are scored."""
    return sum(math.prod(shape) for tensors in plan.tensors for shape in tensors.values())


def texts_identity(texts: Sequence[Any]) -> dict[str, Any]:
    """Which token ids these are: how many, and their hash. The texts cannot be had from it."""
    rows = [[int(token) for token in text] for text in texts]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return {"texts": len(rows), "tokens": sum(map(len, rows)), "sha256": digest}
