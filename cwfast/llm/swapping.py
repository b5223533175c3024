"""A model whose weights stand for a while between their initial and their trained values, and are put back."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cwfast._parameters import Initial, check_apart, check_shapes, trainable
from cwfast._tracking import sum_dtype
from cwfast.checkpoint import Checkpoint
from cwfast.llm.loading import whole

FLOATS = (torch.float32, torch.bfloat16, torch.float64)


class Weights:
    """The trainable parameters of a model, and their initial values.

    Args:
        model: trained; its weights change in ``put`` only, and inside ``kept`` only.
        initial: module, mapping (``state_dict``) or safetensors file or folder; a folder is read tensor by tensor where
            it has the model's own names, else (transformers merges the experts of a layer) loaded as the model's class.

    Raises:
        TypeError, ValueError, FileNotFoundError, CheckpointError: ``initial`` is not of this model.
    """

    def __init__(self, model: nn.Module, initial: Initial) -> None:
        self.model = model
        self.parameters = trainable(model)
        if not self.parameters:
            raise ValueError("model must have a parameter that requires a gradient; it has none")
        for name, parameter in self.parameters.items():
            if parameter.is_meta or parameter.dtype not in FLOATS:
                raise TypeError(
                    f"parameters must be in memory in one of {FLOATS} (in float16, gradients are lost); {name!r} is "
                    f"{'on disk' if parameter.is_meta else parameter.dtype}"
                )
        self._initial = _source(model, self.parameters, initial)
        self._trained: dict[str, Tensor] | None = None  # a copy, while the model holds something else
        self._at = 1.0  # the t at which it is

    def put(self, t: float) -> None:
        """Make the weights ``w0 + t (w - w0)``: rounded to their dtype, and exact at 0 and 1."""
        if t == self._at:
            return
        with torch.no_grad():
            if self._trained is None:
                self._trained = {name: p.detach().clone() for name, p in self.parameters.items()}
            self._at = math.nan  # until all are there
            for name, parameter in self.parameters.items():
                end = self._trained[name]
                if t == 1:
                    parameter.copy_(end)
                else:
                    start = self.initial(name)
                    sums = sum_dtype(parameter.dtype)
                    parameter.copy_(start if t == 0 else torch.lerp(start.to(sums), end.to(sums), t))
        self._at = t
        if t == 1:
            self._trained = None

    def initial(self, name: str) -> Tensor:
        """In the dtype in which it was given, on the parameter's device."""
        return self._initial(name).to(self.parameters[name].device)

    def delta(self, name: str) -> Tensor:
        """``w - w0``, computed in float32 (float64)."""
        parameter = self.parameters[name]
        sums = sum_dtype(parameter.dtype)
        trained = parameter.detach() if self._trained is None else self._trained[name]
        return trained.to(sums) - self.initial(name).to(sums)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Weights, buffers, gradients, what requires one, and torch's random state are afterwards what they were."""
        buffers = [
            (module, name, value, value.detach().clone())
            for module in self.model.modules()
            for name, value in module._buffers.items()
            if value is not None
        ]
        flags = [(p, p.requires_grad, p.grad) for p in self.model.parameters()]
        with torch.random.fork_rng():
            try:
                for parameter, _, _ in flags:
                    parameter.grad = None
                yield
            finally:
                for parameter, wanted, grad in flags:
                    parameter.requires_grad_(wanted)
                    parameter.grad = grad
                self.put(1)
                with torch.no_grad():
                    for module, name, value, content in buffers:
                        value.copy_(content)
                        module._buffers[name] = value


def _source(model: nn.Module, parameters: Mapping[str, Tensor], initial: Initial) -> Callable[[str], Tensor]:
    """``name -> initial value``; a tied weight may have any of its names there."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    names = {name: aliases[id(parameter)] for name, parameter in parameters.items()}
    if isinstance(initial, str | os.PathLike):
        found = Checkpoint(initial)
        if all(any(alias in found for alias in known) for known in names.values()):
            kept = _kept(names, found)
            check_shapes({name: found.entry(stored).shape for name, stored in kept.items()}, parameters)
            return lambda name: found.tensor(kept[name])
        initial = loaded(model, initial)
    check_apart(initial, parameters)
    if isinstance(initial, nn.Module):
        given: Mapping[str, Tensor] = dict(initial.named_parameters(remove_duplicate=False))
    elif isinstance(initial, Mapping):
        given = initial
    else:
        raise TypeError(
            f"initial must be a module, a mapping, or a safetensors file or folder; got {type(initial).__name__}"
        )
    kept = _kept(names, given)
    check_shapes({name: tuple(given[stored].shape) for name, stored in kept.items()}, parameters)
    return lambda name: given[kept[name]].detach()


def _kept(names: Mapping[str, Sequence[str]], given: Any) -> dict[str, str]:
    """Under which of its names each parameter is given, where it is."""
    found = {name: next((alias for alias in known if alias in given), None) for name, known in names.items()}
    return {name: stored for name, stored in found.items() if stored is not None}


def loaded(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """A folder whose tensors have other names than the parameters, as its class reads it.

    Raises:
        ValueError: no folder, or a class that reads none.
        CheckpointError: a weight of the model is not there.
    """
    if not hasattr(type(model), "from_pretrained") or not os.path.isdir(folder):
        raise ValueError(f"initial must hold every parameter of the model by name; {folder} does not")
    dtype = next(model.parameters()).dtype
    found: nn.Module = whole(type(model), folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    return found
