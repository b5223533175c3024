"""Training losses that preserve privacy. Each is ``loss(logits [B, C], targets [B], *, epoch) -> scalar``, in nats, and
works inside ``torch.func.vmap``."""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

FORMS = ("ccel", "ccql", "focal", "focal_ccel")


class _Settings:
    """Shows itself as the call that makes it."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


class RelaxLoss(_Settings):
    """Holds the mean loss at ``alpha`` and flattens what is predicted beside the label.

    With L the batch mean of ``l_i = -log p_i[y_i]``: even epochs ``|L - alpha|``; odd epochs L where ``L > alpha``,
    else ``mean_i [(1 - correct_i) * CE(soft target_i, p_i) - l_i]``, the soft target being
    ``q_i = clamp(p_i[y_i], 0, upper)`` at the label and ``(1 - q_i) / (C - 1)`` elsewhere. The gradient flows through
    q, as in the authors' code.

    Args:
        alpha: target of the mean loss, at least 0. Published for training from scratch: 1.0 on CIFAR-10 and 3.0 on
            CIFAR-100, by a ResNet20; 0.8 with ``upper=0.3`` on Purchase100.
        upper: largest probability that a soft target gives the label, in (0, 1].

    Source:
        Chen, Yu & Fritz, "RelaxLoss: Defending Membership Inference Attacks without Losing Utility", ICLR 2022, alg. 1.
    """

    def __init__(self, alpha: float, upper: float = 1.0) -> None:
        if not (alpha >= 0 and 0 < upper <= 1):
            raise ValueError(f"alpha must be at least 0 and upper in (0, 1]; got {alpha} and {upper}")
        self.alpha, self.upper = alpha, upper

    def __call__(self, logits: Tensor, targets: Tensor, *, epoch: int = 0) -> Tensor:
        losses = functional.cross_entropy(logits, targets, reduction="none")
        mean = losses.mean()
        if epoch % 2 == 0:
            return (mean - self.alpha).abs()
        log_p = functional.log_softmax(logits, dim=1)
        flat = -(relaxed_targets(log_p, targets, self.upper) * log_p).sum(dim=1)
        correct = (logits.argmax(dim=1) == targets).to(log_p.dtype)
        return torch.where(mean > self.alpha, mean, ((1 - correct) * flat - losses).mean())  # per model of a stack


class HAMP(_Settings):
    """Soft labels of high entropy, and a reward for entropy: the training half of HAMP.

    ``KL(soft label || p) - alpha * mean_i H(p_i)``. The label's probability is lowered from 1 in steps of 0.01, the
    rest shared by the other classes, until the entropy is at least ``gamma * log C``. The KL is divided by B * C, as
    the authors' code has it; ``batchmean`` divides it by B. For the other half, at test time, see ``HAMPOutputs``.

    Args:
        gamma: share of the largest entropy, in (0, 1).
        alpha: weight of the entropy, at least 0. Published pairs (gamma, alpha): 0.95, 0.001 on CIFAR-10; 0.5, 0.005 on
            CIFAR-100; 0.8, 0.01 on Purchase100; all with a learning rate of 0.5 or 1, which the division by C needs.
        reduction: of the KL, "mean" over B * C, or "batchmean" over B.

    Raises:
        ValueError: an argument is out of range; on a call, no step reaches the entropy.

    Source:
        Chen & Pattabiraman, "Overconfidence is a Dangerous Thing: Mitigating Membership Inference Attacks by Enforcing
        Less Confident Prediction", NDSS 2024, and its code.
    """

    def __init__(self, gamma: float = 0.95, alpha: float = 0.001, *, reduction: str = "mean") -> None:
        if not (0 < gamma < 1 and alpha >= 0):
            raise ValueError(f"gamma must be in (0, 1) and alpha at least 0; got {gamma} and {alpha}")
        if reduction not in ("mean", "batchmean"):
            raise ValueError(f"reduction must be 'mean' or 'batchmean'; got {reduction!r}")
        self.gamma, self.alpha, self.reduction = gamma, alpha, reduction

    def __call__(self, logits: Tensor, targets: Tensor, *, epoch: int = 0) -> Tensor:
        log_p = functional.log_softmax(logits, dim=1)
        label = one_hot(targets, log_p)
        top, rest = soft_label(self.gamma, logits.shape[1])
        soft = top * label + rest * (1 - label)
        entropy = -(log_p.exp() * log_p).sum(dim=1).mean()
        kl = (soft * (soft.log() - log_p)).sum(dim=1).mean()
        return (kl / logits.shape[1] if self.reduction == "mean" else kl) - self.alpha * entropy


@functools.cache
def soft_label(gamma: float, classes: int) -> tuple[float, float]:
    """HAMP's probabilities of the label and of each other class.

    Raises:
        ValueError: the entropy wanted is reached by no step while the label keeps the largest probability.
    """
    top, rest, step = 1.0, 0.0, 0.01
    while True:
        top, rest = top - step, rest + step / (classes - 1)  # rounding errors add up as in the authors' loop
        if top <= rest:
            raise ValueError(f"gamma must leave the label the largest of {classes} probabilities; got {gamma}")
        if -top * math.log(top) - (classes - 1) * rest * math.log(rest) >= gamma * math.log(classes):
            return top, rest


class ConvexConcave(_Settings):
    """A convex loss less a concave one, whose gradient wanes as samples are learned: their losses spread out.

    With ``l`` the cross-entropy of a sample and ``p = exp(-l)``, the mean of, times ``beta``:
    "ccel" ``alpha l - (1 - alpha) exp(p)``; "ccql" ``alpha l - (1 - alpha) (p + p^2 / 2)``; "focal"
    ``(1 - p)^alpha l``; "focal_ccel" ``alpha (1 - p)^gamma l - (1 - alpha) exp(p)``. The authors' code adds the last
    term of "focal_ccel" instead, which makes it convex: their formula is followed here, not that line.

    Args:
        form: one of the four.
        alpha: weight of the convex part, 0 .. 1; the exponent of "focal", at least 0.
        beta: factor of the whole, above 0. The authors train ResNets with 0.05 at a learning rate of 0.1.
        gamma: exponent of "focal_ccel", at least 0.

    Source:
        Liu, Feng, Zhuang, Cao & Wei, "Mitigating Privacy Risk in Membership Inference by Convex-Concave Loss", ICML
        2024, and its code.
    """

    def __init__(self, form: str = "ccel", alpha: float = 0.5, beta: float = 1.0, *, gamma: float = 1.0) -> None:
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
        if not (alpha >= 0 and (alpha <= 1 or form == "focal")):
            raise ValueError(f"alpha must lie between 0 and 1, or be at least 0 for 'focal'; got {alpha} for {form!r}")
        if not (beta > 0 and gamma >= 0):
            raise ValueError(f"beta must be above 0 and gamma at least 0; got {beta} and {gamma}")
        self.form, self.alpha, self.beta, self.gamma = form, alpha, beta, gamma

    def __call__(self, logits: Tensor, targets: Tensor, *, epoch: int = 0) -> Tensor:
        losses = functional.cross_entropy(logits, targets, reduction="none")
        if self.form == "focal":
            return self.beta * _focal(losses, self.alpha).mean()
        convex = _focal(losses, self.gamma) if self.form == "focal_ccel" else losses
        p = (-losses).exp()
        concave = p + p.square() / 2 if self.form == "ccql" else p.exp()
        return self.beta * (self.alpha * convex - (1 - self.alpha) * concave).mean()


def _focal(losses: Tensor, exponent: float) -> Tensor:
    away = -torch.expm1(-losses)  # 1 - p, of which the clamp keeps a power below 1 differentiable at 0
    return away.clamp(min=torch.finfo(losses.dtype).tiny).pow(exponent) * losses


class LabelSmoothing(_Settings):
    """Cross-entropy with ``1 - epsilon + epsilon / C`` as the label's probability, ``epsilon / C`` as every other's.

    Args:
        epsilon: in 0 .. 1.

    Source:
        Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016. It can raise the leak: Kaya & Dumitras,
        "When Does Data Augmentation Help With Membership Inference Attacks?", ICML 2021.
    """

    def __init__(self, epsilon: float = 0.1) -> None:
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon must lie between 0 and 1; got {epsilon}")
        self.epsilon = epsilon

    def __call__(self, logits: Tensor, targets: Tensor, *, epoch: int = 0) -> Tensor:
        log_p = functional.log_softmax(logits, dim=1)
        losses = functional.cross_entropy(logits, targets)
        return (1 - self.epsilon) * losses - self.epsilon * log_p.mean()


class ConfidencePenalty(_Settings):
    """Cross-entropy less ``beta`` times the entropy of the prediction, mean over the batch.

    Args:
        beta: at least 0.

    Source:
        Pereyra et al., "Regularizing Neural Networks by Penalizing Confident Output Distributions", 2017.
    """

    def __init__(self, beta: float = 0.1) -> None:
        if not beta >= 0:
            raise ValueError(f"beta must be at least 0; got {beta}")
        self.beta = beta

    def __call__(self, logits: Tensor, targets: Tensor, *, epoch: int = 0) -> Tensor:
        log_p = functional.log_softmax(logits, dim=1)
        return functional.cross_entropy(logits, targets) + self.beta * (log_p.exp() * log_p).sum(dim=1).mean()


def one_hot(targets: Tensor, like: Tensor) -> Tensor:
    """``[B, C]`` of the dtype of ``like [B, C]``; torch's own fails under ``vmap`` of ``grad``."""
    return (targets[:, None] == torch.arange(like.shape[1], device=like.device)).to(like.dtype)


def relaxed_targets(log_p: Tensor, targets: Tensor, upper: float) -> Tensor:
    """``[B, C]``: ``q = clamp(p[y], 0, upper)`` at the label, ``(1 - q) / (C - 1)`` elsewhere; q is not detached."""
    label = one_hot(targets, log_p)
    q = (log_p * label).sum(dim=1).exp().clamp(0, upper)[:, None]
    return q * label + (1 - q) / (log_p.shape[1] - 1) * (1 - label)


def soft_cross_entropy(logits: Tensor, targets: Tensor, *, epoch: int = 0) -> Tensor:
    """Mean cross-entropy with targets that are probabilities, ``[B, C]``, in nats."""
    return -(targets * functional.log_softmax(logits, dim=1)).sum(dim=1).mean()
