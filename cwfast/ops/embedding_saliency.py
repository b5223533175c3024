"""Per-sample gradient saliency of an embedding, accumulated: a sample's uses of a token sum before the absolute."""

import torch
from torch import Tensor

from cwfast import _backends, _checks, reference
from cwfast.ops import _embedding_device
from cwfast.ops._library import register, written

BACKENDS = ("reference", "cpu", "triton", "cuda")


def accumulate_embedding_saliency_(
    out: Tensor,
    indices: Tensor,
    grad_outputs: Tensor,
    *,
    power: int = 1,
    factor: Tensor | None = None,
    padding_idx: int | None = None,
    cu_seqlens: Tensor | None = None,
    grad: Tensor | None = None,
    overwrite_grad: bool = False,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Add ``|scale * factor|**power * sum_b |G_b|**power`` to ``out``, ``G_b[v] = sum_{t: indices[b,t] = v}
    grad_outputs[b,t]``.

    Work and memory follow the tokens, not the vocabulary (but ``overwrite_grad`` clears all of ``grad``). Sums in
    float32 (float64 for float64 ``out``), in the order of the tokens: same bits on every run. NaN and infinity
    propagate into the rows that they belong to.

    Args:
        out: ``[V, D]`` float32 or float64; changed in place; any strides.
        indices: ``[B]`` (one token a sample), ``[B, T]``, or ``[tokens]`` with ``cu_seqlens``; int32 or int64, from 0
            to V - 1.
        grad_outputs: the gradient of the loss at the lookup's result: the shape of indices, and D; float32, bfloat16,
            float16 or float64.
        power: 1 or 2.
        factor: ``[V, D]`` or None for 1.
        padding_idx: a row that is left as it is, or None.
        cu_seqlens: ``[B + 1]``, see ``accumulate_saliency_``.
        grad: ``[V, D]`` of the dtype of ``out``, any strides: ``sum_b G_b`` is added (no scale, no factor, nothing to
            the row ``padding_idx``).
        overwrite_grad: write the sum to ``grad`` instead, which may hold anything.
        scale: multiplies every ``G_b``.
        backend: "reference", "cpu", "triton", "cuda" or "auto".

    Returns:
        ``out``.

    Raises:
        TypeError, ValueError: an argument does not hold what is written above.
        BackendUnavailable: the named backend cannot run here.
    """
    _checks.tensor("out", out, dtypes=(torch.float32, torch.float64), ndim=(2,))
    _checks.tensor(
        "indices", indices, dtypes=(torch.int32, torch.int64), ndim=(1,) if cu_seqlens is not None else (1, 2)
    )
    _checks.tensor("grad_outputs", grad_outputs, dtypes=_checks.FLOATS)
    _checks.shape("grad_outputs", grad_outputs, (*indices.shape, out.shape[1]), "indices, then D of out")
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2; got {power!r}")
    if factor is not None:
        _checks.tensor("factor", factor, dtypes=_checks.FLOATS)
        _checks.shape("factor", factor, out.shape, "that of out")
    if grad is not None:
        _checks.tensor("grad", grad, dtypes=(out.dtype,))
        _checks.shape("grad", grad, out.shape, "that of out")
    _checks.same_device(out.device, indices=indices, grad_outputs=grad_outputs, factor=factor, grad=grad)
    for name, value in (("out", out), ("grad", grad)):
        if value is not None and any(n > 1 and step == 0 for n, step in zip(value.shape, value.stride(), strict=True)):
            raise ValueError(
                f"{name} is written, and no two of its entries may share memory; "
                f"got strides {value.stride()} for shape {tuple(value.shape)}"
            )
    if padding_idx is not None and not 0 <= padding_idx < len(out):
        raise ValueError(f"padding_idx must be a row of out, 0 to {len(out) - 1}; got {padding_idx}")
    low, high = (int(x) for x in indices.aminmax()) if indices.numel() else (0, -1)
    if low < 0 or high >= len(out):
        raise ValueError(f"indices must be rows of out, 0 to {len(out) - 1}; got {low} to {high}")
    owner = _owner(indices, cu_seqlens)
    torch.ops.cwfast.accumulate_embedding_saliency_(
        out.detach(),
        owner,
        indices.reshape(-1).to(torch.int64),
        grad_outputs.detach().reshape(indices.numel(), out.shape[1]),
        power,
        float(scale),
        None if factor is None else factor.detach(),
        -1 if padding_idx is None else padding_idx,
        backend,
        None if grad is None else grad.detach(),
        overwrite_grad,
    )
    return out


def _owner(indices: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The sample of each token, int64, ascending."""
    if cu_seqlens is None:
        samples = torch.arange(len(indices), device=indices.device)
        return samples if indices.ndim == 1 else samples.repeat_interleave(indices.shape[1])
    _checks.tensor("cu_seqlens", cu_seqlens, dtypes=(torch.int32, torch.int64), ndim=(1,))
    ends = cu_seqlens.to(indices.device, torch.int64)
    good = len(ends) > 0 and int(ends[0]) == 0 and int(ends[-1]) == len(indices) and bool((ends.diff() >= 0).all())
    if not good:
        raise ValueError(
            f"cu_seqlens must run from 0 to {len(indices)} (the tokens) without decreasing; got {ends[:8].tolist()}..."
        )
    return torch.repeat_interleave(torch.arange(len(ends) - 1, device=ends.device), ends.diff())


def _run(
    out: Tensor,
    owner: Tensor,
    indices: Tensor,
    grad_outputs: Tensor,
    power: int,
    scale: float,
    factor: Tensor | None,
    padding_idx: int,
    backend: str,
    grad: Tensor | None = None,
    overwrite_grad: bool = False,
) -> None:
    scale = abs(scale) ** power
    resolved = _backends.resolve(backend, out.device, BACKENDS)
    if resolved == "cpu":
        _kernel(out, owner, indices, grad_outputs, power, scale, factor, padding_idx, grad, overwrite_grad)
        return
    if grad is not None and overwrite_grad:
        grad.zero_()
    if resolved != "reference":
        _embedding_device.run(
            out, owner, indices, grad_outputs, power, scale, factor, padding_idx, grad, backend=resolved
        )
        return
    if padding_idx >= 0:
        kept = indices != padding_idx
        owner, indices, grad_outputs = owner[kept], indices[kept], grad_outputs[kept]
    if grad is not None:
        grad.index_add_(0, indices, grad_outputs.to(grad.dtype))
    reference.accumulate_embedding_saliency_(out, owner, indices, grad_outputs, power, scale, factor)


def _kernel(
    out: Tensor,
    owner: Tensor,
    indices: Tensor,
    grad_outputs: Tensor,
    power: int,
    scale: float,
    factor: Tensor | None,
    padding_idx: int,
    grad: Tensor | None,
    overwrite_grad: bool,
) -> None:
    native = _backends.native()
    owner, indices = owner.contiguous(), indices.contiguous()
    double = out.dtype == torch.float64
    run = native.accumulate_embedding_saliency_float64 if double else native.accumulate_embedding_saliency_float32

    def matrix(x: Tensor | None) -> tuple[object, ...]:
        if x is None:
            return 0, native.Dtype.float32, 0, 0
        return x.data_ptr(), getattr(native.Dtype, str(x.dtype).removeprefix("torch.")), *x.stride()

    run(
        matrix(out),
        matrix(grad),
        overwrite_grad,
        owner.data_ptr(),
        indices.data_ptr(),
        matrix(grad_outputs),
        matrix(factor),
        len(indices),
        *out.shape,
        padding_idx,
        power,
        scale,
    )
    written([out] if grad is None else [out, grad])


register(
    "accumulate_embedding_saliency_(Tensor(a!) out, Tensor owner, Tensor indices, Tensor grad_outputs, int power, "
    "float scale, Tensor? factor, int padding_idx, str backend, Tensor(b!)? grad=None, bool overwrite_grad=False) "
    "-> ()",
    _run,
    lambda *args, **kwargs: None,
)
