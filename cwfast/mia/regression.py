"""Quantile regression: how large should the signal be on a sample like this one, if it is not a member?"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from cwfast.mia import _inputs
from cwfast.mia._inputs import Array, Floats

_FOLDS = 2
_STEPS = 400
_WIDTH = 64


def quantile_regression(
    phi: Array,
    membership: Array,
    features: Array,
    target: int | None = None,
    *,
    population: Array | None = None,
    alpha: float | None = None,
    seed: int = 0,
) -> Floats:
    """score = (phi - mean(x)) / deviation(x), or phi - q(x) with q(x) the 1 - alpha quantile of a non-member's phi.

    A small network learns mean and log deviation (Gaussian likelihood), or the quantile (pinball loss), of the target's
    phi from features of the sample, on non-members alone: no shadow model is needed. The population is cut in two
    halves and each half is judged by the network trained on the other, so that no sample is compared with a network
    that has seen it; samples outside the population get the mean of both scores.

    Args:
        phi: [K, N] or [K, N, Q] (averaged over queries), floating point, no NaN; infinite ones as for `lira`.
        membership: [K, N], bool: model k was trained on sample i.
        features: [N, F], floating point, finite: the inputs, or better an embedding that no audited model made.
        target: row of the attacked model, or None for every row (one pair of networks each).
        population: [M] distinct sample indices that the attacker knows to be non-members unless they are members of the
            target, or None for all samples.
        alpha: in (0, 1): a quantile instead of the Gaussian.
        seed: of halves and initial weights.

    Returns:
        float64 [N], or [K, N] for ``target`` None. Same bits for the same machine, seed and thread count.

    Raises:
        TypeError: a wrong dtype, or ``target`` not an integer.
        ValueError: a wrong shape, a value NaN, features not finite, ``alpha`` out of range, or fewer than 2
            non-members.

    Source: Bertran et al., "Scalable Membership Inference Attacks via Quantile Regression", NeurIPS 2023, section 3;
        the size of the network and the halves are ours.
    """
    signals = _inputs.phi(phi)
    member = _inputs.membership(membership, signals)
    inputs = _inputs.to_numpy("features", features, "f")
    if inputs.ndim != 2 or inputs.shape[0] != member.shape[1] or inputs.shape[1] == 0:
        raise ValueError(f"features must have shape [N, F] with N = {member.shape[1]}; got {inputs.shape}")
    if not np.isfinite(inputs).all():
        raise ValueError(f"features must be finite; got {np.count_nonzero(~np.isfinite(inputs))} that are not")
    if alpha is not None and not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1; got {alpha}")
    pool = _inputs.population(population, member.shape[1])
    rows = _inputs.targets(target, signals)
    x = torch.from_numpy((inputs - inputs.mean(axis=0)) / np.maximum(inputs.std(axis=0), 1e-12))
    values = torch.from_numpy(signals.mean(axis=0))
    scores = np.empty((len(rows), member.shape[1]))
    for row, chosen, crowd in zip(scores, rows, _inputs.crowds(pool, member, rows), strict=True):
        order = np.random.default_rng([seed, chosen]).permutation(np.flatnonzero(crowd))
        halves = np.array_split(order, _FOLDS)
        judged = torch.stack([_scores(x, values[chosen], half, alpha, seed) for half in halves]).numpy()
        row[:] = judged.mean(axis=0)
        for own, half in enumerate(halves):
            row[half] = judged[np.arange(_FOLDS) != own][:, half].mean(axis=0)
    return scores if target is None else scores[0]


def _scores(x: Tensor, phi: Tensor, train: np.ndarray, alpha: float | None, seed: int) -> Tensor:
    """[N], by a network trained on these samples."""
    known = torch.from_numpy(train)
    mean, scale = phi[known].mean(), phi[known].std(correction=0).clamp(min=1e-12)
    given, wanted = x[known], (phi[known] - mean) / scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(x.shape[1], _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, 2)).double()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    with torch.enable_grad():
        for _ in range(_STEPS):
            optimizer.zero_grad()
            center, spread = network(given).unbind(dim=1)
            if alpha is None:
                objective = (spread + ((wanted - center) * torch.exp(-spread)) ** 2 / 2).mean()
            else:
                off = wanted - center
                objective = torch.maximum((1 - alpha) * off, -alpha * off).mean()
            objective.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        center, spread = network(x).unbind(dim=1)
        off = (phi - mean) / scale - center
        return off * torch.exp(-spread.clamp(-math.log(1e3), math.log(1e3))) if alpha is None else off * scale
