"""What a scorer must find, by one backward pass of plain autograd per sample, in float64."""

import torch

from cwfast import SaliencyScorer


def truth(model, losses, batch, power=1):
    """Sums over samples of ``|g_b w|`` (``g_b^2`` for power 2) by parameter name, each sample's norm, and the gradient.

    Args:
        model: called by losses.
        losses: ``losses(*batch) -> [B]``, each sample's own loss.
        batch: tensors whose first dimension is the samples.
        power: 1 or 2.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scores, total = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
    norms = []
    for i in range(len(batch[0])):
        one = losses(*(x[i : i + 1] for x in batch)).sum()
        grads = torch.autograd.grad(one, list(parameters.values()), allow_unused=True)
        square = 0.0
        for (name, p), found in zip(parameters.items(), grads, strict=True):
            g = torch.zeros_like(p) if found is None else found
            scores[name] += (g * p if power == 1 else g).detach().abs() ** power
            total[name] += g
            square += g.square().sum()
        norms.append(square.sqrt())
    return scores, torch.stack(norms), total


def assert_equal(found, expected, rtol=1e-10):
    assert list(found) == list(expected)
    for name, value in expected.items():
        error = (found[name].double() - value.double()).abs().max()
        assert error <= rtol * value.abs().max() + 1e-13, f"{name}: {error} of {value.abs().max()}"


def check(model, losses, batch, *, rtol=1e-10, size=None, **options):
    """Scores, norms and gradients of a batch, of its halves and of squares are those of one sample at a time."""
    for power, criterion in ((1, "taylor"), (2, "fisher")):
        scores, norms, total = truth(model, losses, batch, power)
        assert any(score.any() for score in scores.values())
        half = (len(batch[0]) + 1) // 2
        for parts in ([batch], [[x[:half] for x in batch], [x[half:] for x in batch]]):
            model.zero_grad()
            scorer = SaliencyScorer(model, criterion=criterion, reduction="sum", norms=True, **options)
            for part in parts:
                with scorer, scorer.batch(size=len(part[0]) if size else None):
                    losses(*part).sum().backward()
            assert scorer.samples == len(batch[0])
            assert_equal(scorer.scores(), scores, rtol)
            assert_equal({"norms": scorer.norms()}, {"norms": norms}, rtol)
            grads = {
                name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()
            }
            assert_equal(grads, total, rtol)
    model.zero_grad()
    scorer = SaliencyScorer(model, reduction="mean", grads=False, **options)
    with scorer, scorer.batch(size=len(batch[0]) if size else None):
        losses(*batch).mean().backward()
    assert_equal(scorer.scores(), truth(model, losses, batch)[0], rtol)
    assert all(p.grad is None for p in model.parameters())
