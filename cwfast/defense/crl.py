"""CRL: relaxed losses of bounded logits and of the distances of bounded features to the centers of their classes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cwfast._fleet import Fleet
from cwfast._parameters import snapshot
from cwfast.defense.losses import relaxed_targets
from cwfast.training import Defense, Fitted, Objective, Recipe, Task, train_many


class CRL(Defense):
    """Trains on ``relaxed_loss + lam * center_loss``; one center per class is learned beside the model.

    With logits z, features f (what the last linear layer reads) and centers c all bounded, ``x / (1 + t |x|)``; L the
    mean cross-entropy of the bounded logits, and D the mean of ``|f - c_y|^2 / 2``:

    * relaxed_loss: ``|L - alpha|`` in odd epochs, counted from 0; L in even ones where ``L > alpha``, else the
      cross-entropy of the bounded logits with RelaxLoss's soft targets (``upper``), of the logits as they are;
    * center_loss: ``|D - alpha_c|`` in odd epochs; D in even ones where ``D > alpha_c``, else the mean of
      ``(q |f - c_y|^2 + (1 - q) |f|^2) / 2`` with ``q = clamp(p_y, 0, upper_c)``.

    Centers begin as standard normal and take steps of SGD at ``lr_centers``, with the recipe's momentum and weight
    decay, and no schedule. The authors count epochs from 1, hence the order of odd and even. Their settings files are
    not published: ``alpha_c``, ``upper_c`` and ``t_c`` have the defaults of their code, the others are ours. With a
    bounded norm of 1 / t the cross-entropy has a floor above 0: ``alpha`` below that floor relaxes nothing.

    Args:
        alpha: target of the mean cross-entropy, at least 0.
        upper: see ``RelaxLoss``.
        t: bounds the logits' norm by 1 / t, above 0.
        lam: weight of the center loss, at least 0.
        alpha_c: target of the mean distance, at least 0.
        upper_c: in (0, 1].
        t_c: bounds the norm of features and centers, above 0.
        lr_centers: above 0.

    Source:
        Fang & Kim, "Center-Based Relaxed Learning Against Membership Inference Attacks", UAI 2024, and its code.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        *,
        upper: float = 1.0,
        t: float = 0.1,
        lam: float = 0.1,
        alpha_c: float = 1.0,
        upper_c: float = 1.0,
        t_c: float = 1.0,
        lr_centers: float = 0.1,
    ) -> None:
        if not (alpha >= 0 and alpha_c >= 0 and lam >= 0):
            raise ValueError(f"alpha, alpha_c and lam must be at least 0; got {alpha}, {alpha_c} and {lam}")
        if not (0 < upper <= 1 and 0 < upper_c <= 1):
            raise ValueError(f"upper and upper_c must be in (0, 1]; got {upper} and {upper_c}")
        if not (t > 0 and t_c > 0 and lr_centers > 0):
            raise ValueError(f"t, t_c and lr_centers must be above 0; got {t}, {t_c} and {lr_centers}")
        self.alpha, self.upper, self.t, self.lam = alpha, upper, t, lam
        self.alpha_c, self.upper_c, self.t_c, self.lr_centers = alpha_c, upper_c, t_c, lr_centers

    def relaxed_loss(self, logits: Tensor, targets: Tensor, *, epoch: int = 0) -> Tensor:
        """Of logits ``[B, C]``."""
        log_p = functional.log_softmax(bounded(logits, self.t), dim=1)
        mean = functional.nll_loss(log_p, targets)
        if epoch % 2:
            return (mean - self.alpha).abs()
        soft = relaxed_targets(functional.log_softmax(logits, dim=1), targets, self.upper)
        return torch.where(mean > self.alpha, mean, -(soft * log_p).sum(dim=1).mean())

    def center_loss(
        self, logits: Tensor, features: Tensor, centers: Tensor, targets: Tensor, *, epoch: int = 0
    ) -> Tensor:
        """Of logits ``[B, C]``, features ``[B, D]`` and centers ``[C, D]``."""
        features, centers = bounded(features, self.t_c), bounded(centers, self.t_c)
        away = (features - centers[targets]).square().sum(dim=1)
        mean = away.mean() / 2
        if epoch % 2:
            return (mean - self.alpha_c).abs()
        p = functional.softmax(logits, dim=1).gather(1, targets[:, None])[:, 0].clamp(0, self.upper_c)
        relaxed = (p * away + (1 - p) * features.square().sum(dim=1)).mean() / 2
        return torch.where(mean > self.alpha_c, mean, relaxed)

    def fit_many(
        self,
        task: Task,
        train_ids: Sequence[Tensor],
        reference_ids: Tensor,
        seeds: Sequence[int],
        *,
        trained: Sequence[Fitted] | None = None,
    ) -> list[Fitted]:
        """``trained`` is not used: training starts from the initial weights.

        Raises:
            ValueError: the model has no linear layer.
        """
        models = [task.initial_model(seed) for seed in seeds]
        initial = [snapshot(model) for model in models]
        wrapped = [WithFeatures(model) for model in models]
        train_many(
            wrapped,
            task.dataset,
            train_ids,
            seeds,
            task.recipe,
            objective=lambda fleet, rows: _Centered(
                fleet, rows, [seeds[k] for k in rows], wrapped[0].read_out.weight, task.recipe, self
            ),
        )
        return [Fitted(model, before) for model, before in zip(models, initial, strict=True)]


def bounded(x: Tensor, t: float) -> Tensor:
    """``x / (1 + t (|x| + 1e-7))``, row by row."""
    return x / (1 + t * (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-7))


class WithFeatures(nn.Module):
    """A classifier whose output ``[B, C + D]`` is its logits and, behind them, what its last linear layer read.

    Raises:
        ValueError: it has no linear layer.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not any(isinstance(module, nn.Linear) for module in model.modules()):
            raise ValueError(f"CRL needs a model with a linear layer, whose input is the features; got {model}")
        self.model = model

    @property
    def read_out(self) -> nn.Linear:
        """The last linear layer."""
        return [module for module in self.model.modules() if isinstance(module, nn.Linear)][-1]

    def forward(self, inputs: Tensor) -> Tensor:
        read: list[Tensor] = []
        hook = self.read_out.register_forward_pre_hook(lambda _, given: read.append(given[0]))
        try:
            logits = self.model(inputs)
        finally:
            hook.remove()
        return torch.cat([logits, read[-1]], dim=1)


class _Centered(Objective):
    def __init__(
        self, fleet: Fleet, models: range, seeds: Sequence[int], like: Tensor, recipe: Recipe, settings: CRL
    ) -> None:
        super().__init__(fleet, models)
        self._settings, self._classes = settings, len(like)
        drawn = [torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self._centers = torch.stack(drawn).to(like).requires_grad_()
        self._optimizer = torch.optim.SGD(
            [self._centers], settings.lr_centers, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )

    def losses(self, inputs: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """Both losses."""

        def both(outputs: Tensor, centers: Tensor, targets: Tensor) -> Tensor:
            logits, features = outputs.split([self._classes, outputs.shape[1] - self._classes], dim=1)
            relaxed = self._settings.relaxed_loss(logits, targets, epoch=epoch)
            return relaxed + self._settings.lam * self._settings.center_loss(
                logits, features, centers, targets, epoch=epoch
            )

        found: Tensor = torch.func.vmap(both)(self.outputs(inputs), self._centers, targets)
        return found

    def stepped(self) -> None:
        """The centers' step."""
        self._optimizer.step()
        self._optimizer.zero_grad()
