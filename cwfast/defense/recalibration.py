"""BatchNorm's running statistics, for weights that training did not leave where they are."""

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn

Batch: TypeAlias = tuple[Tensor, Tensor]  # inputs and targets


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
        ValueError: there is no batch. After this and any other failure the statistics are as they were.
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
        for inputs, _ in batches:
            model(inputs)
            count += 1
        if not count:
            raise ValueError("batches must hold at least one, to measure BatchNorm's statistics by; got none")
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
