"""The last hidden states of a causal language model, and the head that would make logits of them."""

import copy
import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cwfast.errors import UnsupportedLayer
from cwfast.reference import LMHead

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Head(LMHead):
    """An LM head that makes logits of a few tokens, in its own precision."""

    __slots__ = ()

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V], for a few tokens."""
        z = nn.functional.linear(hidden, self.weight, self.bias) * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap


class Body:
    """A causal language model of transformers (or PEFT around one) up to its head.

    Args:
        model: ``get_output_embeddings()`` gives its head: a linear layer, with or without LoRA.
        adapters: False: of a PEFT model, without its adapters.
        autocast: run under autocast of this dtype.

    Raises:
        TypeError: no such model.
        UnsupportedLayer: a head that is not linear, quantized or not in memory.
    """

    def __init__(self, model: Any, *, adapters: bool = True, autocast: torch.dtype | None = None) -> None:
        self.model: Any = model
        self._adapters, self._autocast = adapters, autocast
        if not (isinstance(model, nn.Module) and hasattr(model, "get_output_embeddings")):
            raise TypeError(f"model must be a causal language model of transformers; got {type(model).__name__}")
        if not adapters and not hasattr(model, "disable_adapter"):
            raise TypeError(
                f'reference="base" needs a PEFT model, whose adapters can be off; got {type(model).__name__}'
            )
        head = self.model.get_output_embeddings()
        if head is None:
            raise TypeError(f"model must have an LM head; {type(model).__name__}.get_output_embeddings() gives None")
        self._layer: nn.Module = head
        with self.ready():
            head_now = self.live_head()
            bias = None if head_now.bias is None else head_now.bias.detach()
            self.head = head_now._replace(weight=head_now.weight.detach(), bias=bias)
        inner = self.model.get_base_model() if hasattr(model, "get_base_model") else self.model
        known = inspect.signature(inner.forward).parameters
        self._positions = "position_ids" in known
        self._cache = next((name for name in ("cache", "past_key_values") if name in known), None)
        self.device = self.model.get_input_embeddings().weight.device

    def live_head(self) -> Head:
        """The head as it is now: where gradients are on, with a graph that leads to its parameters."""
        weight, bias = _weights(self._layer)
        return Head(weight, bias, *_scaling(self.model.config))

    @contextmanager
    def ready(self) -> Iterator[None]:
        """No gradients, evaluation mode (undone afterwards, module by module), adapters as they shall be."""
        modes = [(module, module.training) for module in self.model.modules()]
        with torch.no_grad(), nullcontext() if self._adapters else self.model.disable_adapter():
            self.model.eval()
            try:
                yield
            finally:
                for module, training in modes:
                    module.training = training

    @contextmanager
    def rooted(self) -> Iterator[None]:
        """The embedding's output asks for a gradient: there is a graph from there on, whatever the parameters ask."""
        embedding: nn.Module = self.model.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda module, args, out: out.requires_grad_() if out.is_leaf else None)
        try:
            yield
        finally:
            hook.remove()

    def hidden(self, ids: Tensor, mask: Tensor, past: Any = None) -> Tensor:
        """[B, T, d] before the head, for ids and mask [B, T], each row after what ``after`` has read; inside
        ``ready()``. No logits are made: the head gets none of the tokens.
        """
        caught: list[Tensor] = []

        def cut(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            caught.append(args[0])
            return (args[0][:, :0], *args[1:])

        if past is not None:
            past = copy.deepcopy(past)  # the model adds to it what it reads
            past.batch_repeat_interleave(len(ids))
        hook = self._layer.register_forward_pre_hook(cut)
        try:
            self._call(ids, mask, past)
        finally:
            hook.remove()
        if len(caught) != 1:
            raise UnsupportedLayer(f"the LM head must be called once in a forward pass; it was {len(caught)} times")
        if caught[0].shape[:2] != ids.shape:  # prompt tuning puts tokens of its own before the text
            raise UnsupportedLayer(
                f"the LM head must see a hidden state per token, {tuple(ids.shape)}; got {tuple(caught[0].shape[:2])}"
            )
        return caught[0].to(self.head.weight.device)

    def check(self, ids: list[int]) -> None:
        """See that head and hidden states give the model's own logits; inside ``ready()``.

        Raises:
            UnsupportedLayer: they do not, so something between them is not known here.
        """
        row = torch.tensor([ids[:8]], device=self.device)
        mask = torch.ones_like(row)
        own = self._call(row, mask).logits.to(self.head.weight.device).double()
        made = self.head.logits(self.hidden(row, mask).to(self.head.weight.dtype)).double()
        far = float((own - made).abs().max())
        if made.shape != own.shape or not far <= self._allowed * max(1.0, float(own.abs().max())):
            raise UnsupportedLayer(
                f"the logits of {type(self.model).__name__} must be its LM head's, scaled and capped as its config "
                f"says; they differ by {far:.3g}"
            )

    def after(self, before: list[int], example: list[int]) -> Any:
        """Keys and values of tokens that come before every row, read once; inside ``ready()``.

        None where the model keeps none, or where the hidden states of an example after them are others than without (as
        where positions are scaled by the length of the whole).
        """
        from transformers import DynamicCache

        if self._cache is None:
            return None
        row, rest = (torch.tensor([ids], device=self.device) for ids in (before, example))
        past = DynamicCache(config=self.model.config.get_text_config())
        self._call(row, torch.ones_like(row), past)
        if past.get_seq_length() != len(before):
            return None
        whole = torch.cat([row, rest], dim=1)
        expected = self.hidden(whole, torch.ones_like(whole))[:, len(before) :].double()
        far = float((self.hidden(rest, torch.ones_like(rest), past).double() - expected).abs().max())
        return past if far <= self._allowed * max(1.0, float(expected.abs().max())) else None

    @property
    def _allowed(self) -> float:
        """Rounding, relative to the largest value: more is another model."""
        exact = {torch.float64: 1e-9, torch.float32: 1e-4}
        return 5e-2 if self._autocast is not None else exact.get(self.head.weight.dtype, 5e-2)

    def _call(self, ids: Tensor, mask: Tensor, past: Any = None) -> Any:
        more: dict[str, Any] = {"use_cache": past is not None}
        known = 0 if past is None else past.get_seq_length()
        if past is not None:
            more[str(self._cache)] = past
            mask = torch.cat([mask.new_ones(len(ids), known), mask], dim=1)
        if self._positions:
            more["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, known:]
        with torch.autocast(self.device.type, dtype=self._autocast, enabled=self._autocast is not None):
            return self.model(input_ids=ids, attention_mask=mask, **more)

    def fingerprint(self) -> str:
        """SHA-256 of the config, every parameter and buffer: a rewound model differs in few bytes from what it was."""
        digest = hashlib.sha256(f"adapters {self._adapters} {type(self.model).__name__}".encode())
        digest.update(self.model.config.to_json_string(use_diff=False).encode())
        for name, value in [*self.model.named_parameters(), *self.model.named_buffers()]:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            if not value.is_meta:
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _scaling(config: Any) -> tuple[float | None, float]:
    """Soft-cap (Gemma 2) and scale (Cohere multiplies by ``logit_scale``, Granite divides by ``logits_scaling``)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap = getattr(text, "final_logit_softcapping", None)
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    return None if cap is None else float(cap), scale


def _weights(head: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the head as it acts now, LoRA added in."""
    off = bool(getattr(head, "disable_adapters", False))
    if hasattr(head, "modules_to_save"):  # PEFT: a copy of the layer, trained whole
        active = [name for name in head.active_adapters if name in head.modules_to_save]
        return _weights(head.original_module if off or not active else head.modules_to_save[active[0]])
    if hasattr(head, "base_layer"):  # PEFT: LoRA and its kin
        base, own_bias = _weights(head.base_layer)
        active = [] if off or head.merged else [name for name in head.active_adapters if name in head.lora_A]
        for name in active:
            base = base + head.get_delta_weight(name).to(base)
        return base, own_bias
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.dtype not in _FLOATS:
        given = "no weight" if not isinstance(weight, Tensor) else f"{weight.dtype} {tuple(weight.shape)}"
        raise UnsupportedLayer(
            f"the LM head must have a floating-point weight [V, d]; {type(head).__name__} has {given}"
        )
    if weight.is_meta:
        raise UnsupportedLayer(
            "the LM head must be in memory; this one is offloaded: keep lm_head off disk in device_map"
        )
    bias = getattr(head, "bias", None)
    return weight, bias if isinstance(bias, Tensor) else None
