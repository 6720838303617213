"""Attention as matmul, softmax, matmul: the definition. All scores are held at once: memory grows with T times S."""

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    cap: float = 0.0,
) -> Tensor:
    """softmax(q k^T * scale) v (Vaswani et al. 2017, eq. 1). q[B,T,N,H], k and v[B,S,K,H] with N a multiple of K.

    `mask` [B|1,1|N,T,S] bool, True where a query sees a key, or numbers to add to the scores (-inf where it does not);
    `causal`, with a bool mask or none, lets query t see keys up to t. `scale` is 1/sqrt(H) where not given. `cap` > 0:
    scores s become cap tanh(s / cap) (Gemma team 2024, section 2). The softmax is taken in at least fp32. Returns
    [B,T,N,H].
    """
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    scores = (q.contiguous() * (scale or q.shape[-1] ** -0.5)) @ k.contiguous().transpose(2, 3)
    seen = visible(mask, causal, scores)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else scores + seen
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (weights @ v.contiguous()).transpose(1, 2)


def visible(mask: Tensor | None, causal: bool, scores: Tensor) -> Tensor | None:
    """`mask` and the causal triangle in one mask that broadcasts over scores[B,N,T,S]; None where all is seen."""
    if not causal:
        return mask
    triangle = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return triangle if mask is None else mask & triangle
