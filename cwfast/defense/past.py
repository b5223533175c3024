"""PAST: sparsity where the loss gap between members and others is most sensitive."""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cwfast._fleet import Fleet
from cwfast.data import Dataset
from cwfast.defense.tuning import check_epochs
from cwfast.training import Defense, Fitted, Objective, Task, fit_from_scratch, train_many


class PAST(Defense):
    """Tunes a trained model on the cross-entropy and ``lam * sum_i gamma_i^alpha |w_i|``.

    ``gamma_i = |M| |g_i| / sum_{j in M} |g_j|``, with g the gradient of the mean loss on the reference samples less
    that on the members, and M the parameters of the module (a layer's weight and bias) that w_i is of: the mean of
    gamma over a module is 1. It is computed before each epoch of tuning, from all samples, in evaluation mode, and is
    a constant to the gradient.

    The paper's full text was not at hand: the formula is that of its public reviews. alpha is theirs (2.5 throughout
    their main table, 1.5 on top of other defenses), as are 20 to 50 epochs of tuning after 100; ``lam``, the learning
    rate (the recipe's, from its beginning) and that g is taken from all samples are ours.

    Args:
        lam: weight of the penalty, at least 0.
        alpha: how much it looks at the sensitive ones, at least 0; 0 is the l1 penalty.
        epochs: of tuning; None: half of the recipe's, rounded up.

    Source:
        Hu, Zhang & Wei, "Defending Membership Inference Attacks via Privacy-aware Sparsity Tuning", 2024.
    """

    def __init__(self, lam: float = 1e-4, alpha: float = 2.5, *, epochs: int | None = None) -> None:
        if not (lam >= 0 and alpha >= 0):
            raise ValueError(f"lam and alpha must be at least 0; got {lam} and {alpha}")
        check_epochs(epochs)
        self.lam, self.alpha, self.epochs = lam, alpha, epochs

    def fit_many(
        self,
        task: Task,
        train_ids: Sequence[Tensor],
        reference_ids: Tensor,
        seeds: Sequence[int],
        *,
        trained: Sequence[Fitted] | None = None,
    ) -> list[Fitted]:
        """See ``Defense.fit_many``.

        Raises:
            ValueError: there is no reference sample.
        """
        if len(reference_ids) == 0:
            raise ValueError("reference_ids must hold at least one sample, for the loss gap; got none")
        trained = trained or fit_from_scratch(task, train_ids, seeds)
        models = [copy.deepcopy(fitted.model) for fitted in trained]
        train_many(
            models,
            task.dataset,
            train_ids,
            seeds,
            task.recipe,
            epochs=math.ceil(task.recipe.epochs / 2) if self.epochs is None else self.epochs,
            objective=lambda fleet, rows: _Sparsity(
                fleet, rows, task.dataset, [train_ids[k] for k in rows], reference_ids, task.recipe.batch_size, self
            ),
        )
        return [Fitted(model, before.initial) for model, before in zip(models, trained, strict=True)]


class _Sparsity(Objective):
    def __init__(
        self,
        fleet: Fleet,
        models: range,
        dataset: Dataset,
        members: Sequence[Tensor],
        reference: Tensor,
        batch_size: int,
        settings: PAST,
    ) -> None:
        super().__init__(fleet, models)
        self._data, self._size, self._settings = dataset, batch_size, settings
        self._sets = [(torch.stack(list(members)), -1.0), (reference.expand(len(models), -1), 1.0)]
        self._parameters = {name: p for name, p in fleet.module.named_parameters() if p.requires_grad}
        self._weights: dict[str, Tensor] = {}

    def start(self, epoch: int) -> None:
        """The weights of the penalty."""
        gap = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self.fleet.module.eval()
        for ids, sign in self._sets:
            for batch in ids.split(self._size, dim=1):
                inputs, targets = self._data.inputs[batch], self._data.targets[batch]
                loss = super().losses(inputs, targets, epoch).sum() * (sign * batch.shape[1] / ids.shape[1])
                grads = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
                for total, grad in zip(gap.values(), grads, strict=True):
                    if grad is not None:
                        total += grad
        self.fleet.module.train()
        count = len(self.models)
        found = sensitivity({name: g.reshape(count, -1) for name, g in gap.items()})
        self._weights = {name: self._settings.lam * gamma**self._settings.alpha for name, gamma in found.items()}

    def losses(self, inputs: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """With the penalty."""
        found = super().losses(inputs, targets, epoch)
        for name, p in self._parameters.items():
            found = found + (self._weights[name] * p.abs().reshape(len(self.models), -1)).sum(dim=1)
        return found


def sensitivity(gap: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PAST's gamma of K models, ``[K, numel]`` by parameter, from the gradients of their loss gaps.

    A parameter ``a.b.weight`` is of module ``a.b``. Where all gradients of a module are 0, so is gamma.
    """
    modules: dict[str, list[str]] = {}
    for name in gap:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    found = {}
    for names in modules.values():
        size = sum(gap[name].shape[1] for name in names)
        total = torch.stack([gap[name].abs().sum(dim=1) for name in names]).sum(dim=0)
        scale = torch.where(total > 0, size / total, 0)
        found.update({name: gap[name].abs() * scale[:, None] for name in names})
    return found
