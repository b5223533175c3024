"""The norm of every text's gradient, many texts a backward pass, by ghost norms."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cwfast import ops
from cwfast.checkpoint.files import atomic_write
from cwfast.errors import CheckpointError, UnsupportedLayer
from cwfast.llm.heads import Body
from cwfast.llm.recording import LONGEST
from cwfast.llm.windows import batches, documents, windows

FORMAT = "cwfast-gradient-norms/1"


def gradient_norms(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Any],
    *,
    max_tokens: int | None = None,
    bos: bool | None = None,
    batch_tokens: int = 1024,
    autocast: torch.dtype | None = None,
    out: str | os.PathLike[str] | None = None,
    backend: str = "auto",
) -> Tensor:
    """[N]: mean over the linear layers before the LM head of ``|d nll / d W|`` (Frobenius), nll of the text's mean.

    One backward pass per batch, only down to the layers' outputs: no weight gets a gradient, no sample's gradient is
    made where its norm is cheaper from Gram tables (``cwfast.ops.per_sample_grad_norms``). Embedding, norms, biases and
    the LM head are left out; so are experts that are no linear layers. A layer that is called twice counts as two.

    Args:
        model: as for ``records``; float32 or float64 (in bfloat16 the norms are rough).
        tokenizer: its tokenizer; None for token ids.
        texts: N of them.
        max_tokens: read only so many tokens of each; a text must fit into one window.
        bos: as for ``records``.
        batch_tokens: of a batch, pads counted.
        autocast: run the model, but not its head, under autocast of this dtype, or None.
        out: a safetensors file to write the norms to; where it is there, of the same model and texts, it is read.
        backend: of ``lm_token_stats``.

    Returns:
        float32 (float64), on the CPU.

    Raises:
        ValueError: a text longer than the model's window.
        UnsupportedLayer: no linear layer, or one that does not take ``[B, T, I]`` or ``[B T, I]``.
        CheckpointError: ``out`` holds something else.
    """
    body = Body(model, autocast=autocast)
    found = documents(tokenizer, texts, bos=bos, max_tokens=max_tokens)
    longest = max(len(document.ids) for document in found)
    allowed = getattr(model.config, "max_position_embeddings", None) or LONGEST
    if longest > allowed:
        raise ValueError(f"texts must fit into {allowed} tokens; one has {longest}: give max_tokens")
    tokens = [[document.ids, document.context] for document in found]
    plan = hashlib.sha256(json.dumps([body.fingerprint(), tokens, str(autocast)]).encode()).hexdigest()
    file = None if out is None else Path(out)
    if file is not None and file.exists():
        return _kept(file, plan, len(found))
    scored = torch.tensor([document.scored for document in found])
    made = windows(found, range(len(found)), max(2, longest), 1)
    norms = torch.zeros(len(found), dtype=torch.float64)
    with body.ready(), _without_weights(model), body.rooted():
        for batch in batches(found, made, batch_tokens, "right"):
            ids, mask = batch.ids.to(body.device), batch.mask.to(body.device)
            order = torch.empty(len(ids), dtype=torch.int64)
            order[batch.row] = batch.document  # every row has a scored token
            with torch.enable_grad(), _Ghosts(model, ids.shape) as ghosts:
                states = body.hidden(ids, mask)
                rows = states[batch.row.to(states.device), batch.column.to(states.device)]
                head = body.head
                targets = torch.tensor([found[d].ids[t] for d, t in zip(batch.document, batch.token, strict=True)])
                stats = ops.lm_token_stats(
                    rows.to(head.weight.dtype),
                    head.weight,
                    targets.to(rows.device),
                    bias=head.bias,
                    softcap=head.softcap,
                    scale=head.scale,
                    backend=backend,
                )
                share = (1.0 / scored[batch.document].double()).to(stats.logprob)
                (-(stats.logprob * share).sum()).backward()
            norms[order] = ghosts.mean()
    norms = norms if body.head.weight.dtype == torch.float64 else norms.float()
    if file is not None:
        from safetensors.torch import save

        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary:
            temporary.write_bytes(save({"norms": norms}, metadata={"format": FORMAT, "plan": plan}))
    return norms


def _kept(file: Path, plan: str, texts: int) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as content:
            header, norms = content.metadata() or {}, content.get_tensor("norms")
        if (header.get("format"), header.get("plan")) != (FORMAT, plan):
            raise ValueError(
                "it is of another model, other texts or another precision: remove it, or give a new folder"
            )
        if norms.shape != (texts,):
            raise ValueError(f"it holds {tuple(norms.shape)} for {texts} texts")
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file} must hold gradient norms of this run; {error}") from error
    return norms


@contextmanager
def _without_weights(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, before in wanted:
            parameter.requires_grad_(before)


class _Ghosts:
    """Hooks on the linear layers that measure every sample's gradient when the layer's output gets its own."""

    def __init__(self, model: nn.Module, shape: torch.Size) -> None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        inside = set(head.modules())
        self._layers = {
            name: module
            for name, module in model.named_modules()
            if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module not in inside
        }
        if not self._layers:
            raise UnsupportedLayer(f"model must have linear layers before its head; {type(model).__name__} has none")
        self._shape, self._norms, self._hooks = tuple(shape), [], []  # type: ignore[var-annotated]

    def __enter__(self) -> "_Ghosts":
        for name, module in self._layers.items():
            self._hooks.append(module.register_forward_hook(self._seen(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _seen(self, name: str) -> Any:
        def forward(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            rows = args[0].shape[:-1]
            if rows != self._shape and rows != (self._shape[0] * self._shape[1],):
                raise UnsupportedLayer(
                    f"{name} must take [B, T, I] with [B, T] = {self._shape}; got {tuple(args[0].shape)}"
                )
            if out.requires_grad:
                inputs = args[0].detach().reshape(*self._shape, -1)
                out.register_hook(lambda gradient: self._measure(inputs, gradient))

        return forward

    def _measure(self, inputs: Tensor, gradient: Tensor) -> None:
        own = gradient.detach().reshape(*self._shape, -1).to(inputs.dtype)
        self._norms.append(ops.per_sample_grad_norms(inputs, own).double().cpu())

    def mean(self) -> Tensor:
        """[B]."""
        return torch.stack(self._norms).mean(dim=0)
