"""Token records and nine attacks over them, against a script that reads one text at a time and makes its logits."""

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from cwfast.benchmarks import _harness
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from cwfast import llm
from cwfast.llm.pairs import WINDOWS

ATTACKS = ("loss", "min_k", "min_k_pp", "surp", "reference", "ratio", "ez_mia", "wbc", "informia")
Scores = dict[str, np.ndarray]


class _Layer(nn.Module):
    """Attention and a gated MLP, as in Llama; positions are left out, which no time here depends on."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.heads, hidden = heads, width * 8 // 3
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(rows, length, width))
        gate, value = self.up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * value)


class _Model(nn.Module):
    """A decoder with what ``records`` asks of a model of transformers; pads are on the right, where none sees them."""

    def __init__(self, vocabulary: int, width: int, layers: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.norm = nn.Embedding(vocabulary, width), nn.RMSNorm(width)
        self.layers = nn.ModuleList(_Layer(width, width // 64 or 1) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.head.weight, std=3 / width**0.5)
        self.config: Any = SimpleNamespace(max_position_embeddings=2048)
        self.config.to_json_string = lambda use_diff: json.dumps([vocabulary, width, layers])

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(self.norm(x)))


def _problem(vocabulary: int, width: int, layers: int, texts: int, longest: int) -> tuple[_Model, _Model, list[Any]]:
    """A model, its reference, and texts of a quarter to all of the longest length."""
    model, reference = (_Model(vocabulary, width, layers, seed).eval() for seed in (0, 1))
    lengths = torch.linspace(longest / 4, longest, texts).long().tolist()
    return model, reference, [torch.randint(vocabulary, (length,)).tolist() for length in lengths]


def _cwfast(model: _Model, reference: _Model, rows: list[Any]) -> Scores:
    found = llm.records(model, None, rows, reference=reference, kl=True)
    return {name: llm.attack(name, found) for name in ATTACKS}


@torch.no_grad()
def _batch_one(model: _Model, reference: _Model, rows: list[Any]) -> Scores:
    """What one would write: logits of one text by both models, then each attack's definition."""
    each = [_of_text(model, reference, torch.tensor(row)) for row in rows]
    return {name: np.array([one[i] for one in each]) for i, name in enumerate(ATTACKS)}


def _of_text(model: _Model, reference: _Model, ids: Tensor) -> list[float]:
    given = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None]), "use_cache": False}
    logp, other = (m(**given).logits[0, :-1].log_softmax(dim=1) for m in (model, reference))
    target = ids[1:, None]
    own, ref, p = logp.gather(1, target)[:, 0], other.gather(1, target)[:, 0], logp.exp()
    mean = (p * logp).sum(dim=1)
    deviation = ((p * logp.square()).sum(dim=1) - mean.square()).sqrt()
    fewest = max(1, int(0.2 * len(own)))
    lowest = own.sort(stable=True)
    sure = lowest.values[:fewest][-mean[lowest.indices[:fewest]] < 2.0]
    gain = (own - ref).double()
    wrong = (logp.argmax(dim=1) != ids[1:]) & (torch.arange(len(own)) > 0)
    up, down = (part[wrong].clamp(min=0).sum() + 1e-12 for part in (gain, -gain))
    won = [(gain.unfold(0, min(w, len(gain)), 1).sum(dim=1) > 0).double().mean() for w in WINDOWS]
    kl = (other.exp() * (other - logp)).sum(dim=1)
    found = [
        own.mean(),
        lowest.values[:fewest].mean(),
        ((own - mean) / deviation).sort().values[:fewest].mean(),
        sure.mean() if len(sure) else -100.0,
        gain.mean(),
        own.mean() / -ref.mean(),
        (up / down).log() if wrong.sum() >= 2 else 0.0,
        sum(won) / len(won),
        (own - ref + kl).mean(),
    ]
    return [float(one) for one in found]


_WAYS: dict[str, Callable[..., Scores]] = {"cwfast": _cwfast, "batch_one": _batch_one}


def memory(way: str, *size: int) -> Iterator[None]:
    """For peak_memory."""
    _WAYS[way](*_problem(64, 64, 1, 4, 16))
    given = _problem(*size)
    yield
    found = _WAYS[way](*given)
    assert found


def test_audit_llm(benchmark: BenchmarkFixture) -> None:
    """Both models' pass over all texts and every score; the script's scores must be ours."""
    size = _harness.by_size(
        tiny=(512, 64, 1, 6, 16), normal=(32_000, 576, 6, 32, 128), full=(49_152, 576, 30, 100, 128)
    )
    given = _problem(*size)
    scores, expected = (way(*given) for way in _WAYS.values())
    for name in ATTACKS:
        np.testing.assert_allclose(scores[name], expected[name], rtol=2e-3, atol=2e-3, err_msg=name)
    variants = {name: lambda way=way: way(*given) for name, way in _WAYS.items()}
    times = _harness.interleaved(variants, _harness.by_size(tiny=1, normal=3, full=3))
    peaks = {way: _harness.peak_memory(memory, way, *size) for way in _WAYS}
    vocabulary, width, layers, texts, longest = size
    case = f"audit llm V={vocabulary} {texts} texts"
    facts = {"width": width, "layers": layers, "longest": longest, "attacks": len(ATTACKS), "bytes": peaks}
    ratios = {"times_batch_one": _harness.ratio(times, "batch_one", "cwfast")}
    _harness.report(benchmark, case, times, variants["cwfast"], ratios=ratios, **facts)
