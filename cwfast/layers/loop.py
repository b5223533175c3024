"""``fallback="loop"``: a call without a rule, run again one sample at a time under autograd to score its parameters.

Costs another forward and backward pass of this call, and one of each sample: for all its parameters together, but for
each anew that is used in other calls as well. Nothing else in the model is run again.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from cwfast.errors import UnsupportedLayer
from cwfast.layers.frozen import Frozen
from cwfast.layers.pieces import Piece, magnitude
from cwfast.layers.rows import owner_of

if TYPE_CHECKING:
    from cwfast.layers import Tracker

# A sample's results may differ from the batch's by rounding, relative to the largest entry.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_ROUGH = 0.05  # 16 bits
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


class Looped:
    """One call, seen before it runs.

    Args:
        tracker: as a rule gets it.
        function, args, kwargs: the call.
    """

    def __init__(self, tracker: "Tracker", function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.tracker, self.function, self.args = tracker, function, args
        leaves, self.spec = tree_flatten((args, kwargs))
        self.at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [leaves[i] for i in self.at]
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.versions = [None if x.is_inference() else x._version for x in self.tensors]  # those have none
        self.recurrent = function in _RECURRENT
        self.names: Sequence[str] = ()

    def refuse(self, why: str) -> UnsupportedLayer:
        call = getattr(self.function, "__qualname__", self.function)
        return UnsupportedLayer(
            f"parameter {', '.join(map(repr, self.names))} is used by {call}, which has no layer rule and cannot be "
            f"run one sample at a time: {why}"
        )

    def _dims(self) -> list[int | None]:
        """For each tensor, the dimension of its samples; None: all samples share it."""
        where = dict.fromkeys(map(id, self.tensors), self.tracker.dim)
        if self.recurrent:
            if len(self.args) < 9:
                raise self.refuse("its arguments must be given by position")
            if isinstance(self.args[3], list | tuple):
                raise self.refuse("its sequences are packed; give padded ones")
            where |= dict.fromkeys(map(id, tree_leaves(self.args[1])), 1)
            where[id(self.args[0])] = 0 if self.args[8] else 1
        shared = {id(x): self.tracker.shared(x, where[id(x)]) for x in self.tensors}
        for x in [self.args[0], *tree_leaves(self.args[1])] if self.recurrent else []:
            if shared[id(x)] is not None:
                raise self.refuse(f"its input or state is {shared[id(x)]!r} of the model, which all samples share")
        dims = [
            dim
            if not self.tracker.tracks(x) and shared[id(x)] is None and dim < x.ndim and x.shape[dim] == self.samples
            else None
            for x, dim in ((x, where[id(x)]) for x in self.tensors)
        ]
        if all(dim is None for dim in dims):
            others = [x for x in self.tensors if not self.tracker.tracks(x)]
            got = [f"{tuple(x.shape)} of the model's {shared[id(x)]!r}" * (shared[id(x)] is not None) for x in others]
            got = [text or str(tuple(x.shape)) for text, x in zip(got, others, strict=True)]
            raise self.refuse(
                f"no tensor in it has the {self.samples} samples as its first dimension (the model's own buffers and "
                f"parameters are the same for all samples); got {', '.join(got) or 'none'}"
            )
        for x, dim in zip(self.tensors, dims, strict=True):
            owner = owner_of(x, self.samples) if dim == 0 else None
            if owner is not None and not torch.equal(owner, torch.arange(self.samples, device=owner.device)):
                raise self.refuse("its rows are not in the order of the samples")
        return dims

    def apply(self, result: Any, names: Sequence[str]) -> Any:
        """The result of the call, given a backward that scores the parameters of these names."""
        self.names, size = names, self.tracker.batch_now.size
        if size is None or self.tracker.batch_now.cu_seqlens is not None:
            raise self.refuse("the batch must have a size and must not be packed (cu_seqlens)")
        self.samples = size
        self.dims = self._dims()
        if None in self.versions:
            raise self.refuse("it takes a tensor that was made in inference mode; give a clone of it")
        if [x._version for x in self.tensors] != self.versions:
            raise self.refuse("it changes a tensor in place")
        leaves, spec = tree_flatten(result)
        self.results = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.grad_fn is not None]
        first = next(dim for dim in self.dims if dim is not None)
        self.result_dims = [1 if self.recurrent and k else first for k in range(len(self.results))]
        for i, dim in zip(self.results, self.result_dims, strict=True):
            if leaves[i].ndim <= dim or leaves[i].shape[dim] != self.samples:
                raise self.refuse(
                    f"a result must have the {self.samples} samples as dimension {dim}; got {tuple(leaves[i].shape)}"
                )
        self.uses = [self.tracker.use(x) for x in self.tensors]
        device = self.tensors[0].device.type
        self.args = ()  # the tensors are kept by autograd
        # The same memory and count of changes as the results; not the results, which hold this call.
        self.stored = [leaves[i].detach() for i in self.results]
        self.stored_versions = [x._version for x in self.stored]
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        scored = _Loop.apply(self, tuple(leaves[i].detach() for i in self.results), *self.tensors)
        self.tensors = []
        for i, x in zip(self.results, scored, strict=True):
            leaves[i] = x
        return tree_unflatten(leaves, spec)

    def gradients(
        self, tensors: Sequence[Tensor], wanted: Sequence[int], grads: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The results of the call on these tensors, and the gradients of those that are wanted."""
        detached = [x.detach() for x in tensors]
        for i in wanted:
            detached[i].requires_grad_()
        leaves = list(self.constants)
        for i, x in zip(self.at, detached, strict=True):
            leaves[i] = x
        args, kwargs = tree_unflatten(leaves, self.spec)
        device, dtype, enabled = self.autocast
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            found = tree_leaves(self.function(*args, **kwargs))
        results = [found[i] for i in self.results]
        pairs = [(y, grad) for y, grad in zip(results, grads, strict=True) if y.requires_grad]
        gradients = torch.autograd.grad(
            [y for y, _ in pairs], [detached[i] for i in wanted], [grad for _, grad in pairs], materialize_grads=True
        )
        if any(gradient.layout is not torch.strided for gradient in gradients):
            raise self.refuse("it gives a sparse gradient")
        return [y.detach() for y in results], list(gradients)


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Looped, results: tuple[Tensor, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: Looped = ctx.call
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        with torch._C.DisableTorchFunctionSubclass():
            wanted = [i for i, need in enumerate(needed) if need]
            results, gradients = call.gradients(tensors, wanted, grads)
            for x, stored, version in zip(results, call.stored, call.stored_versions, strict=True):
                if stored._version == version and not _agree(x, stored):  # else changed in place since: not known
                    raise call.refuse(
                        "its result must be the same when it is run again (no randomness such as dropout)"
                    )
            found: dict[int, Any] = dict(zip(wanted, gradients, strict=True))
            uses = [i for i in wanted if call.uses[i] is not None]
            runs = _Runs(call, tensors, results, grads, {i: found[i] for i in uses})
            del gradients, results
            for i in uses:
                gradient = found.pop(i)  # where no gradient is wanted, it was computed to check the samples' by
                piece = LoopedPiece(runs, i, gradient if call.tracker.wants_gradients else None)
                del gradient
                found[i] = call.tracker.record(call.uses[i], piece)
        return (None, None, *(found.get(i) for i in range(len(tensors))))


def _agree(x: Tensor, expected: Tensor) -> bool:
    """Whether two results are the same but for rounding: measured by the largest finite entry."""
    if x.shape != expected.shape:
        return False
    finite = x.isfinite() & expected.isfinite()
    error, size = (torch.where(finite, y, 0).abs() for y in (x - expected, expected))
    same = finite | (x == expected) | (x.isnan() & expected.isnan())
    limit = _TOLERANCE.get(expected.dtype, _ROUGH)
    return not x.numel() or bool(same.all() & (error.max() <= limit * size.max()))


def _folded(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient as 64 numbers that add when gradients add, and the size of what went into each."""
    flat = gradient.reshape(-1).to(torch.promote_types(gradient.dtype, torch.float32))
    # Weights that no gradient is orthogonal to by its form, as those of a softmax are to equal ones.
    mixed = flat * torch.arange(len(flat), dtype=flat.dtype, device=flat.device).cos_()
    pad = (0, -len(flat) % 64)
    numbers, squares = (functional.pad(x, pad).view(-1, 64).sum(dim=0) for x in (mixed, flat.square()))
    return numbers, squares.sqrt()


class _SumCheck:
    """Whether the samples' gradients sum to the batch's: else samples depend on one another, or on chance.

    Args:
        samples: B.
        gradient: of the batch.
        floor: gradients that ought to be zero differ by so much.
    """

    def __init__(self, samples: int, gradient: Tensor, floor: Tensor, tolerance: float) -> None:
        self.samples, self.tolerance, self.next = samples, tolerance, 0
        self.missing, _ = _folded(gradient)
        self.judged = self.missing.isfinite()
        self.size = torch.zeros_like(self.missing) + floor.to(self.missing)

    def holds(self, sample: int, gradient: Tensor) -> bool:
        """Takes the gradients in the order of the samples; what comes again is not looked at."""
        if sample != self.next:
            return True
        self.next += 1
        numbers, size = _folded(gradient)
        self.missing -= numbers
        self.size += self.tolerance * size
        return self.next < self.samples or bool(((self.missing.abs() <= self.size) | ~self.judged).all())


class _Runs:
    """The runs on one sample each. Parameters with no other use share them.

    Args:
        call, tensors: what is run.
        results, grads: of the whole batch, by which the runs are checked, and their gradients.
        uses: which tensors are scored, and the batch's gradients of them.
    """

    def __init__(
        self,
        call: Looped,
        tensors: Sequence[Tensor],
        results: Sequence[Tensor],
        grads: Sequence[Tensor],
        uses: dict[int, Tensor],
    ) -> None:
        self.call, self.tensors, self.results, self.grads, self.uses = call, tensors, results, grads, list(uses)
        self.samples = call.samples
        self.sums: dict[int, Tensor] = {}
        self.squares: dict[int, Tensor] = {}
        self.checks: dict[int, _SumCheck] = {}
        for i, gradient in uses.items():
            dtypes = {gradient.dtype, *(x.dtype for x in results), *([call.autocast[1]] if call.autocast[2] else [])}
            roughest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
            floor = torch.finfo(roughest).eps * sum(grad.abs().sum(dtype=torch.float64) for grad in grads)
            tolerance = _TOLERANCE.get(roughest, _ROUGH)
            self.checks[i] = _SumCheck(self.samples, gradient, torch.as_tensor(floor), tolerance)

    def of(self, sample: int, uses: Sequence[int]) -> list[Tensor]:
        """The gradients of one sample with respect to these tensors."""

        def own(xs: Sequence[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
            pairs = zip(xs, dims, strict=True)
            return [x if dim is None else x.narrow(dim, sample, 1) for x, dim in pairs]

        call = self.call
        results, gradients = call.gradients(own(self.tensors, call.dims), uses, own(self.grads, call.result_dims))
        pairs = zip(results, own(self.results, call.result_dims), strict=True)
        if not all(_agree(x, expected) for x, expected in pairs):
            raise call.refuse(
                "its result for one sample must be what it is in the batch (no randomness such as dropout, no "
                "statistics of the batch)"
            )
        if not all(self.checks[i].holds(sample, gradient) for i, gradient in zip(uses, gradients, strict=True)):
            raise call.refuse(
                "the samples' gradients must sum to that of the batch (no randomness such as dropout, no statistics "
                "of the batch)"
            )
        return gradients

    def run(self, power: int, coefficients: Tensor | None) -> None:
        """Finds for each use ``sum_b |c_b G_b|**power``, and ``|c_b G_b|^2`` of each sample ``[B]``."""
        for i in self.uses:
            weight = self.tensors[i]
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.sums[i] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            self.squares[i] = torch.zeros(self.samples, dtype=dtype, device=weight.device)
        for sample in range(self.samples):
            for i, gradient in zip(self.uses, self.of(sample, self.uses), strict=True):
                g = gradient.to(self.sums[i].dtype)
                if coefficients is not None:
                    g = g * float(coefficients[sample])
                self.squares[i][sample] = g.square().sum()
                self.sums[i] += g.abs() if power == 1 else g.square()


class LoopedPiece(Piece):
    """The gradient of one parameter of such a call, the tensor ``index``; ``gradient``: of all samples, if wanted."""

    def __init__(self, runs: _Runs, index: int, gradient: Tensor | None, coefficients: Tensor | None = None) -> None:
        self.runs, self.index, self.gradient, self.coefficients = runs, index, gradient, coefficients
        self.samples = runs.samples

    def add_to(self, out: Tensor, sample: int) -> None:
        c = 1 if self.coefficients is None else float(self.coefficients[sample])
        out.add_(self.runs.of(sample, [self.index])[0], alpha=c)

    def scaled(self, coefficients: Tensor) -> "LoopedPiece":
        if self.coefficients is not None:
            coefficients = coefficients * self.coefficients
        return LoopedPiece(self.runs, self.index, self.gradient, coefficients)

    def total(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.gradient is None or self.coefficients is not None:
            return super().total(shape, dtype, device)
        return self.gradient.to(dtype)

    def accumulate_(
        self, out: Tensor, power: int, factor: Tensor | None, scale: float, grad: Tensor | None, backend: str
    ) -> None:
        if self.index not in self.runs.sums:
            self.runs.run(power, self.coefficients)
        if grad is not None:
            grad.copy_(self.total(grad.shape, grad.dtype, grad.device))
        total = self.runs.sums[self.index]
        if factor is not None:
            total = total * magnitude(factor, out.dtype, power)
        out.add_(total, alpha=abs(scale) ** power)

    def square_norms(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, frozen: Frozen | None = None
    ) -> Tensor:
        if frozen is None and self.index in self.runs.squares:
            return self.runs.squares[self.index]
        return super().square_norms(shape, dtype, device, frozen)
