"""The criteria by which ``score`` ranks the weights of a language model: one forward and backward pass per batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cwfast._tracking import sum_dtype
from cwfast.layers.heads import head_kl, head_logprob
from cwfast.llm.heads import Body
from cwfast.llm.swapping import Weights
from cwfast.llm.windows import Document, row_batches, windows
from cwfast.reference import LMHead
from cwfast.scoring import SaliencyScorer

TAYLOR = ("taylor", "taylor_delta")
CRITERIA = ("gap", *TAYLOR)


@dataclass(frozen=True)
class Settings:
    """How scores are computed; see ``cwfast.llm.scoring.score``."""

    criterion: str = "gap"
    lam: float = 0.5
    points: int = 1
    batch_size: int = 8
    granularity: str = "sample"
    autocast: torch.dtype | None = None
    backend: str = "auto"


class Rows(NamedTuple):
    """A batch, and of it what is predicted, sample by sample."""

    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    row: Tensor  # [n], ascending: the sample
    column: Tensor  # [n], of the hidden state
    targets: Tensor  # [n]


@dataclass
class Estimator:
    """A model, its texts, and what the passes over them share. Used inside ``body.ready()`` and ``weights.kept()``.

    Attributes:
        progress: called after each batch.
    """

    body: Body
    weights: Weights
    members: list[Rows]
    reference: list[Rows]
    settings: Settings
    progress: Callable[[], object] = lambda: None
    _base: list[Tensor] = field(default_factory=list)  # [n, e] for each reference batch: the base's hidden states
    _base_head: LMHead | None = None

    def scores(self, names: Sequence[str]) -> dict[str, Tensor]:
        """At least 0, float32 (float64); only these parameters get gradients."""
        chosen = set(names)
        for name, parameter in self.weights.parameters.items():
            parameter.requires_grad_(name in chosen)
        if self.settings.criterion == "gap":
            return self._gap(names)
        with torch.enable_grad():
            return self._taylor(names)

    def batches(self) -> int:
        """Of a call of ``scores``."""
        s, once = self.settings, len(self.members) + len(self.reference)
        if s.criterion == "gap":
            return once * s.points
        return len(self.members) if s.granularity == "batch" else once

    # -- the shares of the gap

    def _gap(self, names: Sequence[str]) -> dict[str, Tensor]:
        """``max(0, d * mean over t of (g_ref - g_mem)(w0 + t d))``, g of the mean over all tokens of a side."""
        sums = {name: self._zeros(name) for name in names}
        points = self.settings.points
        with self._collected(sums) as collect:
            for point in range(points):
                self.weights.put((point + 0.5) / points)
                for side, sign in ((self.reference, 1.0), (self.members, -1.0)):
                    tokens = sum(len(rows.targets) for rows in side)
                    for rows in side:  # each batch's mean, weighted outside: small numbers never meet a small dtype
                        with torch.enable_grad():
                            collect(self._nll(rows).mean(), sign * len(rows.targets) / (tokens * points))
                        self.progress()
        for name, share in sums.items():
            share.mul_(self.weights.delta(name)).clamp_(min=0).add_(0.0)  # no -0.0
        return sums

    @contextmanager
    def _collected(self, sums: dict[str, Tensor]) -> Iterator[Callable[[Tensor, float], None]]:
        """A function of a loss and a factor, which adds the factor times the loss's gradients to ``sums``.

        Each gradient is added in the sums' dtype and let go of as soon as it is there: never are all in memory.
        """
        factor = 0.0
        hooks = []
        for name, total in sums.items():

            def add(parameter: Tensor, total: Tensor = total) -> None:
                assert parameter.grad is not None
                total.add_(parameter.grad, alpha=factor)
                parameter.grad = None

            hooks.append(self.weights.parameters[name].register_post_accumulate_grad_hook(add))

        def collect(loss: Tensor, by: float) -> None:
            nonlocal factor
            factor = by
            _backward(loss)

        try:
            yield collect
        finally:
            for hook in hooks:
                hook.remove()

    # -- sums over samples

    def _taylor(self, names: Sequence[str]) -> dict[str, Tensor]:
        """``(1 - lam) mean over members |g f| + lam mean over reference texts |h f|``, each of the text's own loss."""
        s, model = self.settings, self.body.model
        if s.lam and self._base_head is None:
            self._remember_base()
        batched = s.granularity == "batch"
        scorer = SaliencyScorer(
            model,
            criterion=s.criterion,
            granularity=s.granularity,
            reduction="sum",
            initial={name: self.weights.initial(name) for name in names} if s.criterion == "taylor_delta" else None,
            grads=batched,
            backend=s.backend,
        )
        with scorer:
            return self._by_batch(scorer) if batched else self._by_sample(scorer)

    def _by_sample(self, scorer: SaliencyScorer) -> dict[str, Tensor]:
        """A side's losses carry its weight: what is summed over samples is the criterion.

        The graph begins at the embedding: some layers find there whose their rows are.
        """
        lam = self.settings.lam
        for side, weight, loss in ((self.members, 1 - lam, self._mean_nll), (self.reference, lam, self._mean_kl)):
            count = sum(len(rows.ids) for rows in side)
            for i, rows in enumerate(side):
                if weight:
                    with self.body.rooted(), scorer.batch(len(rows.ids)):
                        _backward(loss(i, rows).sum() * (weight / count))
                self.progress()
        return scorer.scores()

    def _by_batch(self, scorer: SaliencyScorer) -> dict[str, Tensor]:
        """The paper's form: a step is a batch of members and one of the reference, again from its start where short."""
        lam = self.settings.lam
        for i, rows in enumerate(self.members):
            j = i % len(self.reference)
            other = self.reference[j]
            self.body.model.zero_grad()
            _backward(self._mean_nll(i, rows).mean() * (1 - lam))
            if lam:
                _backward(self._mean_kl(j, other).mean() * lam)
            scorer.step()
            self.progress()
        self.body.model.zero_grad()
        return scorer.scores()

    def _mean_nll(self, _: int, rows: Rows) -> Tensor:
        """[B], each text's mean over its tokens."""
        return _means(self._nll(rows), rows)

    def _mean_kl(self, index: int, rows: Rows) -> Tensor:
        """[B], each text's mean over its tokens, of KL(initial || model)."""
        hidden, head = self._hidden(rows)
        assert self._base_head is not None
        ref = self._base[index].to(hidden.device)
        return _means(
            head_kl(hidden, head, ref, self._base_head, rows.row.to(hidden.device), self.settings.backend), rows
        )

    def _remember_base(self) -> None:
        """The initial model's hidden states on the reference texts, on the CPU, and its head."""
        self.weights.put(0)
        try:
            with torch.no_grad():
                self._base = [self._hidden(rows)[0].cpu() for rows in self.reference]
                head = LMHead(*self.body.live_head())
                bias = None if head.bias is None else head.bias.clone()
                self._base_head = head._replace(weight=head.weight.clone(), bias=bias)
        finally:
            self.weights.put(1)

    # -- forward passes

    def _nll(self, rows: Rows) -> Tensor:
        """[n] of the predicted tokens, with a graph."""
        hidden, head = self._hidden(rows)
        targets, owner = rows.targets.to(hidden.device), rows.row.to(hidden.device)
        return -head_logprob(hidden, head, targets, owner, self.settings.backend)

    def _hidden(self, rows: Rows) -> tuple[Tensor, LMHead]:
        """[n, d] in the head's dtype, and the head."""
        with self._cast():
            states = self.body.hidden(rows.ids.to(self.body.device), rows.mask.to(self.body.device))
            head = LMHead(*self.body.live_head())
        picked = states[rows.row.to(states.device), rows.column.to(states.device)]
        return picked.to(head.weight.dtype), head

    def _cast(self) -> AbstractContextManager[object]:
        dtype = self.settings.autocast
        return nullcontext() if dtype is None else torch.autocast(self.body.device.type, dtype=dtype)

    def _zeros(self, name: str) -> Tensor:
        parameter = self.weights.parameters[name]
        return torch.zeros(parameter.shape, dtype=sum_dtype(parameter.dtype), device=parameter.device)


def _means(x: Tensor, rows: Rows) -> Tensor:
    """[n] of tokens -> [B] of texts."""
    owner = rows.row.to(x.device)
    counts = owner.bincount(minlength=len(rows.ids)).to(x.dtype)
    return x.new_zeros(len(rows.ids)).index_add(0, owner, x) / counts


def _backward(loss: Tensor) -> None:
    """Where no parameter that wants a gradient was used, there is none."""
    if loss.requires_grad:
        loss.backward()


def rows_of(found: Sequence[Document], batch_size: int) -> list[Rows]:
    """Batches of texts of similar length; their order and padding change scores by rounding only."""
    longest = max(len(document.ids) for document in found)
    made = windows(found, range(len(found)), max(2, longest), 1)
    rows = []
    for batch in row_batches(found, made, batch_size):
        targets = torch.tensor([found[d].ids[t] for d, t in zip(batch.document, batch.token, strict=True)])
        rows.append(Rows(batch.ids, batch.mask, batch.row, batch.column, targets))
    return rows
