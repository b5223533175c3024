"""Batches of samples, and BatchNorm's running statistics over them for weights that training did not leave so."""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

Batch: TypeAlias = tuple[Tensor, Tensor]  # inputs and targets


def filled(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Those with samples: the mean over none is NaN."""
    return (batch for batch in batches if len(batch[0]))


def batchnorms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Those that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    }


@torch.no_grad()
def recalibrate_(model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
    """Measure the running statistics of every BatchNorm anew, as plain means over one pass of ``batches``.

    Rewound weights change what BatchNorm layers see; the statistics of training are then of another model. All other
    modules are in evaluation mode meanwhile, and every mode comes back. A model without BatchNorm is not run.

    Raises:
        ValueError: there is no sample. After this and any other failure the statistics are as they were.
    """
    norms = list(batchnorms(model).values())
    if not norms:
        return model
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean
            norm.train()
        count = 0
        for inputs, _ in filled(batches):
            model(inputs)
            count += 1
        if not count:
            raise ValueError("batches must hold at least one sample, to measure BatchNorm's statistics by; got none")
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    return model
