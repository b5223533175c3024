"""Critical weights rewound and frozen inside the Trainer of transformers."""

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from cwfast._parameters import Initial, initial_values, unwrapped
from cwfast._scopes import Scope
from cwfast._selecting import select
from cwfast.freezing import freeze
from cwfast.llm.renaming import as_parameters, values_for
from cwfast.llm.scoring import score
from cwfast.masks import MaskSet, rewind_

MASK_FILE = "cwfast/mask.safetensors"  # in every checkpoint folder; beside the weights, loaders would take it for some

logger = logging.get_logger(__name__)


class CWRFCallback(TrainerCallback):
    """Rewinds the critical weights when training begins, and keeps their bits while the ``Trainer`` trains the rest.

    The masks are given, or selected from scores that are given, or the model is scored when training begins::

        Trainer(model, args, train_dataset=texts, callbacks=[CWRFCallback(masks, initial="base")])
        Trainer(..., callbacks=[CWRFCallback(scores=scores, rate=0.1, initial="base")])
        Trainer(..., callbacks=[CWRFCallback(reference=held_out, rate=0.1, initial="base")])

    Whatever optimizer steps them (weight decay, momentum, gradient accumulation, clipping, autocast), the selected
    weights are as they were after every step, and after training: see ``cwfast.freeze``. Each checkpoint folder
    ``output_dir/checkpoint-<step>`` gets the mask, as ``cwfast/mask.safetensors`` (not in a hyperparameter search,
    which has other folders). Resumed training takes it from there and does not score again.

    A run that raised leaves the weights frozen: training again, or ``close()``, ends that.

    Args:
        masks: of the model: a ``MaskSet``, or the file of one (``cwfast select`` writes such).
        initial: the weights to rewind to: module, mapping, or safetensors file or folder (the base checkpoint); None
            (with masks only): nothing is rewound, the weights are frozen as they are.
        scores: ``{name: scores}`` that ``cwfast.select`` takes with rate, scope and exclude.
        reference: texts that the model was not trained on: a sequence of token ids (``[tokens]`` int64 or lists), or a
            data set of mappings with ``input_ids`` and maybe ``attention_mask``. The model is scored by
            ``cwfast.llm.scoring.score``.
        members: the texts that it was trained on, likewise; None: the Trainer's ``train_dataset``.
        rate: see ``cwfast.select``, as for the next two.
        scope: where the rate holds.
        exclude: patterns of parameters of which nothing is selected.
        also: see ``cwfast.freeze``: an EMA copy, float32 master weights.
        backend: of rewinding and freezing.
        scoring: further arguments of ``score``: criterion, points, batch_size...

    Attributes:
        masks: the masks, by the names of the model's parameters once training has begun.

    Raises:
        TypeError: ``scoring`` holds an argument that ``score`` does not have.
        ValueError: not one of masks, scores and reference is given, or what goes with them is missing. When training
            begins: the masks, the scores or ``initial`` are not of the model, the checkpoint holds other masks, or
            several processes would have to score.
    """

    def __init__(
        self,
        masks: MaskSet | str | Path | None = None,
        *,
        initial: Initial | None = None,
        scores: Mapping[str, Tensor] | None = None,
        reference: Sequence[Any] | None = None,
        members: Sequence[Any] | None = None,
        rate: float | None = None,
        scope: Scope = "global",
        exclude: Sequence[str] | None = None,
        also: Sequence[nn.Module | Mapping[str, Tensor]] = (),
        backend: str = "auto",
        **scoring: Any,
    ) -> None:
        sources = {"masks": masks, "scores": scores, "reference": reference}
        given = [name for name, value in sources.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"one of masks, scores and reference must be given; got {', '.join(given) or 'none'}")
        if masks is None and initial is None:
            raise ValueError(f"with {given[0]}, initial must be given: the weights to rewind to")
        selecting = rate is not None or isinstance(scope, Mapping)
        if selecting == (masks is not None):
            raise ValueError(f"rate must be given with scores and reference, and only there; got {given[0]}, {rate=}")
        if reference is None and (members is not None or scoring):
            raise ValueError(f"members and arguments of score go with reference; got {given[0]}, {[*scoring]}")
        inspect.signature(score).bind(None, initial, members, reference, **scoring)
        self.masks = MaskSet.load(masks) if isinstance(masks, str | Path) else masks
        self._initial: Any = initial
        self._scores, self._members, self._reference = scores, members, reference
        self._selection: dict[str, Any] = {"rate": rate, "scope": scope, "exclude": exclude}
        self._scoring, self._also, self._backend = scoring, also, backend
        self._frozen = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **now: Any) -> None:
        """Find the masks, rewind, freeze."""
        self.close()
        model = unwrapped(now["model"])
        if isinstance(self._initial, str | os.PathLike) and hasattr(model, "peft_config"):
            raise ValueError(
                "of a model with adapters, initial must be their initial values: "
                f"cwfast.integrations.peft.initial_adapters(model, {os.fspath(self._initial)!r})"
            )
        saved = _saved(args, state)
        guessed = self.masks is None and saved is not None and not isinstance(args.resume_from_checkpoint, str)
        if self.masks is None:
            self.masks = self._select(args, state, model, now["train_dataloader"]) if saved is None else saved
        self.masks = as_parameters(model, self.masks)
        if guessed and args.world_size == 1:
            _check_own(_checkpoint(args, state), model, self.masks, values_for(model, self.masks, self._initial))
        if saved is not None and as_parameters(model, saved) != self.masks:
            raise ValueError(
                f"resumed training must have the masks that it began with; the checkpoint's {MASK_FILE} is {saved}, "
                f"given are {self.masks}"
            )
        if self._initial is not None:
            rewind_(model, self.masks, values_for(model, self.masks, self._initial), backend=self._backend)
        self._frozen.enter_context(freeze(model, now["optimizer"], self.masks, also=self._also, backend=self._backend))
        logger.info(f"cwfast: {self.masks} frozen")

    def on_save(self, args: Any, state: Any, control: Any, **now: Any) -> None:
        """Put the mask into the checkpoint's folder."""
        folder = _checkpoint(args, state)
        if args.should_save and self.masks is not None and folder.is_dir():
            path = folder / MASK_FILE
            path.parent.mkdir(exist_ok=True)
            self.masks.save(path)

    def on_train_end(self, args: Any, state: Any, control: Any, **now: Any) -> None:
        """Leave the weights free, with the selected ones as they were frozen."""
        self.close()

    def close(self) -> None:
        """The weights are free again; needed only after a run that raised."""
        self._frozen.close()

    def _select(self, args: Any, state: Any, model: nn.Module, batches: Any) -> MaskSet:
        if self._scores is not None:
            return select(self._scores, backend=self._backend, **self._selection)
        if state.global_step:
            raise ValueError(
                f"resumed training must not be scored anew, and {_checkpoint(args, state)} holds no {MASK_FILE}; "
                "give masks, the file of the checkpoint that it goes on from"
            )
        if args.world_size > 1:
            raise ValueError(
                f"{args.world_size} processes would select different masks, each from its own scores; score in one, "
                "save the masks, and give masks"
            )
        members = texts("train_dataset", batches.dataset) if self._members is None else texts("members", self._members)
        reference = texts("reference", self._reference)
        with _without_autocast(model):
            scores = score(model, self._initial, members, reference, **self._scoring)
        return select(scores, backend=self._backend, **self._selection)


@contextmanager
def _without_autocast(model: Any) -> Iterator[None]:
    """The forward pass as it was before accelerate put autocast around it: scores are the same in any training."""
    prepared = vars(model).get("forward")
    if prepared is None or not hasattr(model, "_original_forward"):
        yield
        return
    model.forward = model._original_forward
    try:
        yield
    finally:
        model.forward = prepared


def texts(name: str, samples: Any) -> list[Tensor]:
    """Token ids ``[tokens]`` int64 of each sample, without pads.

    Args:
        name: the argument's, for messages.
        samples: a sequence of token ids, or of mappings with ``input_ids`` and maybe ``attention_mask``, ``labels``.

    Raises:
        TypeError: not a sequence, or of something else.
        ValueError: labels hide (-100) tokens that are no pads: they would be scored, though they are not trained on.
    """
    if not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
        raise TypeError(f"{name} must be a sequence of token ids or of mappings; got {type(samples).__name__}")
    return [_ids(f"{name}[{i}]", samples[i]) for i in range(len(samples))]


def _ids(name: str, sample: Any) -> Tensor:
    if not isinstance(sample, Mapping):
        sample = {"input_ids": sample}
    if "input_ids" not in sample:
        raise TypeError(f"{name} must have input_ids; it has {list(sample)}")
    ids = torch.as_tensor(sample["input_ids"], dtype=torch.int64)
    if ids.ndim != 1:
        raise ValueError(f"{name} must be token ids [tokens]; got shape {tuple(ids.shape)}")
    mask = torch.as_tensor(sample.get("attention_mask", torch.ones_like(ids))).bool()
    labels = torch.as_tensor(sample.get("labels", ids))
    if labels.shape == ids.shape and bool((labels[mask] == -100).any()):
        raise ValueError(
            f"{name} has labels that hide some of its tokens, and scoring takes every token; score by your own loss "
            "(cwfast.SaliencyScorer), and give scores"
        )
    return ids[mask]


def _checkpoint(args: Any, state: Any) -> Path:
    """Where the Trainer keeps the checkpoint of this step; it does not tell its callbacks."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _saved(args: Any, state: Any) -> MaskSet | None:
    """The mask of the checkpoint that training goes on from."""
    if not state.global_step:
        return None
    folders = [_checkpoint(args, state)]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    found = next((folder / MASK_FILE for folder in folders if (folder / MASK_FILE).is_file()), None)
    return None if found is None else MaskSet.load(found)


def _check_own(folder: Path, model: nn.Module, masks: MaskSet, initial: Initial) -> None:
    """See that the mask found in ``folder`` is of the run that goes on, not of another that left its checkpoint there.

    Under its own mask, the weights that were resumed have the initial values.

    Raises:
        ValueError: it is not.
    """
    for name, parameter in model.named_parameters():
        if not masks.counts.get(name):
            continue
        mask, before = masks[name].cpu(), initial_values(initial, {name: parameter})[name]
        if not torch.equal(parameter.detach().cpu()[mask], before.detach().to("cpu", parameter.dtype)[mask]):
            raise ValueError(
                f"the mask in {folder} must be of the checkpoint that training goes on from; it selects weights of "
                f"{name!r} that have not the values of initial: give masks, that checkpoint's {MASK_FILE}"
            )
