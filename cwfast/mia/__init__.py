"""Membership inference: scores of samples (larger = more likely a member), and exact metrics over such scores."""

from cwfast.mia import metrics
from cwfast.mia.attacks import lira, loss, rmia

__all__ = ["lira", "loss", "metrics", "rmia"]
