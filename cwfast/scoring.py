"""A model's per-weight vulnerability scores, accumulated while ordinary training code runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from cwfast._parameters import Initial, initial_values, trainable
from cwfast._shards import fsdp_modules, is_sharded, local, local_gradient, reshard, summed, versions, whole_like
from cwfast._stand_ins import StandIns
from cwfast._tracking import (
    NESTED,
    Pass,
    Source,
    Tracked,
    TrackedView,
    Unit,
    Use,
    add_tiled,
    buffer,
    chosen,
    dtensor_class,
    multiply_tiled,
    swap_class,
    unsupported,
)
from cwfast.errors import UnsupportedLayer
from cwfast.layers import rule_for
from cwfast.layers.loop import Looped, LoopedPiece
from cwfast.layers.pieces import Piece
from cwfast.layers.places import Place, merged
from cwfast.layers.samples import Batch, Layout

CRITERIA = {"taylor": 1, "taylor_delta": 1, "grad": 1, "fisher": 2}  # name -> power
GRANULARITIES = ("sample", "batch")
REDUCTIONS = ("sum", "mean", "token_mean")
BUSY = "a parameter can be scored by one scorer at a time; {!r} already is by another"


class SaliencyScorer:
    """Scores every weight by ``sum over samples of |g_b * factor|`` while the model is trained or evaluated.

    ``g_b`` is the gradient of sample b's own loss, summed over every use of the weight before the absolute value. The
    factor is the weight ("taylor"), its distance from the initial weight ("taylor_delta") or 1 ("grad"; "fisher" sums
    ``g_b ** 2``), with the weights of that backward pass::

        scorer = SaliencyScorer(model)
        with scorer:
            loss(model(x), y).backward()
            scorer.step()
        scorer.scores()

    No module is wrapped and no forward is replaced: for the duration of ``with``, the parameters' class intercepts the
    calls that take them. Memory: one score buffer per parameter, float32 (float64 for float64 parameters).

    Of parameters that FSDP2 shards, each rank has the scores of its own rows, summed over the samples of all ranks;
    beside them, in backward, the scores of one whole parameter at a time. Of linear layers that tensor parallelism
    splits, each rank has the scores of its part. All ranks must make the same calls.

    Args:
        model: its parameters that require a gradient are scored, by the names of ``named_parameters``.
        criterion: "taylor", "taylor_delta", "grad" or "fisher".
        granularity: "sample" as above; "batch": ``|g factor|`` with g the ``.grad`` that lies in the parameters at
            ``step()`` (the paper's form; any layer).
        reduction: how the loss is made of the samples' losses l_b, which is undone: "sum"; "mean" over the batch;
            "token_mean" over ``batch(valid_targets=n)`` targets, where l_b is the sum over b's tokens; or a tensor
            c ``[B]`` for ``loss = sum_b c_b l_b`` (c_b = 0 contributes nothing). Only for granularity "sample".
        initial: for "taylor_delta": module, mapping or safetensors file with the initial weights.
        grads: False: no parameter gets a ``.grad``, and no weight gradient is computed (but by the fallback, which
            checks the samples' gradients by it and does not keep it).
        grad_scaler: a ``torch.amp.GradScaler`` whose scale the loss carries.
        include, exclude: ``fnmatch`` patterns of parameter names; the others still train.
        backend: see ``cwfast.ops.accumulate_saliency_``.
        fallback: "loop": a call that no layer rule scores is run again one sample at a time, in backward, and its
            parameters are scored so. It must take the samples in the first dimension of its tensors (recurrent layers:
            in theirs) and have for one sample the result that it has in the batch; the samples' gradients must sum to
            the batch's. All samples share the model's own buffers and parameters.
        norms: also measure the norm of each sample's gradient: ``scorer.norms()``. Not of split layers.

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
        fallback: str | None = None,
        norms: bool = False,
    ) -> None:
        if criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {tuple(CRITERIA)}; got {criterion!r}")
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {GRANULARITIES}; got {granularity!r}")
        if not isinstance(reduction, Tensor) and reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS} or a tensor [B]; got {reduction!r}")
        if fallback not in (None, "loop"):
            raise ValueError(f"fallback must be None or 'loop'; got {fallback!r}")
        if granularity == "batch" and not grads:
            raise ValueError("granularity 'batch' reads .grad and needs grads=True; got grads=False")
        reshard(model)
        self._parameters = chosen(trainable(model), include, exclude)
        if (criterion == "taylor_delta") != (initial is not None):
            raise ValueError(f"initial must be given for criterion 'taylor_delta' and only there; got {criterion!r}")
        self._initial = initial_values(initial, self._parameters) if initial is not None else None
        self._model, self._criterion, self._power = model, criterion, CRITERIA[criterion]
        self._granularity, self._reduction, self._grads = granularity, reduction, grads
        self._grad_scaler, self._backend, self._want_norms = grad_scaler, backend, norms
        self._fallback = fallback
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._scores = {name: buffer(local(parameter)) for name, parameter in self._parameters.items()}
        self.batch_now = Batch(None, None, None)  # of the current forward pass
        self.wants_gradients = grads
        self._shared: dict[StorageWeakRef, str] = {}  # the model's own memory, and whose it is
        self.dim = 0  # that holds the samples, see cwfast.layers.Tracker
        self._explicit = False  # the batch was declared by batch(), not read off the model's input
        self._pass = Pass(-1)
        self._newest_task = -1  # autograd numbers its backward passes
        self._restore: list[Callable[[], object]] = []
        self._dtensors = {name: parameter for name, parameter in self._parameters.items() if is_sharded(parameter)}
        by_fsdp = {id(parameter) for module in fsdp_modules(model) for parameter in module.parameters()}
        self._sharded = {name: parameter for name, parameter in self._dtensors.items() if id(parameter) in by_fsdp}
        self._split = len(self._dtensors) > len(self._sharded)  # some by tensor parallelism, which gathers nothing
        if self._split and norms:
            raise ValueError("norms must be False where parameters are split (tensor parallelism): no rank has all")
        self._whole: dict[str, Tensor] = {}  # what stands for a sharded one in its module's forward
        self._seen = 0  # samples in forward passes since step(), for granularity "batch"
        self.reset()

    # -- the user's side

    def __enter__(self) -> "SaliencyScorer":
        busy = [name for name, parameter in self._parameters.items() if isinstance(parameter, Tracked)]
        if busy:
            raise RuntimeError(BUSY.format(busy[0]))
        stand_ins = None
        if self._sharded and self._granularity == "sample":
            reshard(self._model)
            stand_ins = StandIns(self._model, self._sharded, self._stands_for)
            self._whole = stand_ins.adopted
        owners = [*self._model.named_parameters(), *self._model.named_buffers()]
        self._shared = {
            StorageWeakRef(local(x).untyped_storage()): name for name, x in owners if x.layout is torch.strided
        }
        # Not the bound method: copy.deepcopy(model) would copy the scorer with it.
        hook = self._model.register_forward_pre_hook(lambda *call: self._see_input(*call), with_kwargs=True)
        self._restore.append(hook.remove)
        if self._granularity == "sample":
            self._restore.append(register_optimizer_step_pre_hook(lambda *_: self._fold()).remove)
            self._tracked = type("TrackedParameter", (Tracked,), {"tracker": self})
            self._view_class = type("TrackedParameterView", (TrackedView,), {"tracker": self})
            for name, parameter in self._parameters.items():
                if name not in self._sharded:
                    self._track(name, parameter)
            if stand_ins is not None:
                self._restore += stand_ins.watch()
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
        before = self.batch_now, self._explicit
        self.batch_now, self._explicit = Batch(size, cu_seqlens, valid_targets), True
        try:
            yield
        finally:
            self.batch_now, self._explicit = before

    def step(self) -> None:
        """Close an iteration: granularity "batch" adds ``|.grad * factor|``; "sample" has nothing left to do."""
        if self._granularity == "batch":
            scale = self._unscale()
            for name, parameter in self._parameters.items():
                if parameter.grad is not None:
                    gradient = local_gradient(parameter)
                    add_tiled(self._scores[name], gradient, self._factor(name), scale, self._power)
            self.samples += self._seen
            self._seen = 0

    def scores(self) -> dict[str, Tensor]:
        """``{name: scores}``, shaped as the parameters. They are the buffers themselves: later batches add to them.

        Of parameters that FSDP2 shards, DTensors sharded likewise: sums over the samples of all ranks. Of others, sums
        over this rank's samples, in DTensors too where tensor parallelism splits them. If other ranks have samples of
        their own (DDP, data beside tensor parallelism), ``cwfast.distributed.sum_scores`` adds them up.

        Raises:
            RuntimeError: a weight changed unseen, or granularity "batch" saw samples but no ``step()``.
        """
        if self._granularity == "batch" and self._seen and not self.samples:
            raise RuntimeError("granularity 'batch' adds at scorer.step(), after each backward pass; it was not called")
        self._fold()
        return {n: whole_like(s, self._dtensors[n]) if n in self._dtensors else s for n, s in self._scores.items()}

    def reset(self) -> None:
        """Forget everything accumulated."""
        for score in self._scores.values():
            score.zero_()
        self.samples = 0  # scored so far
        self._square_norms: list[Tensor] = []
        self._seen = 0
        self._eager = False
        self._versions: dict[
            str, tuple[int, ...]
        ] = {}  # of the weights behind sums that are not yet multiplied by the factor

    def norms(self) -> Tensor:
        """``[samples]`` float32 (float64): the norm of each sample's own gradient over all scored parameters, in the
        order of the backward passes; for ``norms=True``.
        """
        if not self._want_norms:
            raise RuntimeError("norms() needs SaliencyScorer(..., norms=True)")
        return torch.cat([squares.sqrt() for squares in self._square_norms]) if self._square_norms else torch.empty(0)

    # -- what layer rules see (cwfast.layers.Tracker)

    def tracks(self, value: object) -> bool:
        return isinstance(value, Tensor) and self._source(value) is not None

    def name_of(self, parameter: Tensor) -> str:
        source = self._source(parameter)
        assert source is not None  # rules ask tracks() first
        return source.name

    def shared(self, x: Tensor, dim: int = 0) -> str | None:
        size = self.batch_now.size
        if size == 1 or x.layout is not torch.strided:
            return None
        if dim < x.ndim and x.stride(dim) == 0 and x.shape[dim] == size:
            return None
        return self._shared.get(StorageWeakRef((local(x) if is_sharded(x) else x).untyped_storage()))

    def use(self, parameter: Tensor | None, owner: Tensor | None = None) -> Use | None:
        source = self._source(parameter) if parameter is not None else None
        if source is None:
            return None
        if self.batch_now.size is None:
            raise ValueError(
                f"the number of samples must be known when {source.name!r} is used: call the model itself with a "
                "tensor whose first dimension is the batch, or declare it by scorer.batch(size=...)"
            )
        use = Use(source, Layout(self.batch_now, source.name, owner, self.dim))
        if torch._C._current_graph_task_id() < 0:  # in backward, checkpointing repeats a use that is open already
            use.open = True
            self.batch_now.open[source.name] += 1
        return use

    def alias(self, result: Tensor, parameter: Tensor) -> Tensor:
        source = self._source(parameter)
        assert source is not None  # rules ask tracks() first
        if not (parameter.is_contiguous() and result.is_contiguous()):
            return result  # its next use is refused
        return self._mark(result, source)

    def record(self, use: Use, piece: Piece) -> Tensor | None:
        if not self._restore:
            raise RuntimeError("backward must run inside `with scorer:`, as its forward did")
        current = self._current_pass()
        unit = current.units.setdefault((use.name, id(use.layout.batch)), Unit(use.layout.batch))
        if unit.closed:
            raise RuntimeError(
                f"the gradient of {use.name!r} was already scored in this backward pass, and another use arrived: the "
                "graph of an earlier backward (retain_graph) may not be mixed with a new one"
            )
        place = use.source.place
        unit.pieces.append((place, piece))
        current.names.add(use.name)
        first_time = use.open  # else the graph was retained, and its other uses come again too
        use.open = False
        unit.batch.open[use.name] -= first_time
        # Where no other use can follow, the unit closes now: nothing is kept. Known by counting calls, not by which
        # graphs are still alive: all ranks must find the same, as a sharded one is summed over them on closing.
        last = first_time and not unit.batch.open[use.name]
        closes = last and len(unit.pieces) == 1 and not isinstance(self._reduction, Tensor)
        if use.name in self._sharded and not closes and isinstance(piece, LoopedPiece):
            raise UnsupportedLayer(
                "fallback='loop' scores a parameter that FSDP2 shards where it is used once in a backward pass, and "
                f"the reduction is no tensor; {use.name!r} must be known whole at once"
            )
        grad = None
        if self._grads:
            device = self._whole.get(use.name, self._scores[use.name]).device
            out = place.of(self._sums(use.name, "meta") if use.name in self._sharded else self._scores[use.name])
            grad = torch.empty_like(out, device=device) if closes else piece.total(out.shape, out.dtype, device)
        if closes:
            self._close(use.name, unit, grad)  # the same pass over the rows gives the gradient as well
        return grad

    # -- inside

    def _track(self, name: str, parameter: Tensor) -> None:
        self._restore.append(parameter.register_hook(lambda _: self._gradient_arrived(name)).remove)
        own, tracked = type(parameter), self._tracked
        self._restore.append(
            swap_class(parameter, dtensor_class(tracked, own, name) if is_sharded(parameter) else tracked)
        )

    def _stands_for(self, name: str, whole: Tensor) -> None:
        """Track what FSDP2 puts in the place of a sharded parameter."""
        if isinstance(whole, Tracked):
            raise RuntimeError(BUSY.format(name))
        self._names[id(whole)] = name
        self._restore.append(lambda: self._names.pop(id(whole)))  # and so it stays alive, and its id its own
        self._shared[StorageWeakRef(whole.untyped_storage())] = name
        self._track(name, whole)

    def _see_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._model:  # a copy of it
            return
        first = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim > 0), None)
        if not self._explicit:
            self.batch_now = Batch(None, None, None)
        if self.batch_now.size is None and first is not None:
            self.batch_now.size = len(first)
        self.batch_now.length = first.shape[1] if first is not None and first.ndim > 1 else None
        if torch.is_grad_enabled() and self.batch_now.size is not None:
            self._seen += self.batch_now.size

    @torch._disable_dynamo  # in a compiled model, it runs between the compiled parts
    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a torch function that takes a tracked parameter: by its rule, or as it is if no gradient can follow."""
        with torch._C.DisableTorchFunctionSubclass():
            scoring = bool(self._restore) and torch.is_grad_enabled()
            split = self._split and any(map(is_sharded, tree_leaves((args, kwargs))))
            rule = rule_for(function, split) if scoring else None
            if rule is not None:
                result = rule(self, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            loops = scoring and self._fallback == "loop" and not split
            loop = Looped(self, function, args, kwargs) if loops else None
            result = function(*args, **kwargs)
            graph = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.grad_fn is not None]
            followed = [self._follow(x) for x in graph] if scoring else []  # each of them: no short cut
            if not all(followed):
                sources = [self._source(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
                used = sorted({source.name for source in sources if source is not None})
                if loop is None:
                    raise unsupported(used, f"{getattr(function, '__qualname__', function)}")
                return loop.apply(result, used)
        return result

    def _source(self, tensor: Tensor) -> Source | None:
        """What a tensor stands for: a tracked parameter, or some of its entries."""
        name = self._names.get(id(tensor))
        if name is not None:
            return Source(name, Place.whole(self._scores[name].shape if is_sharded(tensor) else tensor.shape))
        return tensor.source if isinstance(tensor, TrackedView) and tensor.tracker is self else None

    def _follow(self, result: Tensor) -> bool:
        """Track the result of a call without a rule, if it is a view of what is tracked."""
        if isinstance(result, TrackedView):
            return True
        base = result._base if result._is_view() else None
        source = self._source(base) if base is not None else None
        if base is None or source is None or is_sharded(base) or result.dtype != base.dtype or not base.is_contiguous():
            return False
        found = source.view(base, result)
        if found is not None:
            self._mark(result, found)
        return found is not None

    def _mark(self, tensor: Tensor, source: Source) -> Tensor:
        tensor.__class__ = self._view_class
        tensor.source = source  # type: ignore[attr-defined]
        return tensor

    def _current_pass(self) -> "Pass":
        task = torch._C._current_graph_task_id()
        if self._pass.task != task:  # also drops what a backward that raised left behind
            if task < self._newest_task:
                raise RuntimeError(NESTED)
            self._pass, self._newest_task = Pass(task), task
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: self._end_of_backward(task))
        return self._pass

    def _end_of_backward(self, task: int) -> None:
        if self._pass.task != task:
            raise RuntimeError(NESTED)
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            for (name, _), unit in self._pass.units.items():
                if not unit.closed:
                    self._close(name, unit, None)
        self._square_norms += self._pass.square_norms.values()
        self._pass = Pass(-1)

    def _gradient_arrived(self, name: str) -> None:
        if self._pass.task != torch._C._current_graph_task_id() or name not in self._pass.names:
            raise unsupported([name], "a call that was not seen")

    def _close(self, name: str, unit: "Unit", grad: Tensor | None) -> None:
        """Add a finished unit: pieces of the same samples sum before the absolute value."""
        unit.closed = True
        batch, placed = unit.batch, unit.pieces
        unit.pieces = []
        scale = self._unscale()
        if isinstance(self._reduction, Tensor):
            inverse = batch.inverse(self._reduction)
            placed = [(place, piece.scaled(inverse)) for place, piece in placed]
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
        score, factor = self._scores[name], self._deferred_factor(name)
        if name in self._sharded:  # every rank adds to a whole of its own; the sum of these goes where it belongs
            sums = self._sums(name, self._whole[name].device).zero_()
            self._accumulate(batch, placed, sums, None, scale, grad)
            score.add_(summed(sums, self._sharded[name]).to(score) * (1 if factor is None else factor.abs()))
        else:
            self._accumulate(batch, placed, score, None if factor is None else factor.contiguous(), scale, grad)

    def _accumulate(
        self,
        batch: Batch,
        placed: list[tuple[Place, Piece]],
        sums: Tensor,
        factor: Tensor | None,
        scale: float,
        grad: Tensor | None,
    ) -> None:
        for place, piece in merged(placed):
            out, f = (x if place is None or x is None else place.of(x) for x in (sums, factor))
            assert out is not None
            piece.accumulate_(out, self._power, f, scale, grad, self._backend)
            if self._want_norms:
                squares = piece.square_norms(out.shape, out.dtype, out.device) * scale**2
                norms = self._pass.square_norms
                norms[id(batch)] = norms[id(batch)] + squares if id(batch) in norms else squares

    def _sums(self, name: str, device: torch.device | str) -> Tensor:
        return torch.empty(self._parameters[name].shape, dtype=self._scores[name].dtype, device=device)

    def _unscale(self) -> float:
        return 1.0 if self._grad_scaler is None else 1.0 / float(self._grad_scaler.get_scale())

    def _factor(self, name: str) -> Tensor | None:
        if self._criterion == "taylor":
            return local(self._parameters[name])
        if self._initial is not None:
            weight = local(self._parameters[name])
            return weight - self._initial[name].to(weight)
        return None

    def _deferred_factor(self, name: str) -> Tensor | None:
        """None as long as the weight has not moved: the sums are multiplied once, by _fold."""
        if self._criterion in ("grad", "fisher"):
            return None
        if self._eager:
            return self._factor(name)
        version = versions(self._parameters[name])
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
            multiply_tiled(self._scores[name], factor)
        if self._versions:
            self._versions, self._eager = {}, True
