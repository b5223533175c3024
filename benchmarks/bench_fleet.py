"""Many small models trained as one stack against the same models trained one after another, as anyone would."""

import statistics
from collections.abc import Callable

import pytest
import torch
from cwfast.benchmarks import _harness
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional

from cwfast.data import Dataset
from cwfast.data.bundled import digits
from cwfast.training import Recipe, Task, train_many


def _mlp() -> nn.Module:
    """Small: what one model spends on a step is mostly overhead, which a stack shares."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def _wide() -> nn.Module:
    """The demo's network: its matrix products take half of a step alone, so that no stack could be twice as fast.

    (One thread, 32 models, CPU time a step: products 15 ms one by one and 16 ms stacked, of 31 and 29 ms.)
    """
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class _ViT(nn.Module):
    """16 patches of 2 x 2, two encoder layers of width 32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 32, 2, stride=2)
        self.position = nn.Parameter(torch.randn(1, 16, 32) * 0.02)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x.view(-1, 1, 8, 8)).flatten(2).transpose(1, 2)
        result: Tensor = self.head(self.blocks(patches + self.position).mean(dim=1))
        return result


ARCHITECTURES = {"mlp": _mlp, "mlp_wide": _wide, "cnn": _cnn, "vit": _ViT}


def _plain(model: nn.Module, data: Dataset, ids: Tensor, seed: int, recipe: Recipe) -> None:
    """The recipe as a loop over batches, with torch's own optimizer in its fastest form."""
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, momentum=recipe.momentum, fused=True)
    steps = recipe.epochs * -(-len(ids) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        for batch in ids[torch.randperm(len(ids), generator=generator)].split(recipe.batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(model(data.inputs[batch]), data.targets[batch]).backward()
            optimizer.step()
            schedule.step()


def _products(model: nn.Module, count: int, samples: int, recipe: Recipe) -> Callable[[], None]:
    """What no stack can do without: the batched matrix products of all steps, forward and backward, alone."""
    layers = [layer.weight.shape for layer in model if isinstance(layer, nn.Linear)]
    weights = [torch.randn(count, *shape) for shape in layers]
    ends = [min(recipe.batch_size, samples - begin) for begin in range(0, samples, recipe.batch_size)]
    rows = {n: [(torch.randn(count, n, i), torch.randn(count, n, o)) for o, i in layers] for n in set(ends)}

    def run() -> None:
        for n in ends * recipe.epochs:
            for place, (weight, (inputs, grads)) in enumerate(zip(weights, rows[n], strict=True)):
                torch.bmm(inputs, weight.mT)
                torch.bmm(grads.mT, inputs)
                if place:  # the first layer's inputs are data
                    torch.bmm(grads, weight)

    return run


def _check(task: Task, ids: list[Tensor], seeds: list[int]) -> None:
    """In float64 both ways end in the same weights and running statistics."""
    data = Dataset(**{**vars(task.dataset), "inputs": task.dataset.inputs.double()})
    recipe = Recipe(lr=task.recipe.lr, epochs=1, batch_size=64)
    stacked, alone = ([task.initial_model(seed).double() for seed in seeds] for _ in range(2))
    train_many(stacked, data, ids, seeds, recipe)
    for model, plain, own, seed in zip(stacked, alone, ids, seeds, strict=True):
        _plain(plain, data, own, seed, recipe)
        for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_fleet(benchmark: BenchmarkFixture, kind: str) -> None:
    """Digits, halves of 600 samples, batches of 64; one call trains all models anew from the same initial weights."""
    count = _harness.by_size(tiny=3, full=32)
    epochs = _harness.by_size(tiny=1, full={"mlp": 10, "mlp_wide": 3, "cnn": 2, "vit": 1}[kind])
    data = digits(seed=0)
    task = Task(ARCHITECTURES[kind], data, Recipe(lr=0.1, batch_size=64, epochs=epochs))
    seeds = list(range(count))
    ids = [data.pool[torch.randperm(1200, generator=torch.Generator().manual_seed(seed))[:600]] for seed in seeds]
    _check(task, ids[:3], seeds[:3])

    def fresh() -> list[nn.Module]:
        return [task.initial_model(seed) for seed in seeds]

    def stacked() -> None:
        train_many(fresh(), data, ids, seeds, task.recipe)

    def one_by_one() -> None:
        for model, own, seed in zip(fresh(), ids, seeds, strict=True):
            _plain(model, data, own, seed, task.recipe)

    variants: dict[str, Callable[[], object]] = {"cwfast": stacked, "one_by_one": one_by_one, "initial": fresh}
    if kind.startswith("mlp"):
        variants["products"] = _products(task.initial_model(0), count, len(ids[0]), task.recipe)
    times = _harness.interleaved(variants, 5, seconds=120)
    ratios = {"times_one_by_one": _harness.ratio(times, "one_by_one", "cwfast")}
    if "products" in times:
        ratios["at_most_times_one_by_one"] = _harness.ratio(times, "one_by_one", "products")
    steps = epochs * -(-600 // 64)
    each = statistics.median(times["cwfast"]) / (steps * count)
    case = f"fleet {kind} K={count} steps={steps}"
    _harness.report(benchmark, case, times, stacked, ratios=ratios, seconds_per_model_step=each)
