"""Training losses that preserve privacy. Each is ``loss(logits [B, C], targets [B], *, epoch) -> scalar``, in nats, and
works inside ``torch.func.vmap``."""

import torch
from torch import Tensor
from torch.nn import functional


class RelaxLoss:
    """Holds the mean loss at ``alpha`` and flattens what is predicted beside the label.

    With L the batch mean of ``l_i = -log p_i[y_i]``: even epochs ``|L - alpha|``; odd epochs L where ``L > alpha``,
    else ``mean_i [(1 - correct_i) * CE(soft target_i, p_i) - l_i]``, the soft target being
    ``q_i = clamp(p_i[y_i], 0, upper)`` at the label and ``(1 - q_i) / (C - 1)`` elsewhere. The gradient flows through
    q, as in the authors' code.

    Args:
        alpha: target of the mean loss, at least 0.
        upper: largest probability that a soft target gives the label, in (0, 1].

    Source:
        Chen, Yu & Fritz, "RelaxLoss: Defending Membership Inference Attacks without Losing Utility", ICLR 2022, alg. 1.
    """

    def __init__(self, alpha: float, upper: float = 1.0) -> None:
        if alpha < 0 or not 0 < upper <= 1:
            raise ValueError(f"alpha must be at least 0 and upper in (0, 1]; got {alpha} and {upper}")
        self.alpha, self.upper = alpha, upper

    def __repr__(self) -> str:
        return f"RelaxLoss(alpha={self.alpha}, upper={self.upper})"

    def __call__(self, logits: Tensor, targets: Tensor, *, epoch: int = 0) -> Tensor:
        losses = functional.cross_entropy(logits, targets, reduction="none")
        mean = losses.mean()
        if epoch % 2 == 0:
            return (mean - self.alpha).abs()
        classes = logits.shape[1]
        log_p = functional.log_softmax(logits, dim=1)
        label = functional.one_hot(targets, classes).to(log_p.dtype)
        q = (log_p * label).sum(dim=1).exp().clamp(0, self.upper)[:, None]
        soft = q * label + (1 - q) / (classes - 1) * (1 - label)
        correct = (logits.argmax(dim=1) == targets).to(log_p.dtype)
        flat = ((1 - correct) * -(soft * log_p).sum(dim=1) - losses).mean()
        return torch.where(mean > self.alpha, mean, flat)  # per model of a stacked fleet
