"""Models of one architecture, stepped as one stack of tensors or each by itself: see ``training.train_many``."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cwfast import reference
from cwfast.masks import MaskSet


class Fleet(Protocol):
    """What a training loop steps: ``module`` holds the parameters, as the optimizer and ``freeze`` see them."""

    module: nn.Module

    def losses(self, loss: Callable[..., Tensor], inputs: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """``[models]``: each model's loss on its own batch ``[models, batch, ...]``, in training mode."""

    def states(self) -> list[dict[str, Tensor]]:
        """Each model's present parameters and buffers by name; not a copy."""

    def masks(self, masks: Sequence[MaskSet]) -> MaskSet:
        """The models' masks as one over ``module``."""

    def finish(self) -> None:
        """Leaves the models trained, each module in the mode that it was found in."""


class Stacked:
    """All models as one: parameters and buffers ``[models, *shape]`` under their usual names, run by ``vmap``."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._models = models
        self.module = copy.deepcopy(models[0]).train()
        first = dict(models[0].named_parameters())
        self.parameters = {
            name: nn.Parameter(tensor, requires_grad=first[name].requires_grad)
            for name, tensor in _stacked([dict(model.named_parameters()) for model in models]).items()
        }
        self.buffers = _stacked([dict(model.named_buffers()) for model in models])
        places = dict(self.module.named_parameters(remove_duplicate=False))
        own = {id(places[name]): parameter for name, parameter in self.parameters.items()}
        for name, parameter in places.items():  # a tied parameter stays one, in each of its places
            path, _, leaf = name.rpartition(".")
            self.module.get_submodule(path)._parameters[leaf] = own[id(parameter)]

    def losses(self, loss: Callable[..., Tensor], inputs: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """Buffers that the models write (running statistics) are replaced, not written in place."""

        def objective(
            weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], inputs: Tensor, targets: Tensor
        ) -> tuple[Tensor, dict[str, Tensor]]:
            state = {**weights, **{name: buffer.clone() for name, buffer in buffers.items()}}
            logits = torch.func.functional_call(self.module, state, (inputs,))
            return loss(logits, targets, epoch=epoch), {name: state[name].detach() for name in buffers}

        # The fused attention kernel for CPUs runs under vmap one model at a time: 2.4x slower than the plain form.
        attention = sdpa_kernel(SDPBackend.MATH) if inputs.device.type == "cpu" else nullcontext()
        try:
            with attention:
                found, self.buffers = torch.func.vmap(objective)(self.parameters, self.buffers, inputs, targets)
        except RuntimeError as error:
            error.add_note("A model or loss that torch.func.vmap cannot run is trained with Recipe(stack=False).")
            raise
        result: Tensor = found
        return result

    def states(self) -> list[dict[str, Tensor]]:
        """Views of the stack."""
        whole = {name: tensor.detach() for name, tensor in [*self.parameters.items(), *self.buffers.items()]}
        return [{name: tensor[k] for name, tensor in whole.items()} for k in range(len(self._models))]

    def masks(self, masks: Sequence[MaskSet]) -> MaskSet:
        """One over the stacked parameters."""
        stacked = _stacked([{name: one[name] for name in one.names} for one in masks])
        packed = {name: reference.pack(mask) for name, mask in stacked.items()}
        return MaskSet(packed, {name: mask.shape for name, mask in stacked.items()})

    def finish(self) -> None:
        """Copies the stack back."""
        with torch.no_grad():
            for model, state in zip(self._models, self.states(), strict=True):
                for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                    tensor.copy_(state[name])


class Alone:
    """One model, in place. Its random numbers (dropout) follow from its seed; the global RNG is left as it was."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.module = model
        self._modes = {module: module.training for module in model.modules()}
        self._seeds = torch.Generator().manual_seed(seed)
        self._devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
        model.train()

    def losses(self, loss: Callable[..., Tensor], inputs: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """A seed a batch, so that no state of an RNG need be kept between batches."""
        with torch.random.fork_rng(devices=self._devices):
            seed = int(torch.randint(2**63 - 1, (), generator=self._seeds))
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs that are not forked
            for device in self._devices:
                torch.cuda.default_generators[device].manual_seed(seed)
            return loss(self.module(inputs[0]), targets[0], epoch=epoch)[None]

    def states(self) -> list[dict[str, Tensor]]:
        """The model's own tensors."""
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        return [{name: tensor.detach() for name, tensor in named}]

    def masks(self, masks: Sequence[MaskSet]) -> MaskSet:
        """The one there is."""
        return masks[0]

    def finish(self) -> None:
        """Puts the modes back."""
        for module, mode in self._modes.items():
            module.training = mode


def _stacked(of_models: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name].detach() for one in of_models]) for name in of_models[0]}


def why_alone(model: nn.Module) -> str | None:
    """Why models like this one are not stacked, or None: known modules whose results would depend on their fleet.

    Random numbers in a stack are drawn for all its models at once, so that none could be trained again without the
    others; the rest is what ``torch.func.vmap`` cannot run.
    """
    for name, module in model.named_modules():
        kind = f"{name!r} ({type(module).__name__})"
        drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if drops or isinstance(module, nn.RReLU) or (isinstance(module, nn.MultiheadAttention) and module.dropout > 0):
            return f"{kind} draws random numbers"
        if isinstance(module, nn.RNNBase):
            return f"{kind} has no batched form in torch.func.vmap"
        if (
            isinstance(module, nn.modules.batchnorm._NormBase)
            and module.track_running_stats
            and module.momentum is None
        ):
            return f"{kind} has momentum=None, which torch.func.vmap cannot count"
    return None


def signature(model: nn.Module) -> list[object]:
    """What the models of one fleet have in common."""
    parameters = [(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()]
    buffers = [(name, b.shape, b.dtype) for name, b in model.named_buffers()]
    return [parameters, buffers, [(name, type(module)) for name, module in model.named_modules()]]
