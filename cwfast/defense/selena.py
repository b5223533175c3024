"""SELENA: a model that learns from models which have not seen the sample."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cwfast.data import Dataset
from cwfast.defense.losses import soft_cross_entropy
from cwfast.training import Defense, Fitted, Task, fit_from_scratch


class SELENA(Defense):
    """Split-AI and self-distillation: of K sub-models L leave a sample out; a fresh model learns what these say of it.

    The soft label of a member is the mean of the probabilities that its L sub-models give it. Sub-models and final
    model are trained by the recipe, on the cross-entropy with labels and with soft labels; a model costs K + 1
    trainings. The authors draw each sample's L sub-models by themselves. Here they are dealt so that all sub-models
    see equally many samples and can be trained as one stack: each sample's L are still uniform among all. At most one
    sample of a sub-model is dropped for that. The authors keep the epoch with the best test accuracy; here it is the
    last.

    Args:
        sub_models: K, at least 2.
        left_out: L, 1 .. K - 1.

    Source:
        Tang et al., "Mitigating Membership Inference Attacks by Self-Distillation Through a Novel Ensemble
        Architecture", USENIX Security 2022, and its code.
    """

    def __init__(self, sub_models: int = 25, left_out: int = 10) -> None:
        if not 1 <= left_out < sub_models:
            raise ValueError(f"left_out must lie between 1 and sub_models - 1; got {left_out} of {sub_models}")
        self.sub_models, self.left_out = sub_models, left_out

    def fit_many(
        self,
        task: Task,
        train_ids: Sequence[Tensor],
        reference_ids: Tensor,
        seeds: Sequence[int],
        *,
        trained: Sequence[Fitted] | None = None,
    ) -> list[Fitted]:
        """``trained`` is not used: training starts from initial weights. Models are fitted one after the other.

        Raises:
            ValueError: there are so few members that a sub-model would see none.
        """
        fitted = []
        for ids, seed in zip(train_ids, seeds, strict=True):
            soft = self.soft_labels(task, ids, seed)
            members = Dataset(**vars(task.dataset) | {"inputs": task.dataset.inputs[ids], "targets": soft})
            distilling = replace(task, dataset=members)
            fitted += fit_from_scratch(distilling, [torch.arange(len(ids))], [seed], loss=soft_cross_entropy)
        return fitted

    def soft_labels(self, task: Task, ids: Tensor, seed: int) -> Tensor:
        """``[n, C]``: what sub-models that have not seen a sample think of it."""
        generator = torch.Generator().manual_seed(seed)
        unseen = deal(len(ids), self.sub_models, self.left_out, generator)
        seeds = torch.randint(2**62, (self.sub_models,), generator=generator).tolist()
        parts = [ids[~unseen[:, k]] for k in range(self.sub_models)]
        smallest = min(map(len, parts))
        if not smallest:
            raise ValueError(
                f"each of {self.sub_models} sub-models must see a sample; got {len(ids)} samples, each left out of "
                f"{self.left_out}"
            )
        fitted = fit_from_scratch(task, [part[:smallest] for part in parts], seeds)
        batches = task.dataset.inputs[ids].split(1024)
        outputs = torch.stack([torch.cat([one.predict(x) for x in batches]).softmax(dim=1) for one in fitted], dim=1)
        return (outputs * unseen.to(outputs)[..., None]).sum(dim=1) / self.left_out


def deal(samples: int, models: int, left_out: int, generator: torch.Generator) -> Tensor:
    """bool ``[samples, models]``: model k does not see sample i.

    Each sample has ``left_out`` of them, uniform among all sets of that size; the models' counts differ by at most 1.
    """
    found = torch.zeros(samples, models, dtype=torch.bool)
    order = torch.randperm(samples, generator=generator)
    for block in order.split(models):
        columns = torch.randperm(models, generator=generator)
        # A whole block is balanced with windows that begin at each model once; a part of one, with windows end to end.
        begin = torch.arange(len(block)) * (1 if len(block) == models else left_out)
        for i, first in zip(block.tolist(), begin.tolist(), strict=True):
            found[i, columns[torch.arange(first, first + left_out) % models]] = True
    return found
