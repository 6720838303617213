"""Attention for the model: torch's fused kernels, or the explicit reference where bits must not depend on the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_ext import dispatch
from cuda_ext.attention import reference

_ROWS = 8  # a CPU matmul gives a row the same bits in any batch once rows come in eights (law On-policy)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    cap: float = 0.0,
    strict: bool = False,
) -> Tensor:
    """See `reference.attention`. q[B,T,N,H], k and v[B,S,K,H] -> [B,T,N,H].

    strict: the same bits for a query whatever else is in the batch, given equal S up to the next multiple of 8 and H a
    multiple of 8 (else a CPU matmul's bits depend on where a row starts).
    """
    if strict:
        dispatch.announce("attention", dispatch.STRICT)
        return _padded_reference(q, k, v, mask, causal, scale, cap)
    if cap:  # no fused kernel of torch's has it
        dispatch.announce("attention", dispatch.REFERENCE)
        return reference.attention(q, k, v, mask=mask, causal=causal, scale=scale, cap=cap)
    dispatch.announce("attention", dispatch.SDPA)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if mask is not None and causal:
        mask, causal = reference.visible(mask, True, mask), False
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def _padded_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, cap: float
) -> Tensor:
    queries, keys = q.shape[1], k.shape[1]
    more_queries, more_keys = -queries % _ROWS, -keys % _ROWS
    seen = reference.visible(mask, causal, q.new_empty(queries, keys))
    if seen is None:
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=q.device)
    shown, hidden = (True, False) if seen.dtype == torch.bool else (0.0, float("-inf"))
    seen = F.pad(seen, (0, more_keys), value=hidden)
    seen = F.pad(seen, (0, 0, 0, more_queries), value=shown)  # a query that sees nothing would be NaN, also backward
    q = F.pad(q, (0, 0, 0, 0, 0, more_queries))
    k, v = (F.pad(x, (0, 0, 0, 0, 0, more_keys)) for x in (k, v))
    return reference.attention(q, k, v, mask=seen, scale=scale, cap=cap)[:, :queries]
