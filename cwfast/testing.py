"""For tests of kernels, ours and yours: backends that run here, guard bands, errors against float64, hostile scores."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cwfast import _backends, _checks

HOSTILE = (  # what hostile_scores makes
    "uniform",
    "few_values",
    "two_values",
    "all_equal",
    "all_zero",
    "mostly_zero",
    "signed_zeros",
    "subnormal",
    "infinite",
    "ascending",
    "descending",
    "scales",
)


def backends_here(op_backends: Sequence[str]) -> list[str]:
    """Those of an op's backends (``cwfast.ops.select.BACKENDS``, ...) that run on this machine."""
    have = _backends.backends()
    return [name for name in op_backends if have[name].available]


def guarded(tensor: Tensor, pad: int = 13) -> tuple[Tensor, Callable[[], None]]:
    """A copy of ``tensor`` amid guard bands of 0xFF bytes (NaN in every float dtype), and a check that they still are.

    Args:
        tensor: any dtype and shape. A dense one keeps its strides, another becomes contiguous.
        pad: entries before and behind. 13 leaves the copy aligned to its entries only, not to a vector.

    Returns:
        The copy, and a function without arguments that raises AssertionError if a guard band was written to.
    """
    strides = tensor.stride() if _checks.is_dense(tensor) else tensor.contiguous().stride()
    size = tensor.element_size()
    memory = torch.full(((tensor.numel() + 2 * pad) * size,), 0xFF, dtype=torch.uint8, device=tensor.device)
    copy = memory.view(tensor.dtype).as_strided(tensor.shape, strides, pad)
    copy.copy_(tensor)

    def check() -> None:
        for name, band in (("before", memory[: pad * size]), ("behind", memory[len(memory) - pad * size :])):
            touched = (band != 0xFF).nonzero().reshape(-1)
            assert len(touched) == 0, f"{len(touched)} bytes {name} the tensor were written, the first at {touched[0]}"

    return copy, check


def assert_no_worse(actual: Tensor, truth: Tensor, torch_result: Tensor, *, factor: float = 2.0) -> None:
    """The largest error of ``actual`` is at most ``factor`` times PyTorch's at the same computation, plus one rounding.

    Args:
        actual: what is tested.
        truth: the same computed in float64.
        torch_result: the same by plain PyTorch in the precision of ``actual``: how far off one may be. Where it is not
            finite, ``actual`` must be equal to it.
        factor: room for another order of summation.
    """
    assert actual.dtype == torch_result.dtype, f"dtype {actual.dtype}, but PyTorch gives {torch_result.dtype}"
    assert actual.shape == truth.shape == torch_result.shape, f"shape {actual.shape}, truth {truth.shape}"
    finite, rounding = torch_result.isfinite(), torch.finfo(torch_result.dtype).eps
    assert torch.equal(actual.isfinite(), finite), "other entries than PyTorch's are infinite or NaN"
    assert torch.equal(actual[~finite].nan_to_num(), torch_result[~finite].nan_to_num()), (
        "infinite or NaN entries differ"
    )
    actual, torch_result, truth = (x[finite].double() for x in (actual, torch_result, truth))
    if len(actual) == 0:
        return
    error, allowed = ((x - truth).abs().max() for x in (actual, torch_result))
    assert error <= factor * allowed + rounding * truth.abs().max(), (
        f"error {error:.3e} against float64; PyTorch's is {allowed:.3e}, and {factor} times that are allowed"
    )


def hostile_scores(kind: str, dtype: torch.dtype, numel: int, *, seed: int = 0) -> list[Tensor]:
    """Scores on which a selection may go wrong: one list of about ``numel`` entries in all.

    The list always has an empty tensor, one without dimensions, and transposed, sliced and expanded views.

    Args:
        kind: one of ``HOSTILE``.
        dtype: floating.
        numel: how many entries, but for the views' rounding.
        seed: of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    values = _values(kind, dtype, numel, generator)
    sizes = [1, 0, numel // 8, numel // 4, min(65, numel // 8)]
    scalar, empty, transposed, sliced, expanded, rest = values.tensor_split(torch.tensor(sizes).cumsum(0))
    return [
        scalar.reshape(()) if len(scalar) else scalar,
        empty.reshape(0, 3),
        transposed[: len(transposed) // 7 * 7].reshape(7, -1).T,
        sliced.repeat_interleave(2)[::2],
        expanded[:, None].expand(-1, 3),
        rest,
    ]


def _values(kind: str, dtype: torch.dtype, numel: int, generator: torch.Generator) -> Tensor:
    info = torch.finfo(dtype)
    uniform = torch.rand(numel, generator=generator, dtype=torch.float64)
    if kind == "few_values":
        uniform = (uniform * 5).floor()
    elif kind == "two_values":
        uniform = 1 + (uniform * 2).floor()
    elif kind == "all_equal":
        uniform = torch.full_like(uniform, 0.7)
    elif kind == "all_zero":
        uniform = torch.zeros_like(uniform)
    elif kind == "mostly_zero":
        uniform = torch.where(uniform < 0.995, 0, uniform)
    elif kind == "signed_zeros":
        uniform = torch.where(uniform < 0.4, -0.0, torch.where(uniform < 0.8, 0.0, uniform))
    elif kind == "subnormal":
        uniform = uniform * info.tiny * 1.5  # a third of them normal
    elif kind == "infinite":
        uniform = torch.where(uniform < 0.3, torch.inf, torch.where(uniform < 0.6, info.max, uniform))
    elif kind in ("ascending", "descending"):
        uniform = uniform.sort(descending=kind == "descending").values
    elif kind == "scales":  # layers of different size: each stretch has its own power of ten
        powers = torch.linspace(-7, 4 if dtype == torch.float16 else 30, 12, dtype=torch.float64)
        uniform = uniform * 10 ** powers.repeat_interleave(numel // 12 + 1)[:numel]
    elif kind != "uniform":
        raise ValueError(f"kind must be one of {HOSTILE}; got {kind!r}")
    return uniform.to(dtype)
