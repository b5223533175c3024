"""Datasets with membership splits: a pool to draw members from, a reference set that no model trains on, a test set."""

from cwfast.data.loading import from_indexable, load
from cwfast.data.sets import Batches, Dataset, check_reiterable

__all__ = ["Batches", "Dataset", "check_reiterable", "from_indexable", "load"]
