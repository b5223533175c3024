"""Token statistics of a model and of its reference, and the divergence between them, each logit made once."""

import torch
from torch import Tensor

from cwfast import _backends
from cwfast.ops import _lm_token_tiles
from cwfast.ops.lm_token_kl import BACKENDS, check_pair, lm_token_kl
from cwfast.ops.lm_token_stats import TokenStats, check_targets, check_tokens, lm_token_stats, token_stats
from cwfast.reference import LMHead


@torch.no_grad()
def lm_token_pair(
    hidden: Tensor,
    head: LMHead,
    ref_hidden: Tensor,
    ref_head: LMHead,
    targets: Tensor,
    *,
    topk: int = 0,
    backend: str = "auto",
) -> tuple[TokenStats, TokenStats, Tensor]:
    """``lm_token_stats`` of both, topk of the model alone, and ``lm_token_kl``: the same numbers, without a gradient.

    On the CPU two products with the heads in place of four; elsewhere the three ops one after the other.

    Args:
        hidden: ``[N, d]`` of the model.
        head: of the model.
        ref_hidden: ``[N, e]`` of the reference, of the dtype of hidden.
        ref_head: of the reference: the same vocabulary, soft-cap and scale.
        targets: ``[N]`` int64.
        topk: 0 to 32.
        backend: as of the ops.

    Raises:
        TypeError, ValueError, BackendUnavailable: as the ops do.
    """
    check_tokens(hidden, head, targets, vocabulary=None, topk=topk)
    check_pair(hidden, head, ref_hidden, ref_head)
    if _backends.resolve(backend, hidden.device, BACKENDS) == "cpu":
        check_targets(targets, len(head.weight))
        found, ref_found, divergence = _lm_token_tiles.pair(hidden, head, ref_hidden, ref_head, targets, topk)
        return token_stats(found), token_stats(ref_found), divergence
    stats, ref_stats = (
        lm_token_stats(
            h, own.weight, targets, bias=own.bias, softcap=own.softcap, scale=own.scale, topk=k, backend=backend
        )
        for h, own, k in ((hidden, head, topk), (ref_hidden, ref_head, 0))
    )
    divergence = lm_token_kl(
        hidden,
        head.weight,
        ref_hidden,
        ref_head.weight,
        bias=head.bias,
        ref_bias=ref_head.bias,
        softcap=head.softcap,
        scale=head.scale,
        backend=backend,
    )
    return stats, ref_stats, divergence
