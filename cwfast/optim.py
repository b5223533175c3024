"""Optimizers that train selected weights only."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cwfast import _picks
from cwfast.masks import MaskSet, matching
from cwfast.ops._entries import Entries
from cwfast.ops.adamw import selected_adamw_


class SelectedAdamW(Optimizer):
    """AdamW on the selected weights alone; no other weight changes by a bit, whatever its gradient.

    For each selected weight w with gradient g: ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``,
    ``w = (1 - lr wd) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)``: what ``torch.optim.AdamW`` computes.

    The state holds m and v in float32 for the selected weights alone: 8 bytes each, in flat order (float64 weights:
    16 bytes). Only selected entries of weights and gradients are read; weights of 16 bits are rounded to their dtype
    after each step. A parameter whose ``grad`` is None is left alone, as in AdamW.

    Args:
        model: its parameters named by ``masks``; those of which nothing is selected do not train.
        masks: of this model; copied, to the parameters' devices (2 bytes a selected weight below 1/16, else bits).
        lr: learning rate. It and the next three are entries of the one parameter group, so that schedulers work.
        betas: decay of m and v, each in [0, 1).
        eps: added to the square root.
        weight_decay: decoupled, of the selected weights.
        maximize: ascend instead of descend.
        backend: "reference", "cpu" or "auto".

    Raises:
        TypeError: a selected parameter is not of a floating dtype.
        ValueError: ``masks`` is not of this model, selects nothing, a number is out of range, or a selected parameter
            is not dense.

    Source:
        Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 2.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: MaskSet,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        backend: str = "auto",
    ) -> None:
        for name, value in (("lr", float(lr)), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0; got {value}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1); got {betas}")
        chosen = {name: p for name, p in matching(model, masks).items() if masks.counts[name]}
        if not chosen:
            raise ValueError(f"masks must select some weight; got {masks}")
        for name, parameter in chosen.items():
            if not parameter.is_floating_point():
                raise TypeError(f"selected parameters must be of a floating dtype; {name!r} is {parameter.dtype}")
        self._entries: dict[Tensor, Entries] = {
            p: Entries(name, p.detach(), _picks.to_device(masks.picks(name), p.device), backend=backend)
            for name, p in chosen.items()
        }
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(list(chosen.values()), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; ``closure``, if given, computes the loss anew, which is returned.

        Raises:
            TypeError: a gradient is sparse.
            ValueError: a parameter has another shape or device, is not dense, or its state does not fit; of the
                parameters on its device, none has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_device: dict[torch.device, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_device.setdefault(parameter.device, []).append(parameter)
            for parameters in by_device.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state_of(p) for p in parameters]
        selected_adamw_(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [self._entries[p] for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros(self._entries[parameter].count, dtype=dtype, device=parameter.device)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict()`` of an optimizer with the same masks; m and v keep their float32.

        Raises:
            ValueError: it is no such state, or the number of selected weights of a parameter differs; nothing has been
                changed.
        """
        if not {"state", "param_groups"} <= set(state_dict):
            raise ValueError(f"state_dict must have 'state' and 'param_groups'; got {list(state_dict)[:5]}")
        parameters = [p for group in self.param_groups for p in group["params"]]
        keys: Iterable[int] = [key for group in state_dict["param_groups"] for key in group["params"]]
        pairs = zip(keys, parameters, strict=False)  # of other lengths: refused by torch below
        saved = [(p, state_dict["state"][key]) for key, p in pairs if key in state_dict["state"]]
        for i, (parameter, state) in enumerate(saved):
            for key in ("exp_avg", "exp_avg_sq"):
                if not {"step", key} <= set(state):
                    raise ValueError(
                        f"the state must be of SelectedAdamW: parameter {i} must have step and {key}; got {list(state)}"
                    )
                if state[key].shape != (self._entries[parameter].count,):
                    raise ValueError(
                        f"the state must be of the same masks: {key} of parameter {i} must have "
                        f"{self._entries[parameter].count} entries; got shape {tuple(state[key].shape)}"
                    )
        super().load_state_dict(state_dict)
        for parameter, state in saved:  # torch casts floating state to the weight's dtype: 16 bits would lose digits
            for key in ("exp_avg", "exp_avg_sq"):
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                self.state[parameter][key] = state[key].to(parameter.device, dtype, copy=True)
