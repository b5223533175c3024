"""Mixup: training on mixtures of two samples and of their labels."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cwfast._fleet import Fleet
from cwfast.training import Defense, Fitted, Objective, Task, fit_from_scratch


class Mixup(Defense):
    """Trains on ``c x + (1 - c) x'`` with the loss ``c CE(y) + (1 - c) CE(y')``.

    One ``c ~ Beta(alpha, alpha)`` a batch; x' is the batch in a random order. The seed of a model is that of its c and
    orders, too.

    Args:
        alpha: above 0; 1 (c is uniform) is what MixupMMD, a defense built on it, uses.

    Source:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018. As a defense: Li, Li & Ribeiro,
        "Membership Inference Attacks and Defenses in Classification Models", CODASPY 2021, whose MMD term is not here.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0; got {alpha}")
        self.alpha = alpha

    def fit_many(
        self,
        task: Task,
        train_ids: Sequence[Tensor],
        reference_ids: Tensor,
        seeds: Sequence[int],
        *,
        trained: Sequence[Fitted] | None = None,
    ) -> list[Fitted]:
        """``trained`` is not used: training starts from the initial weights."""
        return fit_from_scratch(
            task, train_ids, seeds, objective=lambda fleet, models: _Mixing(fleet, models, seeds, self.alpha)
        )


class _Mixing(Objective):
    def __init__(self, fleet: Fleet, models: range, seeds: Sequence[int], alpha: float) -> None:
        super().__init__(fleet, models)
        self._alpha = alpha
        self._random = [np.random.default_rng(seeds[model] % 2**64) for model in models]

    def losses(self, inputs: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """Of mixtures."""
        draws = [random.beta(self._alpha, self._alpha) for random in self._random]
        share = torch.tensor(draws, dtype=inputs.dtype, device=inputs.device)
        order = torch.tensor(
            np.stack([random.permutation(targets.shape[1]) for random in self._random]), device=inputs.device
        )
        row = torch.arange(len(order), device=inputs.device)[:, None]
        mixed = torch.lerp(inputs[row, order], inputs, share.view(-1, *[1] * (inputs.ndim - 1)))
        logits = self.outputs(mixed)
        return mixed_loss(logits, targets, targets[row, order], share)


def mixed_loss(logits: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """``[K]``: mean cross-entropy with ``first``, times ``share [K]``, and with ``second``, times the rest.

    Args:
        logits: ``[K, B, C]``.
        first: labels ``[K, B]``.
        second: labels ``[K, B]``.
        share: ``[K]``, 0 .. 1.
    """
    log_p = functional.log_softmax(logits, dim=2)
    losses = [-log_p.gather(2, labels[..., None]).mean(dim=(1, 2)) for labels in (first, second)]
    return share * losses[0] + (1 - share) * losses[1]
