"""Tensors in, tensors out: schema, checks, choice of backend. Knows no model, no file, no MaskSet."""

from cwfast.ops.embedding_saliency import accumulate_embedding_saliency_
from cwfast.ops.grad_norms import per_sample_grad_norms
from cwfast.ops.lm_token_kl import lm_token_kl
from cwfast.ops.lm_token_stats import TokenStats, TopK, lm_token_stats
from cwfast.ops.logit_stats import LogitStats, logit_stats
from cwfast.ops.rewind import gather, rewind_, scatter_
from cwfast.ops.saliency import accumulate_saliency_
from cwfast.ops.select import Selection, select_topk

__all__ = [
    "LogitStats",
    "Selection",
    "TokenStats",
    "TopK",
    "accumulate_embedding_saliency_",
    "accumulate_saliency_",
    "gather",
    "lm_token_kl",
    "lm_token_stats",
    "logit_stats",
    "per_sample_grad_norms",
    "rewind_",
    "scatter_",
    "select_topk",
]
