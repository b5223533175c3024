"""Per-row statistics of a classifier's logits: every signal that the attacks need."""

import torch
from torch import Tensor

from cwfast import _backends, _checks, reference
from cwfast.ops._library import register
from cwfast.reference import LogitStats

BACKENDS = ("reference", "cpu", "triton")


def logit_stats(logits: Tensor, labels: Tensor, *, backend: str = "auto") -> LogitStats:
    """Loss, confidence, phi, entropy, modified entropy, correctness and margin of each row.

    With ``p = softmax(z)``: ``loss = -log p_y``; ``confidence = p_y``; ``phi = z_y - logsumexp(z_c, c != y)``, which is
    ``log(p_y / (1 - p_y))`` without cancellation; ``entropy = -sum p log p``;
    ``modified_entropy = -(1 - p_y) log p_y - sum_{c != y} p_c log(1 - p_c)``, logarithms clipped at ``log 1e-30``;
    ``correct``: the label has the largest logit (ties: the lowest class); ``margin = z_y - max_{c != y} z_c``.
    In nats; a class with logit -inf has probability 0; N = 0 gives empty results. A row whose largest logit is not
    finite (NaN, +inf, or every class -inf) has no probabilities: its values are NaN, and it is not correct.

    Args:
        logits: ``[N, C]``, C at least 2, float32, bfloat16, float16 (computed in float32) or float64; any strides.
        labels: ``[N]`` int64, each in ``0 .. C - 1``.
        backend: "reference", "cpu", "triton" or "auto".

    Returns:
        ``LogitStats`` of tensors ``[N]``: float32 (float64 for float64), ``correct`` bool.

    Raises:
        TypeError, ValueError: an argument does not hold what is written above.
        BackendUnavailable: the named backend cannot run here.

    Source:
        phi: Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022, section V. Modified
        entropy: Song & Mittal, "Systematic Evaluation of Privacy Risks of Machine Learning Models", USENIX Security
        2021, eq. 7.
    """
    _checks.tensor("logits", logits, dtypes=_checks.FLOATS, ndim=(2,))
    _checks.tensor("labels", labels, dtypes=(torch.int64,), ndim=(1,))
    _checks.shape("labels", labels, logits.shape[:1], "one label per row of logits")
    _checks.same_device(logits.device, labels=labels)
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError(f"logits must have at least 2 classes; got shape {tuple(logits.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must lie in 0 .. {classes - 1}; got {int(labels.min())} to {int(labels.max())}")
    resolved = _backends.resolve(backend, logits.device, BACKENDS)
    return LogitStats(*torch.ops.cwfast.logit_stats(logits.detach(), labels, resolved))


def _run(logits: Tensor, labels: Tensor, backend: str) -> tuple[Tensor, ...]:
    if backend == "reference":
        return tuple(reference.logit_stats(logits, labels))
    stats = _empty(logits)
    labels = labels.contiguous()
    if backend == "triton":
        _backends.triton_kernels("logit_stats").logit_stats(logits, labels, stats)
        return tuple(stats)
    native = _backends.native()
    native.logit_stats(
        logits.data_ptr(),
        getattr(native.Dtype, str(logits.dtype).removeprefix("torch.")),
        *logits.shape,
        *logits.stride(),
        labels.data_ptr(),
        *(value.data_ptr() for value in stats),
    )
    return tuple(stats)


def _empty(logits: Tensor) -> LogitStats:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    dtypes = [torch.bool if name == "correct" else dtype for name in LogitStats._fields]
    return LogitStats(*(logits.new_empty(len(logits), dtype=dtype) for dtype in dtypes))


def _fake(logits: Tensor, labels: Tensor, backend: str) -> tuple[Tensor, ...]:
    return tuple(_empty(logits))


register(
    f"logit_stats(Tensor logits, Tensor labels, str backend) -> ({', '.join(['Tensor'] * len(LogitStats._fields))})",
    _run,
    _fake,
)
