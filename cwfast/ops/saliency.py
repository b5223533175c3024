"""Per-sample gradient saliency of a linear layer, accumulated without per-sample gradients in memory."""

import torch
from torch import Tensor

from cwfast import _backends, _checks, reference
from cwfast.ops._library import register, written

BACKENDS = ("reference", "cpu", "triton", "cuda")
TILE_BYTES = 1 << 20  # of a row tile of products that waits for its factor: product and factor stay in the cache


def accumulate_saliency_(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    *,
    power: int = 1,
    factor: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    grad: Tensor | None = None,
    overwrite_grad: bool = False,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Add ``|scale * factor|**power * sum_b |G_b|**power`` to ``out``, ``G_b = sum_t grad_outputs[b,t] x inputs[b,t]``.

    ``G_b`` is sample b's gradient of the weight ``W [O, I]`` of ``y = x W^T``; no ``[B, O, I]`` ever exists. NaN and
    infinity propagate as in a matrix product. Sums are float32 (float64 for float64), in a fixed order: same bits on
    every run for the same backend, machine and thread count. B, T, O and I may be 0.

    Args:
        out: ``[O, I]`` float32 (float64 where inputs are float64), dense and contiguous; changed in place.
        inputs: ``[B, I]`` (one row a sample), ``[B, T, I]``, or ``[tokens, I]`` with ``cu_seqlens``; float32,
            bfloat16, float16 or float64; any strides.
        grad_outputs: gradient of the loss at the layer's output: as ``inputs``, with O in place of I.
        power: 1 or 2.
        factor: ``[O, I]``, or None for 1: the weight (``|g w|``), or its distance from the initial weight.
        cu_seqlens: ``[B + 1]`` int32 or int64, from 0 to tokens, not decreasing: sample b owns the rows
            ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.
        grad: ``[O, I]`` of the dtype of ``out``, contiguous: the same pass adds ``sum_b G_b`` (no scale, no factor).
        overwrite_grad: write the sum to ``grad`` instead, which may hold anything.
        scale: multiplies every ``G_b`` (a mean loss over B samples has ``scale=B``).
        backend: "reference", "cpu", "triton", "cuda" or "auto".

    Returns:
        ``out``.

    Raises:
        TypeError, ValueError: an argument does not hold what is written above.
        BackendUnavailable: the named backend cannot run here.

    Source:
        Criterion |g w|: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019; used per
        weight by Fang & Kim, ICLR 2026. For T = 1, ``sum_b |d a| = |D|^T |A|``: one matrix product.
    """
    _check(out, inputs, grad_outputs, power, factor, cu_seqlens, grad)
    rows, offsets = _rows(inputs.detach(), grad_outputs.detach(), cu_seqlens)
    factor, grad = (None if x is None else x.detach() for x in (factor, grad))
    torch.ops.cwfast.accumulate_saliency_(
        out.detach(), *rows, offsets, power, float(scale), factor, grad, backend, overwrite_grad
    )
    return out


def _check(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    power: int,
    factor: Tensor | None,
    cu_seqlens: Tensor | None,
    grad: Tensor | None,
) -> None:
    _checks.tensor("inputs", inputs, dtypes=_checks.FLOATS, ndim=(2,) if cu_seqlens is not None else (2, 3))
    _checks.tensor("grad_outputs", grad_outputs, dtypes=(inputs.dtype,))
    accumulated = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    _checks.tensor("out", out, dtypes=(accumulated,), ndim=(2,))
    expected = (*inputs.shape[:-1], out.shape[0])
    _checks.shape("grad_outputs", grad_outputs, expected, "the leading dimensions of inputs, then O of out")
    _checks.shape("inputs", inputs, (*inputs.shape[:-1], out.shape[1]), "its last dimension is I of out")
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2; got {power!r}")
    for name, value in (("factor", factor), ("grad", grad)):
        if value is not None:
            _checks.tensor(name, value, dtypes=(accumulated,) if name == "grad" else _checks.FLOATS)
            _checks.shape(name, value, out.shape, "that of out")
    for name, value in (("out", out), ("grad", grad)):
        if value is not None and not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous; got strides {value.stride()} for shape {tuple(value.shape)}")
    _checks.same_device(out.device, inputs=inputs, grad_outputs=grad_outputs, factor=factor, grad=grad)
    if cu_seqlens is not None:
        _checks.tensor("cu_seqlens", cu_seqlens, dtypes=(torch.int32, torch.int64), ndim=(1,))


def _rows(inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor | None) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Inputs and output gradients as rows, and the int64 CPU row offsets of the samples."""
    if cu_seqlens is not None:
        offsets = cu_seqlens.to("cpu", torch.int64).contiguous()
        good = len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == len(inputs) and bool((offsets.diff() >= 0).all())
        if not good:
            raise ValueError(
                f"cu_seqlens must run from 0 to {len(inputs)} (the rows of inputs) without decreasing; "
                f"got {len(offsets)} values: {offsets[:8].tolist()}..."
            )
        return (inputs, grad_outputs), offsets
    steps = inputs.shape[1] if inputs.ndim == 3 else 1
    offsets = torch.arange(inputs.shape[0] + 1, dtype=torch.int64)
    rows = inputs.flatten(0, -2), grad_outputs.flatten(0, -2)
    return rows, offsets if steps == 1 else offsets * steps


def _run(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    row_offsets: Tensor,
    power: int,
    scale: float,
    factor: Tensor | None,
    grad: Tensor | None,
    backend: str,
    overwrite_grad: bool = False,
) -> None:
    scale = abs(scale) ** power
    resolved = _backends.resolve(backend, out.device, BACKENDS)  # here, where torch.compile does not look
    if overwrite_grad and grad is not None and resolved != "cpu":
        grad.zero_()
    if resolved == "reference":
        reference.accumulate_saliency_(out, inputs, grad_outputs, row_offsets.tolist(), power, scale, factor, grad)
    elif resolved == "triton":
        kernel = _backends.triton_kernels("saliency").accumulate_saliency_
        one = _one_row_each(row_offsets, len(inputs))
        kernel(out, inputs, grad_outputs, row_offsets, power, scale, factor, grad, one)
        written([out] if grad is None else [out, grad])
    elif resolved == "cuda":
        offsets = None if _one_row_each(row_offsets, len(inputs)) else row_offsets
        _cuda(out, inputs, grad_outputs, offsets, power, scale, factor, grad)
    elif _backends.native().isa() == "scalar" and _one_row_each(row_offsets, len(inputs)):
        _product(out, inputs.to(out.dtype), grad_outputs.to(out.dtype), power, scale, factor, grad, overwrite_grad)
    else:
        _kernel(
            out,
            inputs.to(out.dtype),
            grad_outputs.to(out.dtype),
            row_offsets,
            power,
            scale,
            factor,
            grad,
            overwrite_grad,
        )


def _one_row_each(row_offsets: Tensor, rows: int) -> bool:
    return len(row_offsets) == rows + 1 and bool((row_offsets.diff() == 1).all())


def _product(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    power: int,
    scale: float,
    factor: Tensor | None,
    grad: Tensor | None,
    overwrite_grad: bool,
) -> None:
    """T = 1: ``|D|^T |A|`` or ``(D^2)^T (A^2)``, a matrix product.

    torch's, because it uses vector instructions that our portable kernel lacks: that one takes six times as long.
    """
    if grad is not None:
        grad.addmm_(grad_outputs.T, inputs, beta=0 if overwrite_grad else 1)
    a, d = (inputs.abs(), grad_outputs.abs()) if power == 1 else (inputs.square(), grad_outputs.square())
    if factor is None:
        out.addmm_(d.T, a, alpha=scale)
        return
    rows = max(1, min(len(out), TILE_BYTES // max(1, out.shape[1] * out.element_size())))
    product, weight = (torch.empty((rows, out.shape[1]), dtype=out.dtype, device=out.device) for _ in range(2))
    for top in range(0, len(out), rows):
        count = min(rows, len(out) - top)
        tile, p, w = slice(top, top + count), product[:count], weight[:count]
        torch.mm(d[:, tile].T, a, out=p)
        w.copy_(factor[tile])
        out[tile].addcmul_(p, w.abs_() if power == 1 else w.square_(), value=scale)


def _kernel(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    row_offsets: Tensor,
    power: int,
    scale: float,
    factor: Tensor | None,
    grad: Tensor | None,
    overwrite_grad: bool,
) -> None:
    inputs, grad_outputs = _dense_rows(inputs), _dense_rows(grad_outputs)
    factor = None if factor is None else factor.to(out.dtype).contiguous()
    native = _backends.native()
    run = native.accumulate_saliency_float64 if out.dtype == torch.float64 else native.accumulate_saliency_float32
    try:
        run(
            out.data_ptr(),
            inputs.data_ptr(),
            grad_outputs.data_ptr(),
            inputs.stride(0),
            grad_outputs.stride(0),
            row_offsets.data_ptr(),
            len(row_offsets) - 1,
            out.shape[0],
            out.shape[1],
            power,
            scale,
            0 if factor is None else factor.data_ptr(),
            0 if grad is None else grad.data_ptr(),
            overwrite_grad,
        )
    finally:  # also after Ctrl-C, which leaves some entries written
        written([out] if grad is None else [out, grad])


def _dense_rows(rows: Tensor) -> Tensor:
    """Rows that may lie any distance apart, each without gaps."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _cuda(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    row_offsets: Tensor | None,
    power: int,
    scale: float,
    factor: Tensor | None,
    grad: Tensor | None,
) -> None:
    """``row_offsets`` None: every row is a sample."""
    dtype = _backends.cuda_dtype("accumulate_saliency_", inputs.dtype)
    inputs, grad_outputs = _dense_rows(inputs), _dense_rows(grad_outputs)
    if factor is not None:
        factor = (factor if factor.dtype in _backends.CUDA_DTYPES else factor.float()).contiguous()
    offsets = None if row_offsets is None else row_offsets.to(out.device)
    _backends.native().cuda_saliency(
        out.data_ptr(),
        inputs.data_ptr(),
        inputs.stride(0),
        grad_outputs.data_ptr(),
        grad_outputs.stride(0),
        0 if offsets is None else offsets.data_ptr(),
        0 if offsets is None else len(offsets) - 1,
        len(inputs),
        *out.shape,
        dtype,
        power,
        scale,
        0 if factor is None else factor.data_ptr(),
        0 if factor is None else _backends.CUDA_DTYPES.index(factor.dtype),
        0 if grad is None else grad.data_ptr(),
        out.device.index or 0,
        _backends.cuda_stream(out.device),
    )
    written([out] if grad is None else [out, grad])


register(
    "accumulate_saliency_(Tensor(a!) out, Tensor inputs, Tensor grad_outputs, Tensor row_offsets, int power, "
    "float scale, Tensor? factor, Tensor(b!)? grad, str backend, bool overwrite_grad=False) -> ()",
    _run,
    lambda *args, **kwargs: None,
)
