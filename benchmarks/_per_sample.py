"""The other ways to per-sample scores, each as its documentation says: one backward per sample, torch.func, Opacus,
BackPACK. Each takes a model and returns a function that adds the scores of a batch, in place where that saves memory.
"""

import math
import warnings
from collections.abc import Callable, Mapping

import torch
from cwfast.benchmarks import _harness
from cwfast.benchmarks._models import Problem, loss
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from cwfast.testing import assert_no_worse

Scores = dict[str, Tensor]
Step = Callable[[Tensor, Tensor, Scores], None]

VMAP_SAMPLES = 16  # of whose gradients vmap holds all at once: no slower than 64, and a quarter of the memory


def zeros(model: nn.Module) -> Scores:
    """Scores of nothing yet, float32 or float64."""
    return {
        name: torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        for name, parameter in model.named_parameters()
    }


def loop(model: nn.Module, power: int = 1) -> Step:
    """One backward pass per sample; ``power`` 2: the sum of squares of the gradients instead of |g w|."""
    parameters = dict(model.named_parameters())

    def step(x: Tensor, y: Tensor, scores: Scores) -> None:
        for i in range(len(x)):
            gradients = torch.autograd.grad(loss(model, x[i : i + 1], y[i : i + 1]), list(parameters.values()))
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                scores[name].add_(gradient.square_() if power == 2 else gradient.mul_(parameter.detach()).abs_())

    return step


def vmap_all(model: nn.Module, samples: int | None = None) -> Step:
    """torch.func's per-sample gradients, those of all samples at once (or of some)."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def of_one(values: Scores, row: Tensor, target: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the fused one has no batching rule: it would run sample by sample
            return loss(lambda x: functional_call(model, values, (x,)), row[None], target[None])

    gradients_of = vmap(grad(of_one), in_dims=(None, 0, 0))

    def step(x: Tensor, y: Tensor, scores: Scores) -> None:
        count = samples or len(x)
        for i in range(0, len(x), count):
            for name, each in gradients_of(parameters, x[i : i + count], y[i : i + count]).items():
                scores[name].addcmul_(each.abs_().sum(0), parameters[name].abs())

    return step


def vmap_some(model: nn.Module) -> Step:
    """The same for ``VMAP_SAMPLES`` samples at a time."""
    return vmap_all(model, VMAP_SAMPLES)


def opacus(model: nn.Module) -> Step:
    """GradSampleModule's hooks leave ``.grad_sample [B, ...]``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = _harness.peer("opacus").GradSampleModule(model, loss_reduction="mean")

    def step(x: Tensor, y: Tensor, scores: Scores) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own hooks warn
            loss(wrapped, x, y).backward()
        for name, parameter in model.named_parameters():
            scores[name].addcmul_(parameter.grad_sample.abs_().sum(0), parameter.detach().abs())
            parameter.grad_sample = None

    return step


def backpack(model: nn.Module) -> Step:
    """BatchGrad leaves ``.grad_batch [B, ...]``, of the mean loss."""
    return _backpack(model, "BatchGrad", "grad_batch")


def backpack_fisher(model: nn.Module) -> Step:
    """SumGradSquared: the sum over samples of the squared gradients of the mean loss."""
    return _backpack(model, "SumGradSquared", "sum_grad_squared")


def _backpack(model: nn.Module, extension: str, result: str) -> Step:
    package = _harness.peer("backpack")
    extended, make = package.extend(model), getattr(package.extensions, extension)

    def step(x: Tensor, y: Tensor, scores: Scores) -> None:
        with warnings.catch_warnings(), package.backpack(make()):
            warnings.simplefilter("ignore")  # its hooks on a model whose input needs no gradient
            loss(extended, x, y).backward()
        for name, parameter in model.named_parameters():
            found = getattr(parameter, result)
            if result == "grad_batch":
                scores[name].addcmul_(found.abs_().sum(0), parameter.detach().abs(), value=len(x))
            else:
                scores[name].add_(found, alpha=len(x) ** 2)
            delattr(parameter, result)

    return step


PEERS: dict[str, Callable[[nn.Module], Step]] = {
    "loop": loop,
    "vmap": vmap_some,
    "opacus": opacus,
    "backpack": backpack,
}


def here(names: tuple[str, ...]) -> list[str]:
    """Those of the peers that are installed; the others are noted as skipped."""
    packages = {"opacus": "opacus", "backpack": "backpack", "backpack_fisher": "backpack"}
    return [name for name in names if name not in packages or _harness.peer(packages[name]) is not None]


class Truth:
    """The scores of a problem by one backward pass per sample, in float64 and as precise as a loop can have them."""

    def __init__(self, make: Callable[[], Problem], power: int = 1) -> None:
        self._sums: list[Scores] = []
        for exact in (True, False):
            model, x, y = make()
            if exact:
                model, x = model.double(), x.double() if x.is_floating_point() else x
            scores = zeros(model)
            loop(model, power)(x, y, scores)
            self._sums.append(scores)

    def check(self, scores: Scores, *, calls: int = 1, factor: float = 2.0) -> None:
        """Refuses scores that are further from float64 than ``factor`` times the loop's; of so many equal calls."""
        exact, looped = self._sums
        for name, score in scores.items():
            if not math.isfinite(float(score.sum())):
                raise AssertionError(f"the scores of {name} must be finite")
            assert_no_worse(score / calls, exact[name], looped[name].to(score.dtype), factor=factor)


def steps_of(
    models: Mapping[str, nn.Module],
    peers: Mapping[str, Callable[[nn.Module], Step]],
    x: Tensor,
    y: Tensor,
    truth: Truth,
) -> dict[str, Callable[[], object]]:
    """For each model a step: its peer's, whose scores are checked here, or forward and backward pass."""
    steps: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        if name in peers:
            step, sums = peers[name](model), zeros(model)
            steps[name] = lambda step=step, sums=sums: step(x, y, sums)
            steps[name]()
            truth.check(sums, factor=4)  # they sum in other orders
        else:
            steps[name] = lambda model=model: loss(model, x, y).backward()
    return steps


def forgetting(models: Mapping[str, nn.Module]) -> Callable[[str], None]:
    """For ``interleaved``: no gradients are left, so that each variant makes its own anew."""

    def forget(_: str) -> None:
        for model in models.values():
            model.zero_grad(set_to_none=True)

    return forget
