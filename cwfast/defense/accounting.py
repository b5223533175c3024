"""What private training spends, by Opacus' accountants, and what that covers."""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

ACCOUNTANTS = ("prv", "rdp")  # Opacus warns of its third, "gdp": it can underestimate
COVERS = {
    "model": "covers the released model: adding or removing any one sample that was trained on privately. What "
    "training started from, and the mask if there is one, came from elsewhere; of that data it says nothing",
    "fine-tuning": "covers the fine-tuning mechanism only and is no guarantee for the released model: the weights that "
    "fine-tuning started from, the scores and the mask were computed from the same samples without noise",
}


@dataclass(frozen=True)
class Privacy:
    """What private training spent, and of what it is a guarantee; ``print`` it to see both.

    Attributes:
        epsilon: by the accountant; infinite without noise.
        delta: of (epsilon, delta), for adding or removing one sample.
        noise_multiplier: the noise's standard deviation, in units of ``max_grad_norm``.
        max_grad_norm: what each sample's gradient was clipped to.
        sample_rate: each step took each sample with this probability (Poisson sampling).
        steps: how many.
        accountant: Opacus': "prv" or "rdp".
        covers: "model", or "fine-tuning": the mechanism alone.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    steps: int
    accountant: str
    covers: str

    def __str__(self) -> str:
        how = (
            f"{self.accountant.upper()} accountant, noise multiplier {self.noise_multiplier:.4g}, gradients clipped to "
            f"{self.max_grad_norm:.4g}, {self.steps} steps of Poisson sampling at rate {self.sample_rate:.4g}; not "
            "against whoever knows or can guess the seed, from which the noise follows"
        )
        return f"epsilon = {self.epsilon:.4g} at delta = {self.delta:.4g} {COVERS[self.covers]} ({how})"


@cache
def epsilon_of(noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: str) -> float:
    """Spent by so many steps; 0 for none, infinite without noise."""
    if not steps:
        return 0.0
    if not noise_multiplier:
        return float("inf")
    with _quiet():
        counting = _opacus("opacus.accountants").create_accountant(accountant)
        counting.history = [(noise_multiplier, sample_rate, steps)]
        return float(counting.get_epsilon(delta))


@cache
def noise_for(epsilon: float, sample_rate: float, steps: int, delta: float, accountant: str) -> float:
    """The noise multiplier with which so many steps spend epsilon, up to 0.01 less; 0 for no steps."""
    if not steps:
        return 0.0
    settings = {"target_epsilon": epsilon, "target_delta": delta, "sample_rate": sample_rate, "steps": steps}
    with _quiet():
        return float(_opacus("opacus.accountants.utils").get_noise_multiplier(accountant=accountant, **settings))


def _opacus(module: str) -> Any:
    """Imported when it is used: it takes seconds."""
    return importlib.import_module(module)


@contextmanager
def _quiet() -> Iterator[None]:
    """Opacus tells of its own search: bounds that it takes on the way, and log(0) at full sampling."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)
        warnings.filterwarnings("ignore", "divide by zero", RuntimeWarning)
        yield
