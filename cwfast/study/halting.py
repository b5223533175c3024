"""The control that uses the reference set as gap does: training stopped where the loss on it is lowest."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from cwfast.defense.baselines import PlainTraining
from cwfast.defense.hamp import HAMPOutputs
from cwfast.defense.specs import parse
from cwfast.training import Defense, Fitted, Loss, Task, train_many


class Best:
    """Of each model, the weights at the lowest cross-entropy on the reference set so far."""

    def __init__(self, task: Task, reference_ids: Tensor, seeds: Sequence[int]) -> None:
        self._inputs, self._targets = task.dataset.inputs[reference_ids], task.dataset.targets[reference_ids]
        self._model = task.initial_model(seeds[0]).eval()
        self._lowest = [float("inf")] * len(seeds)
        self.states: list[dict[str, Tensor]] = [{} for _ in seeds]

    @torch.no_grad()
    def see(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """The weights after an epoch."""
        for k, state in enumerate(states):
            logits = torch.func.functional_call(self._model, dict(state), (self._inputs,))
            loss = float(functional.cross_entropy(logits, self._targets))
            if loss < self._lowest[k] or not self.states[k]:  # a loss may be NaN throughout
                self._lowest[k] = loss
                self.states[k] = {name: value.clone() for name, value in state.items()}


class Halted(Defense):
    """Fine-tuning of trained models, nothing rewound, up to the lowest loss on the reference set.

    That may be before the first epoch. Steps, rate and schedule are those of CWRF's fine-tuning.

    Args:
        loss: to train by.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def fit_many(
        self,
        task: Task,
        train_ids: Sequence[Tensor],
        reference_ids: Tensor,
        seeds: Sequence[int],
        *,
        trained: Sequence[Fitted] | None = None,
    ) -> list[Fitted]:
        """As ``Defense.fit_many``.

        Raises:
            ValueError: ``trained`` is not given.
        """
        if trained is None:
            raise ValueError("trained must be given: there is nothing to fine-tune; got None")
        models = [copy.deepcopy(one.model) for one in trained]
        best = Best(task, reference_ids, seeds)
        best.see([dict(model.state_dict()) for model in models])
        epochs = -(-task.recipe.epochs // 2)
        train_many(
            models, task.dataset, train_ids, seeds, task.recipe, loss=self.loss, epochs=epochs,
            on_epoch=lambda _, weights: best.see(weights()),
        )  # fmt: skip
        for model, state in zip(models, best.states, strict=True):
            model.load_state_dict(state)
        return [Fitted(model, before.initial) for model, before in zip(models, trained, strict=True)]


def halted(spec: str) -> Defense:
    """By the loss of a spec; HAMP's models answer as HAMP's do."""
    whole = parse("none" if spec == "ce" else spec.replace("(", ":", 1).removesuffix(")"))
    outputs = isinstance(whole, HAMPOutputs)
    plain = whole.defense if isinstance(whole, HAMPOutputs) else whole
    if not isinstance(plain, PlainTraining):
        raise ValueError(f"a base defense must be a loss; got {spec!r}")
    return HAMPOutputs(Halted(plain.loss)) if outputs else Halted(plain.loss)
