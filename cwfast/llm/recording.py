"""Token records of texts: one forward pass per window, statistics by ``cwfast.ops.lm_token_stats``, no logits."""

import hashlib
import json
import os
import zlib as compression
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cwfast import ops
from cwfast.errors import CheckpointError
from cwfast.llm import storage
from cwfast.llm.heads import Body
from cwfast.llm.storage import TokenRecords
from cwfast.llm.texts import as_read
from cwfast.llm.windows import Batch, Document, batches, documents, windows
from cwfast.ops.lm_token_pair import lm_token_pair

SHARD_TOKENS = 1 << 18  # scored tokens of a shard: what a run that is killed loses at most
LONGEST = 2048  # of a window, where neither the caller nor the model says less
STATISTICS = ("logprob", "logsumexp", "mean", "variance", "entropy", "rank", "correct")


def records(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Any],
    *,
    reference: Any = None,
    max_length: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    prefix: Any = None,
    bos: bool | None = None,
    padding: str = "right",
    batch_tokens: int = 4096,
    shard_tokens: int = SHARD_TOKENS,
    topk: int = 0,
    kl: bool = False,
    autocast: torch.dtype | None = None,
    out: str | os.PathLike[str] | None = None,
    backend: str = "auto",
) -> TokenRecords:
    """Statistics of every token that a model predicts, ``log p(token | those before it)`` first among them.

    What is scored: all tokens of a text but the first, and the first too where BOS or a prefix comes before it. Pads,
    BOS and the prefix are never scored; no end-of-sequence token is added. A text longer than ``max_length`` is read in
    windows that begin ``stride`` tokens apart; each token is scored once, in the first window that holds it, from the
    second on with at least ``max_length - stride`` tokens before it (BOS stands in the first one only). Windows of
    similar length share a batch; which ones do, and where the padding is, changes results by rounding only.

    Args:
        model: a causal language model of transformers with a linear head (or a PEFT model around one), anywhere, spread
            by ``device_map`` too. It runs in evaluation mode.
        tokenizer: its tokenizer; None for token ids.
        texts: strings, or sequences of token ids, which are taken as they are.
        reference: another model with the same tokens, for ``reference.*``; "base": the model without its PEFT adapters.
        max_length: tokens of a window, BOS and prefix counted; None: what the model allows, at most 2,048.
        stride: 1 .. max_length - 1; None: half of ``max_length``.
        max_tokens: read only so many tokens of each text.
        prefix: a text or token ids to put before every text (for ``recall``); with it, a text must fit into a window.
            Padded on the right, it is read once, where the model's cache of keys and values allows that.
        bos: put the BOS token first; None: for strings what the tokenizer does by itself, for token ids no.
        padding: "right" or "left".
        batch_tokens: of a batch, pads and prefix counted; at least one window is read.
        shard_tokens: of a shard, with ``out``.
        topk: also keep so many of the most likely tokens.
        kl: also KL(reference || model), for ``informia``; the models must have one vocabulary and one dtype.
        autocast: run the model, but not its head, under autocast: ``torch.bfloat16`` takes about half of the time where
            the processor computes in it, and changes log-probabilities by some hundredths.
        out: a folder for the shards; a run that was interrupted goes on there.
        backend: of ``lm_token_stats``.

    Returns:
        ``TokenRecords``: float32 (float64 for a float64 model), on the CPU.

    Raises:
        TypeError, ValueError: an argument does not hold what is written above.
        UnsupportedLayer: the model's logits are not those of its head.
        CheckpointError: ``out`` holds another run, or a broken file.
    """
    if padding not in ("right", "left"):
        raise ValueError(f"padding must be 'right' or 'left'; got {padding!r}")
    if batch_tokens < 1 or shard_tokens < 1:
        raise ValueError(f"batch_tokens and shard_tokens must be at least 1; got {batch_tokens} and {shard_tokens}")
    if kl and reference is None:
        raise ValueError("kl=True needs a reference; got None")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be None, torch.bfloat16 or torch.float16; got {autocast}")
    body = Body(model, autocast=autocast)
    other = None
    if reference is not None:
        based = isinstance(reference, str)
        if based and reference != "base":
            raise ValueError(f'reference must be a model or "base"; got {reference!r}')
        other = Body(model if based else reference, adapters=not based, autocast=autocast)
        if kl and (other.head.softcap, other.head.scale) != (body.head.softcap, body.head.scale):
            raise ValueError("kl=True needs models with the same soft-cap and scale of logits; these differ")
    allowed = getattr(_text_config(model), "max_position_embeddings", None) or LONGEST
    longest = min(int(allowed), LONGEST) if max_length is None else max_length
    step = longest // 2 if stride is None else stride
    bos_id = getattr(_text_config(model), "bos_token_id", None) if tokenizer is None else None
    found = documents(tokenizer, texts, prefix=prefix, bos=bos, max_tokens=max_tokens, bos_id=bos_id)
    if not found:
        raise ValueError("texts must hold at least one text; got none")
    run = _Run(body, other, longest, step, padding, batch_tokens, topk, kl, backend)
    sizes = None if max_tokens is not None and tokenizer is None else _compressed(tokenizer, texts, found, max_tokens)
    manifest = {
        "model": body.fingerprint(),
        "reference": None if other is None else other.fingerprint(),
        "texts": len(found),
        "tokens_sha256": hashlib.sha256(json.dumps([[d.ids, d.context] for d in found]).encode()).hexdigest(),
        "max_length": longest,
        "stride": step,
        "topk": topk,
        "kl": kl,
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
    }
    made: list[tuple[Tensor, TokenRecords]] = []
    names: list[str] = []
    checked = False
    for i, chosen in enumerate(_shards(found, shard_tokens)):
        index = torch.tensor(chosen)
        plan = hashlib.sha256(json.dumps([manifest, chosen], sort_keys=True).encode()).hexdigest()
        file = None if out is None else Path(out) / storage.shard_name(i)
        part = None if file is None or not file.exists() else _kept(file, plan)
        if part is None:
            if not checked:
                run.begin(found[chosen[0]])
                checked = True
            part = run.shard(found, chosen, None if sizes is None else sizes[index])
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                storage.write_shard(file, index, part, plan)
        made.append((index, part))
        names.append(storage.shard_name(i))
    if out is not None:
        storage.write_index(Path(out), manifest, names)
    return storage.joined(made, manifest)


class _Run:
    """Models and settings of a run."""

    def __init__(
        self,
        body: Body,
        other: Body | None,
        longest: int,
        step: int,
        padding: str,
        batch_tokens: int,
        topk: int,
        kl: bool,
        backend: str,
    ) -> None:
        self.body, self.other, self.longest, self.step, self.padding = body, other, longest, step, padding
        self.batch_tokens, self.topk, self.kl, self.backend = batch_tokens, topk, kl, backend
        self.known = 0  # tokens that come before every row, read already
        self.past: list[Any] = [None, None]  # what the models keep of them

    def begin(self, example: Document) -> None:
        """Check the models, and have them read a prefix: all of it but its last token, which predicts the first one."""
        known = example.context - 1
        for i, body in enumerate((self.body, self.other)):
            if body is not None:
                with body.ready():
                    body.check(example.ids)
                    if 0 < known < self.longest and self.padding == "right":  # pads after a prefix fill sliding windows
                        self.past[i] = body.after(example.ids[:known], example.ids[known : self.longest])
        shared = self.past[0] is not None and (self.other is None or self.past[1] is not None)
        self.known, self.past = (known, self.past) if shared else (0, [None, None])

    def shard(self, found: Sequence[Document], chosen: Sequence[int], sizes: Tensor | None) -> TokenRecords:
        """The records of the chosen documents, in that order."""
        lengths = torch.tensor([found[i].scored for i in chosen])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        place = {i: int(start) - found[i].first for i, start in zip(chosen, offsets[:-1].tolist(), strict=True)}
        tokens = torch.cat([torch.tensor(found[i].ids[found[i].first :]) for i in chosen])
        values: dict[str, Tensor] = {}
        made = windows(found, chosen, self.longest, self.step, self.known)
        for batch in batches(found, made, self.batch_tokens, self.padding, self.known):
            start = torch.tensor([place[i] for i in batch.document.tolist()])
            at = start + batch.token
            for name, value in self._statistics(batch, tokens[at]).items():
                kept = value.cpu()
                if name not in values:
                    values[name] = kept.new_zeros(len(tokens), *kept.shape[1:])
                values[name][at] = kept
        for name in ("logprob", "reference.logprob", "kl"):
            lost = values[name].isnan().nonzero()[:1, 0] if name in values else torch.empty(0)
            if len(lost):
                text = chosen[int(torch.searchsorted(offsets, lost, right=True)) - 1]
                raise ValueError(
                    f"models must give each token a probability; {name} of text {text} has NaN, which some models have "
                    "under left padding"
                )
        return TokenRecords(offsets, tokens, values, sizes)

    def _statistics(self, batch: Batch, targets: Tensor) -> dict[str, Tensor]:
        states = []
        for body, past in zip((self.body, self.other), self.past, strict=True):
            if body is not None:
                with body.ready():
                    seen = body.hidden(batch.ids.to(body.device), batch.mask.to(body.device), past)
                rows = seen[batch.row.to(seen.device), batch.column.to(seen.device)]
                states.append(rows.to(body.head.weight.dtype))  # under autocast, or with a head of another precision
        if self.kl:
            assert self.other is not None
            device = states[0].device
            ref = self.other.head
            ref = ref._replace(weight=ref.weight.to(device), bias=None if ref.bias is None else ref.bias.to(device))
            stats, ref_stats, divergence = lm_token_pair(
                states[0],
                self.body.head,
                states[1].to(device),
                ref,
                targets.to(device),
                topk=self.topk,
                backend=self.backend,
            )
            made, kl = [stats, ref_stats], {"kl": divergence}
        else:
            made, kl = [self._of(self.body, states[0], targets, self.topk)], {}
            made += [] if self.other is None else [self._of(self.other, states[1], targets, 0)]
        found = {
            before + name: getattr(stats, name)
            for before, stats in zip(("", "reference."), made, strict=False)
            for name in STATISTICS
        }
        if self.topk:
            found |= {"topk_logprob": made[0].topk.logprob, "topk_index": made[0].topk.indices}
        return found | kl

    def _of(self, body: Body, states: Tensor, targets: Tensor, topk: int) -> ops.TokenStats:
        head = body.head
        return ops.lm_token_stats(
            states,
            head.weight,
            targets.to(states.device),
            bias=head.bias,
            softcap=head.softcap,
            scale=head.scale,
            topk=topk,
            backend=self.backend,
        )


def _shards(found: Sequence[Document], most: int) -> Iterator[list[int]]:
    """Indices of documents, the longest first, ``most`` scored tokens or one document at a time."""
    order = sorted(range(len(found)), key=lambda i: (-len(found[i].ids), i))
    chosen: list[int] = []
    tokens = 0
    for i in order:
        if chosen and tokens + found[i].scored > most:
            yield chosen
            chosen, tokens = [], 0
        chosen.append(i)
        tokens += found[i].scored
    yield chosen


def _kept(file: Path, plan: str) -> TokenRecords:
    _, part, own = storage.read_shard(file)
    if own != plan:
        raise CheckpointError(
            f"{file} must be of this run (model, texts and settings); it is of another: give a new folder, or remove it"
        )
    return part


def _compressed(
    tokenizer: Any, texts: Sequence[Any], found: Sequence[Document], max_tokens: int | None
) -> Tensor | None:
    """Bytes of each scored text after zlib; None where there is no text."""
    if tokenizer is None:
        return None
    sizes = []
    for text, document in zip(texts, found, strict=True):
        own = document.ids[document.context :]
        scored = as_read(tokenizer, text, own, max_tokens) if isinstance(text, str) else tokenizer.decode(own)
        sizes.append(len(compression.compress(scored.encode("utf-8", "surrogatepass"))))
    return torch.tensor(sizes)


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
