"""A model's per-weight vulnerability scores, accumulated while ordinary training code runs."""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from cwfast import ops
from cwfast._parameters import Initial, initial_values, trainable
from cwfast.errors import UnsupportedLayer
from cwfast.layers import rule_for

CRITERIA = {"taylor": 1, "taylor_delta": 1, "grad": 1, "fisher": 2}  # name -> power
GRANULARITIES = ("sample", "batch")
REDUCTIONS = ("sum", "mean", "token_mean")
TILE = 8 << 20  # entries of a float32 row tile of 32 MB
_NESTED = (
    "a backward pass must not run inside another one, whose gradients belong to the same samples; checkpoint "
    "activations with use_reentrant=False"
)


class SaliencyScorer:
    """Scores every weight by ``sum over samples of |g_b * factor|`` while the model is trained or evaluated.

    ``g_b`` is the gradient of sample b's own loss, summed over every use of the weight before the absolute value. The
    factor is the weight ("taylor"), its distance from the initial weight ("taylor_delta") or 1 ("grad"; "fisher" sums
    ``g_b ** 2``), with the weights of that backward pass.

        scorer = SaliencyScorer(model)
        with scorer:
            loss(model(x), y).backward()
            scorer.step()
        scorer.scores()

    No module is wrapped and no forward is replaced: for the duration of ``with``, the parameters' class intercepts the
    calls that take them. Memory: one score buffer per parameter, float32 (float64 for float64 parameters).

    Args:
        model: its parameters that require a gradient are scored, by the names of ``named_parameters``.
        criterion: "taylor", "taylor_delta", "grad" or "fisher".
        granularity: "sample" as above; "batch": ``|g factor|`` with g the ``.grad`` that lies in the parameters at
            ``step()`` (the paper's form; any layer).
        reduction: how the loss is made of the samples' losses l_b, which is undone: "sum"; "mean" over the batch;
            "token_mean" over ``batch(valid_targets=n)`` targets, where l_b is the sum over b's tokens; or a tensor
            c ``[B]`` for ``loss = sum_b c_b l_b`` (c_b = 0 contributes nothing). Only for granularity "sample".
        initial: for "taylor_delta": module, mapping or safetensors file with the initial weights.
        grads: False: no parameter gets a ``.grad``, and no weight gradient is computed.
        grad_scaler: a ``torch.amp.GradScaler`` whose scale the loss carries.
        include, exclude: ``fnmatch`` patterns of parameter names; the others still train.
        backend: see ``cwfast.ops.accumulate_saliency_``.

    Raises:
        TypeError, ValueError: an argument does not hold what is written above.
        UnsupportedLayer: (in the forward or backward pass) a parameter is used by a call that has no rule.

    Source:
        Molchanov et al., CVPR 2019 (|g w|); Fang & Kim, ICLR 2026 (accumulated over the iterations of an unlearning
        loss, per batch).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        criterion: str = "taylor",
        granularity: str = "sample",
        reduction: str | Tensor = "mean",
        initial: Initial | None = None,
        grads: bool = True,
        grad_scaler: torch.amp.GradScaler | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        backend: str = "auto",
    ) -> None:
        if criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {tuple(CRITERIA)}; got {criterion!r}")
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {GRANULARITIES}; got {granularity!r}")
        if not isinstance(reduction, Tensor) and reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS} or a tensor [B]; got {reduction!r}")
        if granularity == "batch" and not grads:
            raise ValueError("granularity 'batch' reads .grad and needs grads=True; got grads=False")
        self._parameters = _chosen(trainable(model), include, exclude)
        if (criterion == "taylor_delta") != (initial is not None):
            raise ValueError(f"initial must be given for criterion 'taylor_delta' and only there; got {criterion!r}")
        self._initial = initial_values(initial, self._parameters) if initial is not None else None
        self._model, self._criterion, self._power = model, criterion, CRITERIA[criterion]
        self._granularity, self._reduction, self._grads = granularity, reduction, grads
        self._grad_scaler, self._backend = grad_scaler, backend
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._scores = {name: _buffer(parameter) for name, parameter in self._parameters.items()}
        self._batch: _Batch | None = None
        self._explicit = False  # the batch was declared by batch(), not read off the model's input
        self._pass = _Pass(-1)
        self._newest_task = -1  # autograd numbers its backward passes
        # Uses whose backward has not run and still may: a graph that is dropped takes its uses along.
        self._outstanding: dict[str, WeakSet[_Use]] = {name: WeakSet() for name in self._parameters}
        self._restore: list[Callable[[], object]] = []
        self._seen = 0  # samples in forward passes since step(), for granularity "batch"
        self.reset()

    # -- the user's side

    def __enter__(self) -> "SaliencyScorer":
        busy = [name for name, parameter in self._parameters.items() if isinstance(parameter, _Tracked)]
        if busy:
            raise RuntimeError(f"a parameter can be scored by one scorer at a time; {busy[0]!r} already is by another")
        # Not the bound method: copy.deepcopy(model) would copy the scorer with it.
        hook = self._model.register_forward_pre_hook(lambda *call: self._see_input(*call), with_kwargs=True)
        self._restore.append(hook.remove)
        if self._granularity == "sample":
            self._restore.append(register_optimizer_step_pre_hook(lambda *_: self._fold()).remove)
            tracked = type("TrackedParameter", (_Tracked,), {"tracker": self})
            for name, parameter in self._parameters.items():
                self._restore.append(parameter.register_hook(lambda _, name=name: self._gradient_arrived(name)).remove)
                self._restore.append(_swap_class(parameter, tracked))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._restore:
            self._restore.pop()()
        if kind is None:
            self._fold()  # outside, weights may change unseen

    @contextmanager
    def batch(
        self, size: int | None = None, *, cu_seqlens: Tensor | None = None, valid_targets: int | None = None
    ) -> Iterator[None]:
        """Declare the samples of the forward passes inside: where the model's first input does not tell, where several
        forward passes belong to the same samples, or for what a loss divides by.

        Args:
            size: how many samples; None: the first dimension of the model's first tensor input.
            cu_seqlens: ``[B + 1]`` row offsets of samples that are packed into one sequence; instead of size.
            valid_targets: what a "token_mean" loss divided by.
        """
        if size is not None and cu_seqlens is not None:
            raise ValueError("size or cu_seqlens must be given, not both")
        if cu_seqlens is not None:
            size = len(cu_seqlens) - 1
        before = self._batch, self._explicit
        self._batch, self._explicit = _Batch(size, cu_seqlens, valid_targets), True
        try:
            yield
        finally:
            self._batch, self._explicit = before

    def step(self) -> None:
        """Close an iteration: granularity "batch" adds ``|.grad * factor|``; "sample" has nothing left to do."""
        if self._granularity == "batch":
            scale = self._unscale()
            for name, parameter in self._parameters.items():
                if parameter.grad is not None:
                    _add_tiled(self._scores[name], parameter.grad, self._factor(name), scale, self._power)
            self.samples += self._seen
            self._seen = 0

    def scores(self) -> dict[str, Tensor]:
        """``{name: scores}``, shaped as the parameters. They are the buffers themselves: later batches add to them."""
        self._fold()
        return dict(self._scores)

    def reset(self) -> None:
        """Forget everything accumulated."""
        for buffer in self._scores.values():
            buffer.zero_()
        self.samples = 0  # scored so far
        self._seen = 0
        self._eager = False
        self._versions: dict[str, int] = {}  # of the weights behind sums that are not yet multiplied by the factor

    # -- what layer rules see (cwfast.layers.Tracker)

    def use(self, parameter: Tensor | None) -> "_Use | None":
        name = self._names.get(id(parameter)) if parameter is not None else None
        if name is None:
            return None
        if self._batch is None or self._batch.size is None:
            raise ValueError(
                f"the number of samples must be known when {name!r} is used: call the model itself with a tensor whose "
                "first dimension is the batch, or declare it by scorer.batch(size=...)"
            )
        use = _Use(name, self._batch)
        self._outstanding[name].add(use)
        return use

    def record(self, use: "_Use", inputs: Tensor, grad_outputs: Tensor) -> Tensor | None:
        if not self._restore:
            raise RuntimeError("backward must run inside `with scorer:`, as its forward did")
        current = self._current_pass()
        unit = current.units.setdefault((use.name, id(use.batch)), _Unit(use.batch))
        if unit.closed:
            raise RuntimeError(
                f"the gradient of {use.name!r} was already scored in this backward pass, and another use arrived: the "
                "graph of an earlier backward (retain_graph) may not be mixed with a new one"
            )
        dtype = torch.promote_types(inputs.dtype, grad_outputs.dtype)
        piece = tuple(use.batch.by_sample(x.to(dtype), use.name) for x in (inputs, grad_outputs))
        unit.pieces.append(piece)
        current.names.add(use.name)
        outstanding = self._outstanding[use.name]
        first_time = use in outstanding  # else the graph was retained, and its other uses come again too
        outstanding.discard(use)
        parameter = self._parameters[use.name]
        # Where no other use can follow, the unit closes now: nothing is kept.
        closes = first_time and not outstanding and len(unit.pieces) == 1 and not isinstance(self._reduction, Tensor)
        grad = None
        if self._grads:
            a, d = (x.flatten(0, -2).to(_sum_dtype(dtype)) for x in piece)
            grad = d.new_zeros((d.shape[1], a.shape[1])) if closes else d.T @ a
        if closes:
            self._close(use.name, unit, grad)  # the same pass over the rows gives the gradient as well
        return None if grad is None else grad.reshape(parameter.shape).to(parameter.dtype)

    # -- inside

    def _see_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._model:  # a copy of it
            return
        if self._explicit and self._batch is not None and self._batch.size is not None:
            size = None
        else:
            first = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim > 0), None)
            size = None if first is None else len(first)
        if self._explicit and self._batch is not None:
            self._batch.size = self._batch.size if size is None else size
        else:
            self._batch = _Batch(size, None, None)
        if torch.is_grad_enabled() and self._batch.size is not None:
            self._seen += self._batch.size

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a torch function that takes a tracked parameter: by its rule, or as it is if no gradient can follow."""
        with torch._C.DisableTorchFunctionSubclass():
            rule = rule_for(function)
            if rule is not None and torch.is_grad_enabled():
                return rule(self, *args, **kwargs)
            result = function(*args, **kwargs)
            graph = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.grad_fn is not None]
        if graph and torch.is_grad_enabled():
            used = [self._names[id(x)] for x in tree_leaves((args, kwargs)) if id(x) in self._names]
            raise _unsupported(used, f"{getattr(function, '__qualname__', function)}")
        return result

    def _current_pass(self) -> "_Pass":
        task = torch._C._current_graph_task_id()
        if self._pass.task != task:  # also drops what a backward that raised left behind
            if task < self._newest_task:
                raise RuntimeError(_NESTED)
            self._pass, self._newest_task = _Pass(task), task
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: self._end_of_backward(task))
        return self._pass

    def _end_of_backward(self, task: int) -> None:
        if self._pass.task != task:
            raise RuntimeError(_NESTED)
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            for (name, _), unit in self._pass.units.items():
                if not unit.closed:
                    self._close(name, unit, None)
        self._pass = _Pass(-1)

    def _gradient_arrived(self, name: str) -> None:
        if self._pass.task != torch._C._current_graph_task_id() or name not in self._pass.names:
            raise _unsupported([name], "a call that was not seen")

    def _close(self, name: str, unit: "_Unit", grad: Tensor | None) -> None:
        """Add a finished unit: the same samples' pieces follow one another along T, so their gradients sum."""
        unit.closed = True
        batch, pieces = unit.batch, unit.pieces
        inputs, grad_outputs, offsets = batch.join(pieces)
        unit.pieces = []
        scale = self._unscale()
        if isinstance(self._reduction, Tensor):
            grad_outputs = grad_outputs * batch.per_row(self._reduction, grad_outputs, offsets)
        elif self._reduction == "mean":
            scale *= batch.samples
        elif self._reduction == "token_mean":
            if batch.valid_targets is None:
                raise ValueError(
                    "reduction 'token_mean' must be told the loss's divisor: scorer.batch(valid_targets=...)"
                )
            scale *= batch.valid_targets
        if not batch.counted:
            self.samples += batch.samples
            batch.counted = True
        out = self._scores[name].view(grad_outputs.shape[-1], inputs.shape[-1])
        if out.dtype != torch.float64:  # float64 products of a float32 weight are not worth a second buffer
            inputs, grad_outputs = (x.float() if x.dtype == torch.float64 else x for x in (inputs, grad_outputs))
        elif inputs.dtype != torch.float64:
            inputs, grad_outputs = inputs.double(), grad_outputs.double()
        factor = self._deferred_factor(name)
        ops.accumulate_saliency_(
            out,
            inputs,
            grad_outputs,
            power=self._power,
            factor=None if factor is None else factor.view(out.shape),
            cu_seqlens=offsets,
            grad=None if grad is None else grad.view(out.shape),
            scale=scale,
            backend=self._backend,
        )

    def _unscale(self) -> float:
        return 1.0 if self._grad_scaler is None else 1.0 / float(self._grad_scaler.get_scale())

    def _factor(self, name: str) -> Tensor | None:
        if self._criterion == "taylor":
            return self._parameters[name].detach()
        if self._initial is not None:
            weight = self._parameters[name].detach()
            return weight - self._initial[name].to(weight)
        return None

    def _deferred_factor(self, name: str) -> Tensor | None:
        """None as long as the weight has not moved: the sums are multiplied once, by _fold."""
        if self._criterion in ("grad", "fisher"):
            return None
        if self._eager:
            return self._factor(name)
        version = self._parameters[name]._version
        if self._versions.setdefault(name, version) != version:
            raise RuntimeError(
                f"the weight {name!r} was changed in place after a backward pass whose scores need it; change weights "
                "by a torch optimizer's step(), or call scorer.scores() before changing them"
            )
        return None

    def _fold(self) -> None:
        """Multiply the sums so far by the factor; from then on every unit carries its own."""
        if self._granularity == "batch" or self._criterion in ("grad", "fisher"):
            return
        for name in self._versions:
            self._deferred_factor(name)  # refuses a weight that has moved
            factor = self._factor(name)
            assert factor is not None
            _multiply_tiled(self._scores[name], factor)
        if self._versions:
            self._versions, self._eager = {}, True


class _Tracked(nn.Parameter):
    """The class of a parameter while it is scored: every torch function that takes it goes through the scorer."""

    tracker: SaliencyScorer

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.tracker.call(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        copied = nn.Parameter(self.detach().clone(), self.requires_grad)  # a copy is not scored
        memo[id(self)] = copied
        return copied


class _Batch:
    """The samples of one or several forward passes."""

    def __init__(self, size: int | None, cu_seqlens: Tensor | None, valid_targets: int | None) -> None:
        self.size, self.cu_seqlens, self.valid_targets = size, cu_seqlens, valid_targets
        self.counted = False

    @property
    def samples(self) -> int:
        assert self.size is not None  # SaliencyScorer.use has checked
        return self.size

    def by_sample(self, x: Tensor, name: str) -> Tensor:
        """``[B, T, F]`` (``[B, F]`` for one row a sample; ``[tokens, F]`` for packed samples)."""
        if self.cu_seqlens is not None:
            rows = x.flatten(0, -2)
            if len(rows) != int(self.cu_seqlens[-1]):
                raise ValueError(
                    f"the rows of the layer of {name!r} must be the {int(self.cu_seqlens[-1])} of cu_seqlens; "
                    f"got an input of shape {tuple(x.shape)}"
                )
            return rows
        if x.ndim == 2 and len(x) == self.samples:
            return x
        if x.ndim > 2 and len(x) == self.samples:
            return x.flatten(1, -2)
        if x.ndim == 2 and self.samples and len(x) % self.samples == 0:
            return x.unflatten(0, (self.samples, -1))
        raise ValueError(
            f"the leading dimension at the layer of {name!r} must be the {self.samples} samples, or a multiple of it "
            f"in a 2-D input; got shape {tuple(x.shape)}. Declare the samples by scorer.batch(size=...)"
        )

    def join(self, pieces: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor | None]:
        """One (inputs, grad_outputs, row offsets or None) whose rows are those of all pieces, sample by sample."""
        if len(pieces) == 1:
            return pieces[0][0], pieces[0][1], self.cu_seqlens
        if self.cu_seqlens is None:
            inputs, grads = (
                torch.cat([p[i] if p[i].ndim == 3 else p[i][:, None] for p in pieces], dim=1) for i in (0, 1)
            )
            return inputs, grads, None
        lengths = self.cu_seqlens.diff()
        owner = torch.repeat_interleave(torch.arange(self.samples, device=lengths.device), lengths).repeat(len(pieces))
        order = owner.argsort(stable=True).to(pieces[0][0].device)
        inputs, grads = (torch.cat([p[i] for p in pieces])[order] for i in (0, 1))
        return inputs, grads, self.cu_seqlens * len(pieces)

    def per_row(self, coefficients: Tensor, rows: Tensor, offsets: Tensor | None) -> Tensor:
        """``1 / c_b`` (0 for c_b = 0) shaped to multiply ``rows``."""
        if coefficients.shape != (self.samples,):
            raise ValueError(
                f"a tensor reduction must have shape ({self.samples},), one coefficient per sample; "
                f"got {tuple(coefficients.shape)}"
            )
        c = coefficients.detach().to(rows)
        inverse = torch.where(c == 0, torch.zeros_like(c), 1 / torch.where(c == 0, torch.ones_like(c), c))
        if offsets is not None:
            return torch.repeat_interleave(inverse, offsets.diff().to(rows.device))[:, None]
        return inverse.view(-1, *[1] * (rows.ndim - 1))


class _Use:
    """One use of a parameter in a forward pass."""

    __slots__ = ("__weakref__", "batch", "name")

    def __init__(self, name: str, batch: _Batch) -> None:
        self.name, self.batch = name, batch


class _Unit:
    """What is summed before the absolute value: one parameter, one set of samples, one backward pass."""

    __slots__ = ("batch", "closed", "pieces")

    def __init__(self, batch: _Batch) -> None:
        self.batch, self.closed = batch, False
        self.pieces: list[tuple[Tensor, ...]] = []


class _Pass:
    """One backward pass."""

    __slots__ = ("names", "task", "units")

    def __init__(self, task: int) -> None:
        self.task = task
        self.units: dict[tuple[str, int], _Unit] = {}
        self.names: set[str] = set()


def _chosen(
    parameters: dict[str, nn.Parameter], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, nn.Parameter]:
    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    chosen = {
        name: parameter
        for name, parameter in parameters.items()
        if (include is None or matches(name, include)) and not (exclude and matches(name, exclude))
    }
    if not chosen:
        raise ValueError(
            f"the model must have a parameter to score; got {len(parameters)} that require a gradient, "
            f"include={include}, exclude={exclude}"
        )
    return chosen


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _buffer(parameter: nn.Parameter) -> Tensor:
    return torch.zeros(parameter.shape, dtype=_sum_dtype(parameter.dtype), device=parameter.device)


def _swap_class(parameter: nn.Parameter, tracked: type) -> Callable[[], object]:
    original = type(parameter)
    parameter.__class__ = tracked

    def restore() -> None:
        parameter.__class__ = original

    return restore


def _unsupported(names: Sequence[str], call: str) -> UnsupportedLayer:
    return UnsupportedLayer(
        f"parameter {', '.join(map(repr, names))} is used by {call}, which no layer rule scores per sample; "
        "exclude it (exclude=[...]) or score by granularity='batch'"
    )


def _tiles(*tensors: Tensor | None) -> Iterator[list[Tensor | None]]:
    """The same tensors, by flat pieces of at most TILE entries."""
    flat = [None if x is None else x.reshape(-1) for x in tensors]
    assert flat[0] is not None
    for start in range(0, len(flat[0]), TILE):
        yield [None if x is None else x[start : start + TILE] for x in flat]


def _multiply_tiled(score: Tensor, factor: Tensor) -> None:
    for out, weight in _tiles(score, factor):
        out.mul_(weight.abs())  # type: ignore[union-attr]


def _add_tiled(score: Tensor, grad: Tensor, factor: Tensor | None, scale: float, power: int) -> None:
    for out, gradient, weight in _tiles(score, grad.detach(), factor):
        value = gradient.to(out.dtype) if weight is None else gradient.to(out.dtype) * weight  # type: ignore[union-attr]
        out.add_(value.abs() if power == 1 else value.square(), alpha=scale**power)  # type: ignore[union-attr]
