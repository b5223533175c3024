"""A language model's head, scored per sample without logits: against autograd, one sample at a time, in float64."""

import pytest
import torch
from torch import nn

from cwfast import SaliencyScorer
from cwfast.layers import heads
from cwfast.layers.heads import head_kl, head_logprob
from cwfast.reference import LMHead, lm_logits, lm_token_kl

V, D = 23, 6
OWNER = torch.tensor([2, 0, 0, 1, 2, 2, 0, 4])  # sample 3 has no row


class Head(nn.Module):
    """Tokens [B, T] -> an embedding, whose rows at some places meet a head."""

    def __init__(self, bias: bool, tied: bool, softcap: float | None, scale: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embedding = nn.Embedding(V, D, dtype=torch.float64)
        self.weight = self.embedding.weight if tied else nn.Parameter(torch.empty(V, D, dtype=torch.float64))
        self.bias = nn.Parameter(torch.empty(V, dtype=torch.float64)) if bias else None
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        self.softcap, self.scale = softcap, scale
        self.targets = torch.randint(V, (len(OWNER),), generator=generator)
        self.reference = torch.randn(len(OWNER), 4, generator=generator, dtype=torch.float64)
        self.reference_weight = torch.randn(V, 4, generator=generator, dtype=torch.float64)

    @property
    def head(self) -> LMHead:
        return LMHead(self.weight, self.bias, self.softcap, self.scale)

    @property
    def other(self) -> LMHead:
        return LMHead(self.reference_weight, None, self.softcap, self.scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[n, D]: the place of each row in its sample is how many rows of it came before."""
        place = torch.tensor([int((OWNER[:i] == OWNER[i]).sum()) for i in range(len(OWNER))])
        return self.embedding(ids)[OWNER, place]


@pytest.mark.parametrize("kind", ["logprob", "kl"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (1.5, -0.7)], ids=["", "capped"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_each_samples_gradient(monkeypatch, kind, bias, tied, softcap, scale, backend, criterion):
    monkeypatch.setattr(heads, "TILE", 40)  # several tiles, the last one smaller
    model = Head(bias, tied, softcap, scale)
    ids = torch.arange(15).reshape(5, 3) % 7

    def values(hidden, own):
        if own:
            z = lm_logits(hidden, model.head)
            if kind == "logprob":
                return z.log_softmax(-1).gather(1, model.targets[:, None])[:, 0]
            return lm_token_kl(hidden, model.head, model.reference, model.other)
        if kind == "logprob":
            return head_logprob(hidden, model.head, model.targets, OWNER, backend)
        return head_kl(hidden, model.head, model.reference, model.other, OWNER, backend)

    parameters = dict(model.named_parameters())
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    whole = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for sample in range(5):
        loss = (values(model(ids), True) * (sample == OWNER)).sum()
        for (name, parameter), gradient in zip(
            parameters.items(), torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True
        ):
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            whole[name] += gradient
            expected[name] += gradient.square() if criterion == "fisher" else (gradient * parameter.detach()).abs()

    scorer = SaliencyScorer(model, criterion=criterion, reduction="sum", norms=True)
    with scorer:
        values(model(ids), False).sum().backward()
        found = scorer.scores()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(parameters[name].grad, whole[name], rtol=1e-9, atol=1e-12)
    if criterion == "fisher":  # what is summed are squares
        torch.testing.assert_close(scorer.norms().square().sum(), sum(x.sum() for x in expected.values()))


def test_a_tensor_reduction_divides_each_sample(monkeypatch):
    monkeypatch.setattr(heads, "TILE", 40)
    model, ids = Head(True, False, None, 1.0), torch.arange(15).reshape(5, 3) % 7
    weights = torch.tensor([2.0, 0.5, 4.0, 1.0, 0.25], dtype=torch.float64)
    found = []
    for reduction, factor in (("sum", torch.ones_like(weights)), (weights, weights)):
        scorer = SaliencyScorer(model, reduction=reduction, grads=False)
        with scorer:
            logprob = head_logprob(model(ids), model.head, model.targets, OWNER, "cpu")
            (logprob * factor[OWNER]).sum().backward()
            found.append(scorer.scores())
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-9, atol=1e-12)


def test_without_a_scorer_it_is_the_op():
    model, ids = Head(True, False, None, 1.0), torch.arange(15).reshape(5, 3) % 7
    hidden = model(ids)
    plain = lm_logits(hidden, model.head).log_softmax(-1).gather(1, model.targets[:, None])[:, 0]
    torch.testing.assert_close(head_logprob(hidden, model.head, model.targets, OWNER), plain)
    kl = lm_token_kl(hidden, model.head, model.reference, model.other)
    torch.testing.assert_close(head_kl(hidden, model.head, model.reference, model.other, OWNER), kl)
