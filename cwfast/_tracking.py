"""How a scorer sees every use of its parameters, and what it keeps of a backward pass."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from cwfast._scopes import check_patterns, first_match
from cwfast.errors import UnsupportedLayer
from cwfast.layers.pieces import Piece
from cwfast.layers.places import Place
from cwfast.layers.samples import Batch, Layout

if TYPE_CHECKING:
    from cwfast.scoring import SaliencyScorer

TILE = 8 << 20  # entries of a float32 row tile of 32 MB

NESTED = (
    "a backward pass must not run inside another one, whose gradients belong to the same samples; checkpoint "
    "activations with use_reentrant=False"
)


class Tracked(nn.Parameter):
    """The class of a parameter while it is scored: every torch function that takes it goes through the scorer."""

    tracker: "SaliencyScorer"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.tracker.call(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        copied = nn.Parameter(self.detach().clone(), self.requires_grad)  # a copy is not scored
        memo[id(self)] = copied
        return copied


class TrackedView(Tensor):
    """The class of a view of a tracked parameter (``w.t()``, ``w[e]``), or of its value in another dtype."""

    tracker: "SaliencyScorer"
    source: "Source"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.tracker.call(func, args, kwargs or {})


class Source(NamedTuple):
    """Which entries of which parameter a tensor stands for."""

    name: str
    place: Place

    def view(self, base: Tensor, view: Tensor) -> "Source | None":
        """What a view of the tensor ``base`` that stands for this stands for; None where entries repeat."""
        if any(stride == 0 and size > 1 for stride, size in zip(view.stride(), view.shape, strict=True)):
            return None
        offset = self.place.offset + int(view.storage_offset()) - int(base.storage_offset())
        return Source(self.name, Place(view.shape, view.stride(), offset))


class Use:
    """One use of a parameter in a forward pass; ``open`` while the batch counts it as one whose backward may come."""

    __slots__ = ("layout", "open", "source")

    def __init__(self, source: Source, layout: Layout) -> None:
        self.source, self.layout, self.open = source, layout, False

    @property
    def name(self) -> str:
        return self.source.name


class Unit:
    """What is summed before the absolute value: one parameter, one set of samples, one backward pass."""

    __slots__ = ("batch", "closed", "pieces")

    def __init__(self, batch: Batch) -> None:
        self.batch, self.closed = batch, False
        self.pieces: list[tuple[Place, Piece]] = []


class Pass:
    """One backward pass."""

    __slots__ = ("names", "square_norms", "task", "units")

    def __init__(self, task: int) -> None:
        self.task = task
        self.units: dict[tuple[str, int], Unit] = {}
        self.names: set[str] = set()
        self.square_norms: dict[int, Tensor] = {}  # [B] by id of the batch, which the units keep alive


def chosen(
    parameters: dict[str, nn.Parameter], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, nn.Parameter]:
    check_patterns(include=include, exclude=exclude)
    chosen = {
        name: parameter
        for name, parameter in parameters.items()
        if (include is None or first_match(name, include) is not None) and first_match(name, exclude or ()) is None
    }
    if not chosen:
        raise ValueError(
            f"the model must have a parameter to score; got {len(parameters)} that require a gradient, "
            f"include={include}, exclude={exclude}"
        )
    return chosen


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def buffer(parameter: Tensor) -> Tensor:
    return torch.zeros(parameter.shape, dtype=sum_dtype(parameter.dtype), device=parameter.device)


def swap_class(parameter: Tensor, tracked: type) -> Callable[[], object]:
    original = type(parameter)
    parameter.__class__ = tracked

    def restore() -> None:
        parameter.__class__ = original

    return restore


def dtensor_class(tracked: type, own: type, name: str) -> type:
    """The class of a DTensor while it is scored. What it is asked for through methods that are no torch functions would
    go unseen.
    """

    def refusing(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(parameter: Tensor, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                raise unsupported([name], method.__qualname__)
            return method(parameter, *args, **kwargs)

        return call

    methods = {method: refusing(getattr(own, method)) for method in ("to_local", "full_tensor", "redistribute")}
    return type("TrackedDTensor", (tracked, own), methods)


def unsupported(names: Sequence[str], call: str) -> UnsupportedLayer:
    return UnsupportedLayer(
        f"parameter {', '.join(map(repr, names))} is used by {call}, which no layer rule scores per sample; "
        "exclude it (exclude=[...]), score by granularity='batch', or one sample at a time by fallback='loop'"
    )


def tiles(*tensors: Tensor | None) -> Iterator[list[Tensor | None]]:
    """The same tensors, by flat pieces of at most TILE entries."""
    flat = [None if x is None else x.reshape(-1) for x in tensors]
    assert flat[0] is not None
    for start in range(0, len(flat[0]), TILE):
        yield [None if x is None else x[start : start + TILE] for x in flat]


def multiply_tiled(score: Tensor, factor: Tensor) -> None:
    for out, weight in tiles(score, factor):
        out.mul_(weight.abs())  # type: ignore[union-attr]


def add_tiled(score: Tensor, grad: Tensor, factor: Tensor | None, scale: float, power: int) -> None:
    for out, gradient, weight in tiles(score, grad.detach(), factor):
        value = gradient.to(out.dtype) if weight is None else gradient.to(out.dtype) * weight  # type: ignore[union-attr]
        out.add_(value.abs() if power == 1 else value.square(), alpha=scale**power)  # type: ignore[union-attr]
