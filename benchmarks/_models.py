"""The models that saliency is measured on: each with a batch, at two sizes, the same bits whenever it is made."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from cwfast.benchmarks import _harness
from torch import Tensor, nn
from torch.nn import functional


class Problem(NamedTuple):
    """A model and its batch; the first dimension of x and y holds the samples."""

    model: nn.Module
    x: Tensor
    y: Tensor


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean over samples (and steps) of the cross entropy."""
    return functional.cross_entropy(model(x).flatten(0, -2).float(), y.flatten())


class Mean(nn.Module):
    """The mean over the steps of a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, F] -> [B, F]``."""
        return x.mean(dim=1)


class Block(nn.Module):
    """A Llama layer: RMSNorm, causal grouped-query attention with rotary positions, RMSNorm, SwiGLU."""

    def __init__(self, width: int, heads: int, groups: int, inner: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.norm, self.norm_inner = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to the same."""
        h = self.norm(x)
        q = self._rotated(self._split(self.q(h), self.heads))
        k = self._rotated(self._split(self.k(h), self.groups)).repeat_interleave(self.heads // self.groups, dim=1)
        v = self._split(self.v(h), self.groups).repeat_interleave(self.heads // self.groups, dim=1)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.norm_inner(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.size)).transpose(1, 2)

    def _rotated(self, x: Tensor) -> Tensor:
        half = self.size // 2
        frequencies = 10000.0 ** (-torch.arange(half, device=x.device) / half)
        angles = torch.arange(x.shape[-2], device=x.device)[:, None] * frequencies
        cos, sin, left, right = angles.cos().to(x.dtype), angles.sin().to(x.dtype), x[..., :half], x[..., half:]
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def _linear_stack(tiny: bool, *leading: int) -> Problem:
    narrow, wide = (48, 96) if tiny else (1024, 4096)
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((narrow, wide), (wide, narrow), (narrow, wide), (wide, narrow)):
        layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
    return Problem(nn.Sequential(*layers[:-1]), torch.randn(*leading, narrow), torch.randint(narrow, leading))


def seq(tiny: bool, samples: int | None = None) -> Problem:
    """4 linear layers 1024-4096-1024-4096-1024, 16 sequences of 128 steps."""
    return _linear_stack(tiny, samples or (4 if tiny else 16), 8 if tiny else 128)


def mlp(tiny: bool, samples: int | None = None) -> Problem:
    """The same layers, 64 samples of one row."""
    return _linear_stack(tiny, samples or (8 if tiny else 64))


def conv(tiny: bool, samples: int | None = None) -> Problem:
    """3 convolutions 3x3, 64-128-128-256, the last one with stride 2, of 32 x 32 pixels, and a linear layer; B = 16."""
    a, b, c, pixels = (4, 8, 8, 8) if tiny else (64, 128, 256, 32)
    model = nn.Sequential(
        nn.Conv2d(a, b, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(b, b, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(b, c, 3, padding=1, stride=2),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(c, 10),
    )
    count = samples or (4 if tiny else 16)
    return Problem(model, torch.randn(count, a, pixels, pixels), torch.randint(10, (count,)))


def embedding(tiny: bool, samples: int | None = None) -> Problem:
    """A vocabulary of 50,000 with 128 features, the mean over 64 tokens and a small linear layer; B = 32."""
    words, width, steps = (100, 8, 6) if tiny else (50_000, 128, 64)
    count = samples or (4 if tiny else 32)
    model = nn.Sequential(nn.Embedding(words, width), Mean(), nn.Linear(width, 20))
    return Problem(model, torch.randint(words, (count, steps)), torch.randint(20, (count,)))


def llama(tiny: bool, samples: int | None = None) -> Problem:
    """A Llama layer of width 512 with 8 heads in 2 groups and 1408 inner features, 8 sequences of 128 steps."""
    width, heads, groups, inner, steps = (32, 4, 2, 48, 8) if tiny else (512, 8, 2, 1408, 128)
    leading = samples or (4 if tiny else 8), steps
    return Problem(Block(width, heads, groups, inner), torch.randn(*leading, width), torch.randint(width, leading))


CASES: dict[str, Callable[..., Problem]] = {f.__name__: f for f in (seq, mlp, conv, embedding, llama)}


def problem(case: str, samples: int | None = None, *, tiny: bool | None = None) -> Problem:
    """A fresh model of the case and its batch.

    Args:
        case: of ``CASES``.
        samples: another batch size.
        tiny: None: as this run's size says.
    """
    torch.manual_seed(0)
    return CASES[case](_harness.size() == "tiny" if tiny is None else tiny, samples)
