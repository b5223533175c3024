"""DP-SGD: clipped per-sample gradients and noise, from scratch or as the fine-tuning of CWRF."""

import importlib.util
import math
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from cwfast._fleet import Alone
from cwfast._parameters import snapshot
from cwfast.data import Dataset
from cwfast.defense.accounting import ACCOUNTANTS, Privacy, epsilon_of, noise_for
from cwfast.defense.clipping import refuse_mixing
from cwfast.defense.dp_steps import around_frozen, through_opacus
from cwfast.masks import MaskSet
from cwfast.training import Defense, Fitted, Loss, Recipe, Task, _factor, _optimizer, cross_entropy


class DPSGD(Defense):
    """Training by DP-SGD; each ``Fitted.notes["privacy"]`` is a ``Privacy``.

    By itself it trains from scratch, through Opacus. As ``CWRF(..., private=DPSGD(...))`` it is what fine-tunes around
    the rewound weights: through ``ClippedGradients``, so that those count in no norm and get no noise. In both cases
    Opacus' accountant tells epsilon.

    A step takes each sample with probability ``1 / ceil(n / batch_size)``; there are ``epochs * ceil(n / batch_size)``
    steps, with the recipe's optimizer and schedule. Models are trained one by one. The noise follows from the seed: an
    audit needs that, but who knows the seed can take the noise off, so that the guarantee is for seeds kept secret.

    Args:
        epsilon: what all steps together may spend: the noise follows from it.
        noise_multiplier: instead of epsilon; 0: no noise.
        delta: below 1 / n, or the guarantee is empty.
        max_grad_norm: what each sample's gradient is clipped to.
        recipe: instead of the task's: private training likes larger batches.
        accountant: "prv", "rdp" or "gdp", as Opacus names them.

    Raises:
        ImportError: Opacus is not installed.
        ValueError: an argument is out of range, or not one of epsilon and noise_multiplier is given. From a fit: the
            model mixes samples (BatchNorm), or delta is not below 1 / n.

    Source:
        Abadi et al., "Deep learning with differential privacy", CCS 2016.
    """

    def __init__(
        self,
        epsilon: float | None = None,
        *,
        noise_multiplier: float | None = None,
        delta: float = 1e-5,
        max_grad_norm: float = 1.0,
        recipe: Recipe | None = None,
        accountant: str = "prv",
    ) -> None:
        if (epsilon is None) == (noise_multiplier is None):
            raise ValueError(f"one of epsilon and noise_multiplier must be given; got {epsilon} and {noise_multiplier}")
        if epsilon is not None and not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon must be positive and finite; got {epsilon}")
        if noise_multiplier is not None and not 0 <= noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier must be at least 0 and finite; got {noise_multiplier}")
        if not 0 < delta < 1 or not 0 < max_grad_norm < math.inf:
            raise ValueError(
                f"delta must lie between 0 and 1 and max_grad_norm be positive; got {delta} and {max_grad_norm}"
            )
        if accountant not in ACCOUNTANTS:
            raise ValueError(f"accountant must be one of {ACCOUNTANTS}; got {accountant!r}")
        if importlib.util.find_spec("opacus") is None:
            raise ImportError("DPSGD needs Opacus, which is not installed; pip install opacus brings it", name="opacus")
        self.epsilon, self.noise_multiplier, self.delta = epsilon, noise_multiplier, delta
        self.max_grad_norm, self.recipe, self.accountant = max_grad_norm, recipe, accountant

    def __repr__(self) -> str:
        given = "epsilon" if self.noise_multiplier is None else "noise_multiplier"
        return f"DPSGD({given}={getattr(self, given)}, delta={self.delta}, max_grad_norm={self.max_grad_norm})"

    def fit_many(
        self,
        task: Task,
        train_ids: Sequence[Tensor],
        reference_ids: Tensor,
        seeds: Sequence[int],
        *,
        trained: Sequence[Fitted] | None = None,
    ) -> list[Fitted]:
        """``trained`` is not used: training starts from the initial weights, so that epsilon covers the model."""
        models = [task.initial_model(seed) for seed in seeds]
        initial = [snapshot(model) for model in models]
        epochs = (self.recipe or task.recipe).epochs
        spent = [
            self._train(model, task, ids, seed, cross_entropy, epochs, None, "model")
            for model, ids, seed in zip(models, train_ids, seeds, strict=True)
        ]
        return [
            Fitted(model, before, notes={"privacy": privacy})
            for model, before, privacy in zip(models, initial, spent, strict=True)
        ]

    def fine_tune(
        self,
        task: Task,
        models: Sequence[nn.Module],
        trained: Sequence[Fitted],
        train_ids: Sequence[Tensor],
        seeds: Sequence[int],
        *,
        loss: Loss = cross_entropy,
        epochs: int | None = None,
        masks: Sequence[MaskSet],
        frozen: Sequence[MaskSet] | None = None,
        covers: str = "fine-tuning",
    ) -> list[Fitted]:
        """Train ``models`` in place around weights that stay, as CWRF does.

        Args:
            task: dataset and recipe.
            models: changed from the trained ones in any way.
            trained: where they come from.
            train_ids: for each model, the indices of its members.
            seeds: for each model.
            loss: called with each sample alone, as a batch of one: a loss of a whole batch has no sensitivity.
            epochs: None: half of the recipe's, rounded up.
            masks: for each model, the critical weights: ``Fitted.masks``.
            frozen: for each model, what stays; None: the critical weights.
            covers: "model" where nothing of the start was computed from the members, see ``Privacy``.
        """
        epochs = math.ceil((self.recipe or task.recipe).epochs / 2) if epochs is None else epochs
        return [
            Fitted(
                model,
                before.initial,
                mask,
                notes={"privacy": self._train(model, task, ids, seed, loss, epochs, stay, covers)},
            )
            for model, before, ids, seed, mask, stay in zip(
                models, trained, train_ids, seeds, masks, frozen or masks, strict=True
            )
        ]

    def check(self, model: nn.Module, samples: int) -> None:
        """Whether a model can be trained privately on so many samples.

        Raises:
            ValueError: it mixes samples (BatchNorm), or delta is not below 1 / samples.
        """
        refuse_mixing(model)
        if not self.delta * samples < 1:
            raise ValueError(f"delta must be below 1 / n, {1 / samples:.3g} for {samples} samples; got {self.delta}")

    def _train(
        self,
        model: nn.Module,
        task: Task,
        ids: Tensor,
        seed: int,
        loss: Loss,
        epochs: int,
        frozen: MaskSet | None,
        covers: str,
    ) -> Privacy:
        self.check(model, len(ids))
        recipe = self.recipe or task.recipe
        per_epoch = math.ceil(len(ids) / recipe.batch_size)
        rate, steps = 1 / per_epoch, epochs * per_epoch
        noise = self.noise_multiplier
        if self.epsilon is not None:
            noise = noise_for(self.epsilon, rate, steps, self.delta, self.accountant)
        assert noise is not None  # __init__ has checked
        optimizer = _optimizer([p for p in model.parameters() if p.requires_grad], recipe)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(recipe, step, steps))
        draws = torch.Generator().manual_seed(seed)
        noises = torch.Generator(next(model.parameters()).device)
        noises.manual_seed(int(torch.randint(2**63 - 1, (), generator=draws)))
        settings = (model, optimizer, noise, self.max_grad_norm, max(1, round(len(ids) * rate)), noises)
        fleet = Alone(model, seed)
        with ExitStack() as stack:
            stack.callback(fleet.finish)
            take = stack.enter_context(
                through_opacus(*settings) if frozen is None else around_frozen(*settings, frozen)
            )
            for step in range(steps):
                batch = ids[torch.rand(len(ids), generator=draws) < rate]
                take(_losses(fleet, task.dataset, batch, loss, step // per_epoch))
                schedule.step()
        spent = epsilon_of(noise, rate, steps, self.delta, self.accountant)
        return Privacy(spent, self.delta, noise, self.max_grad_norm, rate, steps, self.accountant, covers)


def _losses(fleet: Alone, dataset: Dataset, batch: Tensor, loss: Loss, epoch: int) -> Tensor | None:
    """``[B]``, each of one sample alone; None for an empty batch."""
    if not len(batch):
        return None

    def each(logits: Tensor, targets: Tensor, *, epoch: int = 0) -> Tensor:
        return torch.func.vmap(lambda z, y: loss(z[None], y[None], epoch=epoch))(logits, targets)

    return fleet.losses(each, dataset.inputs[batch][None], dataset.targets[batch][None], epoch)[0]
