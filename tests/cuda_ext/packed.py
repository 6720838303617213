"""What flash-attn computes, in plain torch: a loop over documents. The stand-ins beside this give it their names."""

import itertools

import torch
from torch import Tensor

Window = tuple[int | None, int | None]


def whole(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: Window, cap: float) -> Tensor:
    """q[B,T,N,H], k and v[B,S,K,H] -> [B,T,N,H]. Causal: the last query sees the last key. Of a window (left, right)
    None and -1 are no bound."""
    queries, keys, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("btnh,bsnh->bnts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if cap > 0:
        scores = cap * torch.tanh(scores / cap)
    left, right = (None if bound is None or bound < 0 else bound for bound in window)
    right = 0 if causal else right
    back = torch.arange(queries).unsqueeze(1) + keys - queries - torch.arange(keys)
    hidden = torch.zeros_like(back, dtype=torch.bool)
    if left is not None:
        hidden |= back > left
    if right is not None:
        hidden |= back < -right
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("bnts,bsnh->btnh", weights, v)


def packed(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float | None, causal: bool,
    window: Window, cap: float,
) -> Tensor:  # fmt: skip
    """q[M,N,H], k and v[M,K,H], each document by itself."""
    assert starts.dtype == torch.int32
    assert starts.ndim == 1
    bounds = starts.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(q)
    spans = list(itertools.pairwise(bounds))
    assert all(0 <= end - begin <= longest for begin, end in spans)
    documents = [[x[begin:end].unsqueeze(0) for x in (q, k, v)] for begin, end in spans if end > begin]
    return torch.cat([whole(*document, scale, causal, window, cap).squeeze(0) for document in documents])
