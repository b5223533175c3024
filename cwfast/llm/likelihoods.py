"""Attacks that need the model's own token statistics alone: loss, zlib, Min-K%, Min-K%++, SURP, DC-PDD."""

import numpy as np

from cwfast.llm import _segments
from cwfast.llm.storage import Floats, TokenRecords
from cwfast.mia._inputs import Array, to_numpy

_LEAST_VARIANCE = 1e-6  # of log p under p: a model that is sure has none, and then the numerator is rounding
_NONE = -100.0  # SURP of a text without a surprising token, as in the benchmark's code


def loss(records: TokenRecords) -> Floats:
    """LL.

    Source: Yeom et al., CSF 2018; Carlini et al., USENIX Security 2021 (perplexity).
    """
    return _segments.means(records, records["logprob"])


def zlib(records: TokenRecords) -> Floats:
    """LL / bytes of the scored text compressed by zlib.

    Source: Carlini et al., "Extracting Training Data from Large Language Models", USENIX Security 2021.
    """
    if records.zlib is None:
        raise KeyError("these records must hold the sizes of compressed texts; records() of token ids has no texts")
    return loss(records) / records.zlib.numpy()


def min_k(records: TokenRecords, *, k: float = 0.2) -> Floats:
    """Mean of the max(1, int(k L)) smallest log-probabilities.

    Source: Shi et al., "Detecting Pretraining Data from Large Language Models", ICLR 2024.
    """
    return _segments.lowest_mean(records, records["logprob"], k)


def min_k_pp(records: TokenRecords, *, k: float = 0.2) -> Floats:
    """Mean of the max(1, int(k L)) smallest (log p(x_t) - mu_t) / sigma_t.

    mu_t and sigma_t are mean and deviation of log p(v) for v drawn from p; the variance is at least 1e-6.

    Source: Zhang et al., "Min-K%++", ICLR 2025, eq. 3.
    """
    deviation = np.sqrt(np.maximum(records["variance"], _LEAST_VARIANCE))
    return _segments.lowest_mean(records, (records["logprob"] - records["mean"]) / deviation, k)


def surp(records: TokenRecords, *, k: float = 0.2, entropy: float = 2.0) -> Floats:
    """Mean log-probability of the tokens among the max(1, int(k L)) lowest whose entropy is below 2 nats; none: -100.

    Source: Zhang and Wu, "Adaptive Pre-training Data Detection for Large Language Models via Surprising Tokens", 2024.
    """
    chosen = _segments.lowest(records, records["logprob"], k) & (records["entropy"] < entropy)
    count = _segments.sums(records, chosen.astype(np.float64))
    total = _segments.sums(records, np.where(chosen, records["logprob"], 0.0))
    return np.where(count > 0, total / np.maximum(count, 1), _NONE)


def dc_pdd(records: TokenRecords, *, counts: Array, a: float = 0.01) -> Floats:
    """Mean over the first occurrences of each token of min(p(x_t) log(1 / f(x_t)), a), f its frequency elsewhere.

    Args:
        records: of the N texts.
        counts: [V], how often each token occurs in texts that are neither members nor audited (``token_counts``);
            f = (count + 1) / (sum + V).
        a: the largest value that a token adds.

    Source: Zhang et al., "Pretraining Data Detection for Large Language Models: A Divergence-based Calibration
        Method", EMNLP 2024.
    """
    seen = to_numpy("counts", counts, "iu")
    tokens = records.tokens.numpy()
    if seen.ndim != 1 or tokens.max() >= len(seen) or (seen < 0).any():
        raise ValueError(f"counts must be [V], not negative, V above token {tokens.max()}; got shape {seen.shape}")
    surprise = -np.log((seen + 1.0) / (seen.sum() + len(seen)))
    value = np.minimum(np.exp(records["logprob"]) * surprise[tokens], a)
    pairs = np.stack([_segments.document(records), tokens])
    first = np.zeros(len(tokens))
    first[np.unique(pairs, axis=1, return_index=True)[1]] = 1.0
    return _segments.sums(records, value * first) / _segments.sums(records, first)
