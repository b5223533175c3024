"""Which use of a parameter is scored how: a registry of rules by torch function, one file per layer family.

A rule is called in place of the function and returns its result, or NotImplemented where it cannot score this call.
What it has to say is how a sample's gradient follows from inputs, output gradients and weight. For a layer of your own,
here a gate ``y = x * sigmoid(w)`` that your module calls as a function through ``torch.overrides``::

    @register(gate)
    def rule(tracker, x, weight):
        def gradient(layout, x, grad, weight):
            s = weight.sigmoid()
            return PerSample(layout.sums(grad * x * s * (1 - s)))
        return scored(tracker, gate, x, (weight,), (gradient,))
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from cwfast.layers.outer import Lookup, Outer
from cwfast.layers.pieces import Computed, PerSample, Piece
from cwfast.layers.samples import Batch, Layout

__all__ = ["Computed", "Layout", "Lookup", "Outer", "PerSample", "Piece", "Tracker", "register", "rule_for", "scored"]


class Use(Protocol):
    """One use of a parameter in a forward pass."""

    layout: Layout


class Tracker(Protocol):
    """What a rule sees of the scorer."""

    batch_now: Batch  # the samples of the current forward pass
    wants_gradients: bool  # whether parameters get a gradient
    dim: int  # the dimension of a layer's tensors that holds the samples: 0, but inside multi-head attention 1

    def tracks(self, value: object) -> bool:
        """Whether this is a parameter that is scored, or a view of one."""

    def name_of(self, parameter: Tensor) -> str:
        """Of the parameter that this is, or is a view of."""

    def shared(self, x: Tensor, dim: int = 0) -> str | None:
        """The name of the model's buffer or parameter in whose memory x lies, so that all samples share x; None: of no
        one, or expanded along ``dim``, or there is one sample.
        """

    def use(self, parameter: Tensor | None, owner: Tensor | None = None) -> Any:
        """A handle (a Use) for one use of a parameter in this forward pass; None where it is not scored.

        Args:
            parameter: a parameter or a view of one.
            owner: ``[rows]``, the sample of each row of the layer's 2-D tensors, where the shapes do not tell.
        """

    def record(self, use: Any, piece: Piece) -> Tensor | None:
        """Score one use's gradient at backward; return its sum over the samples where one is wanted."""

    def alias(self, result: Tensor, parameter: Tensor) -> Tensor:
        """Mark the result as the parameter in another dtype or moved by a constant: its gradient is the parameter's."""


Rule = Callable[..., Any]
_RULES: dict[Callable[..., Any], tuple[Rule, bool]] = {}  # and whether it takes DTensors


def register(*functions: Callable[..., Any], dtensors: bool = False) -> Callable[[Rule], Rule]:
    """Decorator: the rule ``rule(tracker, *args, **kwargs)`` scores calls of these torch functions.

    ``dtensors``: also those that are given DTensors (tensor parallelism).
    """

    def add(rule: Rule) -> Rule:
        for function in functions:
            _RULES[function] = rule, dtensors
        return rule

    return add


def rule_for(function: Callable[..., Any], dtensors: bool = False) -> Rule | None:
    """The rule that scores calls of ``function``, which is given ``dtensors`` or not."""
    rule, takes = _RULES.get(function, (None, False))
    return rule if takes or not dtensors else None


from cwfast.layers import attention, broadcast, conv, embedding, experts, heads, linear, norms  # noqa: E402, F401  (rules)
from cwfast.layers.scored import scored  # noqa: E402
