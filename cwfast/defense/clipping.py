"""The sum of clipped per-sample gradients, of the weights that are not frozen, without per-sample gradients."""

from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from cwfast._parameters import trainable
from cwfast._tracking import Unit, Use, sum_dtype
from cwfast.layers.frozen import Frozen
from cwfast.layers.pieces import Piece
from cwfast.layers.places import Place, merged
from cwfast.masks import MaskSet, matching
from cwfast.scoring import SaliencyScorer


class ClippedGradients:
    """``sum_b min(1, C / |g_b|) g_b`` as ``.grad``, with ``g_b`` sample b's gradient of the unfrozen weights::

        with ClippedGradients(model, max_grad_norm=1.0, masks=masks) as clipped:
            losses = cross_entropy(model(x), y, reduction="none")  # one per sample, each of its own sample alone
            optimizer.zero_grad()
            clipped.backward(losses)
            clipped.add_noise_(noise_multiplier, generator)
            optimizer.step()

    One forward pass and two backward passes. The first finds the norms, of each layer from what it has at hand: the
    whole gradient's (ghost norm) less the frozen entries' share, or a few samples' gradients at a time. The second is
    of the losses weighted by the clipping factors. Memory does not grow with samples times parameters.

    Args:
        model: all of its parameters that require a gradient take part; layers without a rule of their own run one
            sample at a time (``SaliencyScorer``'s ``fallback="loop"``).
        max_grad_norm: C.
        masks: frozen weights, of this model: their gradients count in no norm, and no noise is added to them. Keeping
            their values is the task of ``cwfast.freeze``. None: none are frozen.

    Raises:
        ValueError: ``max_grad_norm`` is not positive, ``masks`` is not of this model, or a module mixes samples
            (BatchNorm) or keeps statistics of them.

    Source:
        Abadi et al., "Deep learning with differential privacy", CCS 2016 (clipping); Li et al., ICLR 2022 (ghost
        clipping). The masked norm is ours.
    """

    def __init__(self, model: nn.Module, *, max_grad_norm: float = 1.0, masks: MaskSet | None = None) -> None:
        if not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive; got {max_grad_norm}")
        refuse_mixing(model)
        parameters = trainable(model)
        frozen = {}
        if masks is not None:
            matching(model, masks)
            named = {name: parameters[name] for name in masks.names if name in parameters and masks.counts[name]}
            frozen = {name: Frozen(p.shape, masks.indices(name).to(p.device)) for name, p in named.items()}
        self.max_grad_norm, self._parameters, self._frozen = max_grad_norm, parameters, frozen
        self._norms = _Norms(model, frozen)

    def __enter__(self) -> "ClippedGradients":
        self._norms.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._norms.__exit__(kind, error, trace)

    def backward(self, losses: Tensor) -> Tensor:
        """Add the clipped sum to ``.grad``, exactly 0 at frozen entries where that was None or 0.

        Args:
            losses: ``[B]``, sample b's own loss, from one call of the model inside ``with``; frees their graph.

        Returns:
            ``[B]`` float64: the norms before clipping.

        Raises:
            ValueError: ``losses`` is not one number for each sample of one call.
        """
        norms = self._norms.measure(losses)
        factors = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1)
        losses.backward(factors.to(losses))
        for name, frozen in self._frozen.items():
            grad = self._parameters[name].grad
            if grad is not None:
                grad.copy_(frozen.clear_(grad.contiguous()))
        return norms

    def add_noise_(self, noise_multiplier: float, generator: torch.Generator | None = None) -> None:
        """Add ``noise_multiplier * max_grad_norm * N(0, 1)`` to the gradient of every weight that is not frozen.

        Args:
            noise_multiplier: sigma.
            generator: on the parameters' device. Whoever knows its seed can take the noise off again.
        """
        std = noise_multiplier * self.max_grad_norm
        for name, parameter in self._parameters.items():
            noise = torch.empty(parameter.shape, dtype=sum_dtype(parameter.dtype), device=parameter.device)
            noise.normal_(generator=generator).mul_(std)
            if name in self._frozen:
                self._frozen[name].clear_(noise)
            if parameter.grad is None:  # no sample used it: noise alone
                parameter.grad = noise.to(parameter.dtype)
            else:
                parameter.grad += noise


def refuse_mixing(model: nn.Module) -> None:
    """Private training is of models in which each sample's loss is its own.

    Raises:
        ValueError: a module mixes samples, or keeps statistics of them.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and (
            isinstance(module, nn.modules.batchnorm._BatchNorm) or module.track_running_stats
        ):
            raise ValueError(
                f"a privately trained model must not mix samples or keep statistics of them; {name!r} is "
                f"{type(module).__name__}. Use GroupNorm or LayerNorm"
            )


class _Norms(SaliencyScorer):
    """Measures the samples' norms in one backward pass, and gives all gradients in others; scores nothing."""

    def __init__(self, model: nn.Module, frozen: Mapping[str, Frozen]) -> None:
        super().__init__(model, criterion="grad", reduction="sum", norms=True, fallback="loop")
        self._scores = {}
        self._frozen = frozen
        self._views: dict[tuple[object, ...], Frozen | None] = {}
        self._measuring(False)

    def _measuring(self, on: bool) -> None:
        self._measures, self._grads, self.wants_gradients = on, not on, not on

    def measure(self, losses: Tensor) -> Tensor:
        if losses.ndim != 1:
            raise ValueError(f"losses must have shape [B], one for each sample; got {tuple(losses.shape)}")
        self._square_norms = []
        self._measuring(True)
        try:
            losses.backward(torch.ones_like(losses), retain_graph=True)
        finally:
            self._measuring(False)
        found = self._square_norms
        if len(found) != 1 or found[0].shape != losses.shape:
            raise ValueError(
                f"losses must be those of the samples of one call of the model; got {len(losses)} losses for calls "
                f"with {[len(squares) for squares in found]} samples"
            )
        return found[0].sqrt()

    def record(self, use: Use, piece: Piece) -> Tensor | None:
        if self._measures:
            return super().record(use, piece)
        parameter = self._parameters[use.name]
        return piece.total(use.source.place.shape, sum_dtype(parameter.dtype), parameter.device)

    def _gradient_arrived(self, name: str) -> None:
        if self._measures:  # a use that was not seen then is refused then
            super()._gradient_arrived(name)

    def _close(self, name: str, unit: Unit, grad: Tensor | None) -> None:
        unit.closed = True
        placed, unit.pieces = unit.pieces, []
        parameter, norms, key = self._parameters[name], self._pass.square_norms, id(unit.batch)
        for place, piece in merged(placed):
            shape = parameter.shape if place is None else place.shape
            frozen = self._frozen_of(name, place)
            squares = piece.square_norms(shape, sum_dtype(parameter.dtype), parameter.device, frozen).double()
            norms[key] = norms[key] + squares if key in norms else squares

    def _frozen_of(self, name: str, place: Place | None) -> Frozen | None:
        """Of a view of the parameter, as the piece that was recorded for it has its entries."""
        whole = self._frozen.get(name)
        if whole is None or place is None or place.key == Place.whole(whole.shape).key:
            return whole
        key = (name, *place.key)
        if key not in self._views:
            mask = torch.zeros(whole.shape, dtype=torch.bool, device=whole.indices.device)
            mask.view(-1)[whole.indices] = True
            indices = place.of(mask).reshape(-1).nonzero().reshape(-1)
            self._views[key] = Frozen(place.shape, indices) if len(indices) else None
        return self._views[key]
