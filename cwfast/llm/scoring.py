"""How much each weight of a fine-tuned language model holds its training texts: scores in memory, and in a folder."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cwfast._parameters import Initial, trainable
from cwfast._tracking import chosen
from cwfast.checkpoint import Checkpoint
from cwfast.checkpoint.filling import Filling
from cwfast.checkpoint.identity import SCORES, files_of, identity, tensor_hashes
from cwfast.checkpoint.making import check_space, making
from cwfast.errors import CheckpointError
from cwfast.llm import score_files
from cwfast.llm.estimating import Settings
from cwfast.llm.folders import check_base
from cwfast.llm.loading import local
from cwfast.llm.preparing import Ids, check_settings, prepared

FORMAT = "cwfast-scores/1"


def score(
    model: Any,
    initial: Initial,
    members: Sequence[Ids],
    reference: Sequence[Ids],
    *,
    criterion: str = "gap",
    lam: float = 0.5,
    points: int = 1,
    batch_size: int = 8,
    only: Sequence[str] | None = None,
    granularity: str = "sample",
    autocast: torch.dtype | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> dict[str, Tensor]:
    """Scores of a language model's weights by its token losses; logits never exist.

    "gap": each weight's share of what training put between the loss on others and on members, where it is positive:
    ``max(0, d * mean over t of (g_ref - g_mem)(w0 + t d))``, ``d = w - w0``, g the gradient of the mean loss over all
    tokens of a side, t the midpoints of ``points`` equal parts of 0 .. 1. "taylor", "taylor_delta":
    ``(1 - lam) mean over members of |g f| + lam mean over reference texts of |h f|``, g the gradient of a member's mean
    token loss, h that of a reference text's mean ``KL(initial || model)`` per token, f the weight, or w - w0.

    The model works in evaluation mode, and is afterwards what it was, bit for bit, also after an error. For "gap" and
    for the KL it holds other weights meanwhile: memory grows by a copy of them, by the scores, and for the KL by the
    initial model's hidden states on the reference texts.

    Args:
        model: a causal language model of transformers with a linear head (or a PEFT model around one), in memory. Its
            parameters that require a gradient are scored, by the names of ``named_parameters``; a tied one once.
        initial: its weights before fine-tuning: module, mapping (``state_dict``), or safetensors file or folder.
        members: token ids of texts that it was trained on, each 1-D int64; the first token of a text is not scored.
        reference: the same of texts from the same source that it was not trained on.
        criterion: "gap", "taylor" or "taylor_delta".
        lam: weight of the KL term, 0 .. 1; not for "gap".
        points: of the path; one pass over both sets for each; only for "gap".
        batch_size: texts of a batch; changes scores by rounding only (not with granularity "batch").
        only: ``fnmatch`` patterns of parameters to score, the others get no gradient; None: all.
        granularity: for "taylor" and "taylor_delta": "sample" as above, or "batch": ``|((1 - lam) g + lam h) f|``,
            g and h of the mean over a batch's texts, summed over the batches of members (those of the reference start
            again where they are fewer): for models with layers that have no rule.
        autocast: ``torch.bfloat16``: run the model's passes in it, over float32 weights; None: in the weights' dtype.
        backend: of the kernels.
        progress: show a bar on stderr, where that is a terminal.

    Returns:
        ``{name: scores}``, at least 0, float32 (float64 for float64 parameters), on the parameters' devices.

    Raises:
        TypeError, ValueError: an argument does not hold what is written above; no text, one without a token to score,
            or one longer than the model allows.
        UnsupportedLayer: the logits are not those of the head, or (granularity "sample") a layer has no rule.

    Source:
        "gap": see ``cwfast.defense.gap_shares``. "taylor": Fang & Kim, ICLR 2026.
    """
    settings = Settings(criterion, lam, points, batch_size, granularity, autocast, backend)
    with prepared(model, initial, members, reference, settings) as run:
        names = list(chosen(run.weights.parameters, only, None))
        with tqdm(total=run.batches(), desc="score", unit="batch", disable=None if progress else True) as bar:
            run.progress = bar.update
            return run.scores(names)


def score_folder(
    model: str | os.PathLike[str],
    base: str | os.PathLike[str],
    members: Sequence[Ids],
    reference: Sequence[Ids],
    out: str | os.PathLike[str],
    *,
    criterion: str = "gap",
    lam: float = 0.5,
    points: int = 1,
    batch_size: int = 8,
    granularity: str = "sample",
    autocast: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    backend: str = "auto",
    params_per_pass: int | None = None,
    resume: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """``score`` of a model in a folder: a folder of scores, sharded and named as the weights are.

    ``cwfast select`` takes it. The model is in memory, and what ``score`` needs beside it; of the scores, only those of
    one pass. Everything is written into a folder beside ``out``, whose name begins with a dot, and renamed to ``out``
    at the end; what a killed run has finished there, pass by pass, ``resume`` keeps. Scores do not depend on how many
    passes there were.

    Args:
        model: folder of transformers with safetensors files. It is only read; code in it is not run.
        base: the same before fine-tuning: each tensor that is scored in the same shape and dtype. It is only read.
        members: see ``score``.
        reference: see ``score``.
        out: folder to make; it must not exist (an empty one may), nor lie in ``model`` or ``base``.
        criterion: see ``score``.
        lam: see ``score``.
        points: see ``score``.
        batch_size: see ``score``.
        granularity: see ``score``.
        autocast: see ``score``.
        dtype: of the weights in memory; None: as they are saved. Between bfloat16 weights that differ by one step there
            is no point of the path: float32 has it.
        device: of the model; only "cpu" has been run so far.
        backend: of the kernels.
        params_per_pass: score at most so many weights at a time (one module's own at least), with a pass over the
            texts for each such part; None: all at once.
        resume: go on where an earlier run with the same arguments was stopped; params_per_pass may be another.
        progress: see ``score``.

    Returns:
        What ``cwfast-scores.json`` in ``out`` says: settings, the SHA-256 of each tensor of scores, of the base's
        tensors, of the model and of the token ids, and which tensors of the model are not scored.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: an input is not there.
        CheckpointError: a broken file, or names, shapes or dtypes that do not fit.
        FileExistsError: ``out`` is there, or an unfinished run of it is and ``resume`` is False.
        RuntimeError: another process writes the same folder.
        TypeError, ValueError, UnsupportedLayer: see ``score``.
        OSError: the disk is too small or full. In all these cases no folder ``out`` has been made.
    """
    settings = Settings(criterion, lam, points, batch_size, granularity, autocast, backend)
    check_settings(settings)
    source, initial = Checkpoint(model), Checkpoint(base)
    described = {name: _plain(value) for name, value in asdict(settings).items()} | {"dtype": _plain(dtype)}
    texts = {"members": score_files.texts_identity(members), "reference": score_files.texts_identity(reference)}
    inputs = {"model": files_of(source), "base": files_of(initial), "settings": described, **texts}
    places = {"MODEL": source.path, "BASE": initial.path}
    with making(Path(out), places, inputs, kind=FORMAT, manifest=SCORES, resume=resume, tensors={}) as made:
        loaded = local(source.path, dtype).to(device)
        parameters = trainable(loaded)
        plan = score_files.plan(source, loaded, parameters, params_per_pass)
        shapes = {name: shape for tensors in plan.tensors for name, shape in tensors.items()}
        check_base(source, initial, shapes)
        kept = made.state["tensors"]
        wide = torch.float64 if any(p.dtype == torch.float64 for p in parameters.values()) else torch.float32
        check_space(made.path, (score_files.size(plan) if not kept else 0) * wide.itemsize)
        files = Filling(made.path, score_files.by_file(source, plan), wide)
        for name in [name for name, known in kept.items() if not files.holds(name, known)]:
            del kept[name]
        todo = [i for i, tensors in enumerate(plan.tensors) if not all(name in kept for name in tensors)]
        if todo:
            with (
                prepared(loaded, base, members, reference, settings) as run,
                tqdm(
                    total=run.batches() * len(todo), desc="score", unit="batch", disable=None if progress else True
                ) as bar,
            ):
                run.progress = bar.update
                for i in todo:
                    found = score_files.on_disk(loaded, run.scores(plan.groups[i]))
                    hashes = {name: files.write(name, found.pop(name)) for name in plan.tensors[i]}
                    files.flush()
                    kept.update(hashes)
                    made.save()
        files.finish()
        if Checkpoint(made.path).shapes != shapes:
            raise CheckpointError(f"{made.path} must hold the tensors of {source.path} that were scored; it does not")
        base_hashes = tensor_hashes(initial, shapes)
        made.state |= {
            "base": {"sha256": identity(base_hashes), "tensors": base_hashes},
            "model": {"sha256": identity(tensor_hashes(source, shapes))},
            "weights": score_files.size(plan),
            "unscored": plan.unscored,
        }
    return made.state


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
