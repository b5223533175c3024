"""Which use of a parameter is scored how: a registry of rules by torch function, one file per layer family.

A rule is called in place of the function and returns its result. It asks ``tracker.use(parameter)`` for a handle at
forward, and gives ``tracker.record(handle, inputs, grad_outputs)`` the two factors of the gradient at backward.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor


class Tracker(Protocol):
    """What a rule sees of the scorer."""

    def use(self, parameter: Tensor | None) -> Any:
        """A handle for one use of a parameter in this forward pass; None where it is not scored."""

    def record(self, use: Any, inputs: Tensor, grad_outputs: Tensor) -> Tensor | None:
        """Score the gradient ``sum_t grad_outputs[b,t] x inputs[b,t]``; return its sum over b where one is wanted."""


Rule = Callable[..., Any]
_RULES: dict[Callable[..., Any], Rule] = {}


def register(function: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Decorator: the rule ``rule(tracker, *args, **kwargs)`` scores calls of this torch function."""

    def add(rule: Rule) -> Rule:
        _RULES[function] = rule
        return rule

    return add


def rule_for(function: Callable[..., Any]) -> Rule | None:
    """The rule that scores calls of ``function``."""
    return _RULES.get(function)


from cwfast.layers import linear  # noqa: E402, F401  (registers its rules)
