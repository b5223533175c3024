"""Each loss against its formula, one number after the other; in a stack as alone; its limits."""

import math

import pytest
import torch
from test_training import blobs, ids_of, network
from torch.nn import functional

from cwfast.data import Dataset
from cwfast.defense import CRL
from cwfast.defense.losses import (
    HAMP,
    ConfidencePenalty,
    ConvexConcave,
    LabelSmoothing,
    RelaxLoss,
    soft_cross_entropy,
    soft_label,
)
from cwfast.training import Recipe, Task, train_many

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 2])
LOSSES = [
    RelaxLoss(0.7),
    HAMP(0.9, 0.1),
    HAMP(0.5, reduction="batchmean"),
    ConvexConcave(),
    ConvexConcave("ccql", 0.3, 2.0),
    ConvexConcave("focal", 2.0),
    ConvexConcave("focal", 0.5),
    ConvexConcave("focal_ccel", 0.6, gamma=1.5),
    LabelSmoothing(0.2),
    ConfidencePenalty(0.3),
]


def probabilities():
    return [[math.exp(z) / sum(math.exp(q) for q in row) for z in row] for row in LOGITS.tolist()]


def mean_of(per_sample):
    """Over the samples, of a function of the probabilities and the label."""
    rows = zip(probabilities(), LABELS.tolist(), strict=True)
    return sum(per_sample(row, label) for row, label in rows) / len(LABELS)


def entropy(p):
    return -sum(x * math.log(x) for x in p)


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
@pytest.mark.parametrize(("gamma", "alpha"), [(0.95, 0.0), (0.5, 0.3)])
def test_hamp_equals_the_formula(gamma, alpha, reduction):
    steps = next(
        n for n in range(1, 100) if entropy([1 - n / 100, n / 200, n / 200]) >= gamma * math.log(3)
    )  # hundredths taken from the label
    soft = [steps / 200, steps / 200, steps / 200]

    def per_sample(p, label):
        target = [1 - steps / 100 if c == label else soft[c] for c in range(3)]
        kl = sum(t * math.log(t / x) for t, x in zip(target, p, strict=True))
        return kl / (3 if reduction == "mean" else 1) - alpha * entropy(p)

    found = HAMP(gamma, alpha, reduction=reduction)(LOGITS, LABELS)
    assert float(found) == pytest.approx(mean_of(per_sample), rel=1e-12)


def test_hamp_is_the_authors_expression():
    """As their code computes it, with torch's own divergence."""
    top, rest = soft_label(0.9, 3)
    soft = torch.full((3, 3), rest, dtype=torch.float64).scatter(1, LABELS[:, None], top)
    log_p = functional.log_softmax(LOGITS, dim=1)
    h = torch.distributions.Categorical(logits=LOGITS).entropy()
    with pytest.warns(UserWarning, match="batchmean"):
        expected = functional.kl_div(log_p, soft, reduction="mean") - 0.1 * h.mean()
    torch.testing.assert_close(HAMP(0.9, 0.1)(LOGITS, LABELS), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("gamma", "classes"), [(0.95, 10), (0.5, 100), (0.8, 100), (0.9, 2)])
def test_the_soft_label_is_the_first_hundredth_that_reaches_the_entropy(gamma, classes):
    top, rest = soft_label(gamma, classes)
    assert top + (classes - 1) * rest == pytest.approx(1)
    assert top > rest > 0
    wanted = gamma * math.log(classes)
    assert entropy([top] + [rest] * (classes - 1)) >= wanted
    before = (1 - top - 0.01) / (classes - 1)
    assert entropy([top + 0.01] + [before] * (classes - 1)) < wanted
    assert 100 * top == pytest.approx(round(100 * top))


def test_an_entropy_that_no_hundredth_reaches_is_refused():
    with pytest.raises(ValueError, match=r"gamma must leave the label the largest of 3 probabilities; got 0\.99999"):
        HAMP(0.99999)(LOGITS, LABELS)


@pytest.mark.parametrize(
    ("loss", "per_loss"),
    [
        (ConvexConcave("ccel", 0.3, 2.0), lambda x: 2 * (0.3 * x - 0.7 * math.exp(math.exp(-x)))),
        (ConvexConcave("ccql", 0.3, 2.0), lambda x: 2 * (0.3 * x - 0.7 * (math.exp(-x) + math.exp(-2 * x) / 2))),
        (ConvexConcave("focal", 2.5, 0.5), lambda x: 0.5 * (1 - math.exp(-x)) ** 2.5 * x),
        (
            ConvexConcave("focal_ccel", 0.3, 2.0, gamma=1.5),
            lambda x: 2 * (0.3 * (1 - math.exp(-x)) ** 1.5 * x - 0.7 * math.exp(math.exp(-x))),
        ),
    ],
    ids=lambda value: getattr(value, "form", ""),
)
def test_convex_concave_equals_the_formula(loss, per_loss):
    expected = mean_of(lambda p, label: per_loss(-math.log(p[label])))
    assert float(loss(LOGITS, LABELS)) == pytest.approx(expected, rel=1e-12)


def test_the_concave_part_is_concave_and_its_gradient_wanes_with_the_loss():
    """The point of the method: a sample that is learned well pulls less per unit of loss than with cross-entropy."""
    for form in ("ccel", "ccql"):
        gradients = []
        for z in (0.5, 2.0, 5.0):
            logits = torch.tensor([[z, 0.0]], dtype=torch.float64, requires_grad=True)
            (grad,) = torch.autograd.grad(ConvexConcave(form, 0.0)(logits, torch.tensor([0])), logits)
            (plain,) = torch.autograd.grad(functional.cross_entropy(logits, torch.tensor([0])), logits)
            gradients.append(float(grad[0, 0] / plain[0, 0]))
        assert gradients[0] < gradients[1] < gradients[2]  # d/dl of the concave part falls with l = grows with p
        assert min(gradients) > 0


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_focal_stays_finite_where_a_sample_is_learned_completely(exponent):
    logits = torch.tensor([[200.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = ConvexConcave("focal", exponent)(logits, torch.tensor([0, 0]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[0].any()


def test_label_smoothing_and_confidence_penalty_equal_their_formulas():
    smooth = LabelSmoothing(0.3)(LOGITS, LABELS)
    expected = mean_of(
        lambda p, label: -sum((0.7 * (c == label) + 0.1) * math.log(x) for c, x in enumerate(p))  # 0.3 / 3 each
    )
    assert float(smooth) == pytest.approx(expected, rel=1e-12)
    assert float(smooth) == pytest.approx(float(functional.cross_entropy(LOGITS, LABELS, label_smoothing=0.3)))
    penalty = ConfidencePenalty(0.3)(LOGITS, LABELS)
    assert float(penalty) == pytest.approx(mean_of(lambda p, label: -math.log(p[label]) - 0.3 * entropy(p)), rel=1e-12)


def test_soft_cross_entropy_is_cross_entropy_with_one_hot_targets():
    hot = functional.one_hot(LABELS, 3).double()
    torch.testing.assert_close(soft_cross_entropy(LOGITS, hot), functional.cross_entropy(LOGITS, LABELS))
    soft = torch.tensor([[0.5, 0.25, 0.25]] * 3, dtype=torch.float64)
    expected = mean_of(lambda p, _: -0.5 * math.log(p[0]) - 0.25 * math.log(p[1]) - 0.25 * math.log(p[2]))
    assert float(soft_cross_entropy(LOGITS, soft)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("loss", [*LOSSES, RelaxLoss(5.0, 0.4), CRL(9.0, upper=0.4).relaxed_loss], ids=repr)
def test_the_gradient_is_that_of_the_value(loss, epoch):
    """No part of a formula is a constant to the gradient: RelaxLoss's soft targets, HAMP's entropy."""
    logits = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, LABELS, epoch=epoch), logits, atol=1e-9, rtol=1e-6)


def test_relaxloss_pulls_through_its_soft_targets():
    """As the authors' code does; detached, it would be another gradient."""
    logits = (LOGITS + torch.tensor([[0.0], [1.0], [0.0]]) * torch.tensor([0.0, 2.0, 0.0])).requires_grad_()
    (found,) = torch.autograd.grad(RelaxLoss(5.0, 0.9)(logits, LABELS, epoch=1), logits)
    log_p = functional.log_softmax(logits, dim=1)
    q = log_p.exp().gather(1, LABELS[:, None]).clamp(0, 0.9).detach()
    hot = functional.one_hot(LABELS, 3)
    flat = -((q * hot + (1 - q) / 2 * (1 - hot)) * log_p).sum(dim=1)
    wrong = torch.tensor([0.0, 1.0, 0.0])
    detached = (wrong * flat - functional.cross_entropy(logits, LABELS, reduction="none")).mean()
    (other,) = torch.autograd.grad(detached, logits)
    torch.testing.assert_close(found[[0, 2]], other[[0, 2]])  # right predictions are not flattened
    assert (found[1] - other[1]).abs().max() > 0.01


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_in_a_stack_a_loss_is_what_it_is_alone(loss, epoch):
    stack, labels = torch.stack([LOGITS, 10 * LOGITS, -LOGITS]), torch.stack([LABELS, LABELS.flip(0), LABELS])
    values = torch.func.vmap(lambda z, y: loss(z, y, epoch=epoch))(stack, labels)
    grads = torch.func.vmap(torch.func.grad(lambda z, y: loss(z, y, epoch=epoch)))(stack, labels)
    for k in range(3):
        logits = stack[k].clone().requires_grad_()
        value = loss(logits, labels[k], epoch=epoch)
        torch.testing.assert_close(values[k], value.detach(), rtol=1e-14, atol=0)
        torch.testing.assert_close(grads[k], torch.autograd.grad(value, logits)[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", LOSSES[1:], ids=repr)  # RelaxLoss: test_training
def test_a_stacked_fleet_trains_as_one_by_one(loss):
    data = Dataset(**{**vars(blobs()), "inputs": blobs().inputs.double()})
    recipe = Recipe(lr=0.05, epochs=4, batch_size=8)
    models = [[Task(network, data, recipe).initial_model(seed).double() for seed in (5, 6)] for _ in range(2)]
    for stack, fleet in zip((True, False), models, strict=True):
        one = Recipe(**vars(recipe) | {"stack": stack})
        train_many(fleet, data, ids_of(2), [5, 6], one, loss=loss)
    for stacked, alone in zip(*models, strict=True):
        for a, b in zip(stacked.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HAMP(1.0), "gamma must be in"),
        (lambda: HAMP(0.9, -1), "alpha at least 0"),
        (lambda: HAMP(reduction="sum"), "reduction must be 'mean' or 'batchmean'"),
        (lambda: ConvexConcave("linear"), "form must be one of ccel, ccql, focal, focal_ccel; got 'linear'"),
        (lambda: ConvexConcave("ccel", 1.5), "alpha must lie between 0 and 1"),
        (lambda: ConvexConcave("focal", -1), "at least 0 for 'focal'"),
        (lambda: ConvexConcave(beta=0), "beta must be above 0"),
        (lambda: ConvexConcave("focal_ccel", gamma=-1), "gamma at least 0"),
        (lambda: LabelSmoothing(1.5), "epsilon must lie between 0 and 1"),
        (lambda: ConfidencePenalty(-1), "beta must be at least 0"),
        (lambda: RelaxLoss(float("nan")), "alpha must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_losses_show_the_call_that_makes_them():
    assert repr(HAMP(0.9)) == "HAMP(gamma=0.9, alpha=0.001, reduction='mean')"
    assert all(vars(eval(repr(loss))) == vars(loss) for loss in LOSSES)
