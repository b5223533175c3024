"""Adversarial regularisation: a network that tells members from others is trained along, and fooled."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cwfast._fleet import Fleet
from cwfast.data import Dataset
from cwfast.defense.losses import one_hot
from cwfast.training import Defense, Fitted, Objective, Task, fit_from_scratch, seeded


class AdvReg(Defense):
    """Trains on ``CE + alpha (mean_i h(z_i, y_i) - 0.5)``, h being an attack network's guess that i is a member.

    h sees logits and label, the latter as 1 for its class and -1 for the others; it is trained by Adam on the squared
    error of its guess, on batches of half members, half reference samples, drawn with replacement by the model's seed.
    After ``warmup`` epochs on the cross-entropy alone, it is trained for five epochs' worth of steps; from then on for
    ``attack_steps`` before each step of the model, which it sees in evaluation mode. The authors run 52 of its steps
    for each 2 of the model's: ``attack_steps=26``.

    Args:
        alpha: weight of the attack's guess, at least 0; 3 is the authors' on Purchase100.
        attack_steps: before each step of the model.
        attack_lr: of Adam.
        warmup: epochs, at least 0.
        width: of the attack network's first layer, by which the others scale, a multiple of 16; 1024 is the authors'.
            Beside a small model the network is the larger one: 1024 is 0.8 million weights.
        initial_std: of its initial weights, the authors' 0.01; None: torch's own, as in MLHospital. From 0.01, its
            guesses are all 0.5 for hundreds of steps; if it is narrow, for all that small data has.

    Source:
        Nasr, Shokri & Houmansadr, "Machine Learning with Membership Privacy using Adversarial Regularization", CCS
        2018, and its code, from which network, initialisation, loss and ``attack_lr`` are.
    """

    def __init__(
        self,
        alpha: float = 3.0,
        *,
        attack_steps: int = 5,
        attack_lr: float = 1e-4,
        warmup: int = 1,
        width: int = 1024,
        initial_std: float | None = 0.01,
    ) -> None:
        if not (alpha >= 0 and attack_lr > 0 and attack_steps >= 1 and warmup >= 0):
            raise ValueError(
                "alpha and warmup must be at least 0, attack_steps 1, attack_lr above 0; "
                f"got {alpha}, {warmup}, {attack_steps} and {attack_lr}"
            )
        if width < 16 or width % 16:
            raise ValueError(f"width must be a multiple of 16, at least 16; got {width}")
        self.alpha, self.attack_steps, self.attack_lr, self.warmup = alpha, attack_steps, attack_lr, warmup
        self.width, self.initial_std = width, initial_std

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
            ValueError: there is no reference sample.
        """
        if len(reference_ids) == 0:
            raise ValueError("reference_ids must hold at least one sample, for the attack network; got none")

        def objective(fleet: Fleet, models: range) -> Objective:
            own = [train_ids[k] for k in models], [seeds[k] for k in models]
            return _Fooling(fleet, models, task.dataset, *own, reference_ids, task.recipe.batch_size, self)

        return fit_from_scratch(task, train_ids, seeds, objective=objective)


class _Fooling(Objective):
    def __init__(
        self,
        fleet: Fleet,
        models: range,
        dataset: Dataset,
        members: Sequence[Tensor],
        seeds: Sequence[int],
        reference: Tensor,
        batch_size: int,
        settings: AdvReg,
    ) -> None:
        super().__init__(fleet, models)
        self._data, self._settings, self._seeds = dataset, settings, seeds
        self._members, self._reference = torch.stack(list(members)), reference
        self._size = min(batch_size, self._members.shape[1])
        self._epoch_steps = -(-self._members.shape[1] // batch_size)
        self._random = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._attack: Attack | None = None

    def start(self, epoch: int) -> None:
        """The attack's head start."""
        if epoch == self._settings.warmup:
            for _ in range(5 * self._epoch_steps):
                self._train_attack(1)

    def losses(self, inputs: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """After the attack's steps."""
        fooling = epoch >= self._settings.warmup
        if fooling:
            self._train_attack(self._settings.attack_steps)
        logits = self.outputs(inputs)
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        mean = losses.view_as(targets).mean(dim=1)
        if not fooling or self._attack is None:
            return mean
        return mean + self._settings.alpha * (self._attack.frozen(logits, targets).mean(dim=1) - 0.5)

    def _train_attack(self, steps: int) -> None:
        """On one pass of the model, which does not change meanwhile."""
        drawn = [self._draw(k, steps * self._size) for k in range(len(self.models))]
        batch = torch.stack(drawn)
        self.fleet.module.eval()
        with torch.no_grad():
            logits = self.outputs(self._data.inputs[batch])
        self.fleet.module.train()
        if self._attack is None:
            self._attack = Attack(logits.shape[2], self._seeds, self._settings, like=logits)
        # [K, members then others, steps * size] -> a step takes its part of both
        shape = (len(self.models), 2, steps, self._size)
        logits = logits.view(*shape, -1).transpose(1, 2).flatten(2, 3)
        labels = self._data.targets[batch].view(shape).transpose(1, 2).flatten(2, 3)
        for step in range(steps):
            self._attack.step(logits[:, step], labels[:, step])

    def _draw(self, model: int, count: int) -> Tensor:
        sets = (self._members[model], self._reference)
        return torch.cat([ids[torch.randint(len(ids), (count,), generator=self._random[model])] for ids in sets])


class Attack:
    """Attack networks of K models, in one stack.

    Args:
        classes: C.
        seeds: of each network's initial weights.
        settings: ``attack_lr``, ``width``, ``initial_std``.
        like: a tensor of the dtype and on the device that they shall have.
    """

    def __init__(self, classes: int, seeds: Sequence[int], settings: AdvReg, *, like: Tensor) -> None:
        networks = []
        for seed in seeds:
            with seeded(seed):
                networks.append(AttackNetwork(classes, settings.width, settings.initial_std).to(like))
        self._network = networks[0]
        self.parameters, _ = torch.func.stack_module_state(networks)
        self._optimizer = torch.optim.Adam(self.parameters.values(), settings.attack_lr, fused=True)

    def step(self, logits: Tensor, labels: Tensor) -> None:
        """One step, on ``[K, 2 B, C]`` and ``[K, 2 B]``, the first half of them members."""
        guesses = self._guess(self.parameters, logits, labels)
        truth = torch.zeros_like(guesses)
        truth[:, : guesses.shape[1] // 2] = 1
        self._optimizer.zero_grad()
        (guesses - truth).square().mean(dim=1).sum().backward()
        self._optimizer.step()

    def frozen(self, logits: Tensor, labels: Tensor) -> Tensor:
        """``[K, B]``: the guesses, in 0 .. 1; a gradient reaches the logits, not the networks."""
        return self._guess({name: p.detach() for name, p in self.parameters.items()}, logits, labels)

    def _guess(self, parameters: dict[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
        def guess(weights: dict[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
            return torch.func.functional_call(self._network, weights, (logits, labels))

        found: Tensor = torch.func.vmap(guess)(parameters, logits, labels)
        return found


class AttackNetwork(nn.Module):
    """Logits ``[B, C]`` and labels ``[B]`` -> the guess ``[B]`` that they are a member's."""

    def __init__(self, classes: int, width: int = 1024, initial_std: float | None = 0.01) -> None:
        super().__init__()
        half, quarter, eighth, last = width // 2, width // 4, width // 8, width // 16
        self.outputs = _layers(classes, width, half, last)
        self.labels = _layers(classes, eighth, last)
        self.both = nn.Sequential(*_layers(2 * last, half, quarter, eighth, last), nn.Linear(last, 1))
        for name, parameter in self.named_parameters():
            if initial_std is not None and name.endswith("weight"):
                nn.init.normal_(parameter, std=initial_std)
            elif initial_std is not None:
                nn.init.zeros_(parameter)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        signs = 2 * one_hot(labels, logits) - 1
        both = torch.cat([self.outputs(logits), self.labels(signs)], dim=1)
        guess: Tensor = self.both(both)
        return guess[:, 0].sigmoid()


def _layers(*widths: int) -> nn.Sequential:
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*[layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())])
