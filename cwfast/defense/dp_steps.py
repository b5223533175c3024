"""One step of DP-SGD: clip, sum, add noise, step. Through Opacus, and around frozen weights by our own gradients."""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cwfast.defense.clipping import ClippedGradients
from cwfast.freezing import freeze
from cwfast.masks import MaskSet


class Step(Protocol):
    """Takes a step by the losses ``[B]`` of the samples drawn; None: none was drawn, and the step is noise."""

    def __call__(self, losses: Tensor | None) -> None: ...


@contextmanager
def through_opacus(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    noise_multiplier: float,
    max_grad_norm: float,
    expected_batch_size: int,
    generator: torch.Generator,
) -> Iterator[Step]:
    """Per-sample gradients by Opacus' ``GradSampleModule``, clipped and made noisy by its ``DPOptimizer``."""
    opacus: Any = importlib.import_module("opacus")
    private = opacus.optimizers.DPOptimizer(
        optimizer,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=expected_batch_size,
        generator=generator,
    )
    hooked = opacus.GradSampleModule(model, loss_reduction="sum")

    def step(losses: Tensor | None) -> None:
        if losses is None:
            for parameter in private.params:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
        else:
            with warnings.catch_warnings():
                # Its hooks on layers whose input needs no gradient say so, at every step.
                warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
                losses.sum().backward()
        private.step()
        private.zero_grad(set_to_none=True)

    try:
        yield step
    finally:
        hooked.to_standard_module()
        for parameter in private.params:
            del parameter.summed_grad


@contextmanager
def around_frozen(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    noise_multiplier: float,
    max_grad_norm: float,
    expected_batch_size: int,
    generator: torch.Generator,
    frozen: MaskSet,
) -> Iterator[Step]:
    """The same with ``ClippedGradients``: frozen weights count in no norm, get no noise, and stay as they are."""
    gradients = ClippedGradients(model, max_grad_norm=max_grad_norm, masks=frozen)
    with freeze(model, optimizer, frozen), gradients as clipped:
        optimizer.zero_grad()

        def step(losses: Tensor | None) -> None:
            if losses is not None:
                clipped.backward(losses)
            clipped.add_noise_(noise_multiplier, generator)
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= expected_batch_size
            optimizer.step()
            optimizer.zero_grad()

        yield step
