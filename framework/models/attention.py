"""Multi-head attention with grouped keys: projections around an exchangeable, parameterless core.

Head counts are read off the shapes, so a column-parallel q, k, v leaves this page as it is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cuda_ext.attention.op import attention
from cuda_ext.rotary.op import rotary
from framework.models.config import ModelConfig
from framework.models.kv_cache import CacheView
from framework.models.layers import Linear


@dataclass(frozen=True)
class Context:
    """What all layers of one forward share: built once, so that no layer builds a mask or a table.

    Example, a packed row: Context(positions[1,T], (cos, sin), mask[1,1,T,T], causal=False, None, T).
    """

    positions: Tensor  # [B|1, T] int64
    rotary: tuple[Tensor, Tensor] | None  # cos, sin [B|1, T, H]
    mask: Tensor | None  # [B, 1, T, S] bool, True = sees; None = `causal` says it all; else what the core wants
    causal: bool
    cache: CacheView | None
    keys: int  # S: how many keys a query is shown


class AttentionCore(nn.Module):
    """softmax(q k^T / sqrt(H)) v. Without parameters, so that a plan can put a ring or an exchange of heads here."""

    def __init__(self, strict: bool):
        super().__init__()
        self.strict = strict

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """q[B,T,N,H], k and v[B,S,K,H], mask[B|1,1,T,S] -> [B,T,N,H]."""
        return attention(q, k, v, mask=mask, causal=causal, strict=self.strict)


class Attention(nn.Module):
    """Project, turn, attend, project back. `index` is the layer's place in the KV cache."""

    def __init__(self, config: ModelConfig, index: int, strict: bool):
        super().__init__()
        hidden, bias = config.hidden_size, config.attention_bias
        queries, keys = config.num_heads * config.head_size, config.kv_heads * config.head_size
        self.q = Linear(hidden, queries, bias, strict)
        self.k = Linear(hidden, keys, bias, strict)
        self.v = Linear(hidden, keys, bias, strict)
        self.o = Linear(queries, hidden, bias, strict)
        self.core = AttentionCore(strict)
        self.head_size = config.head_size
        self.index = index

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x[B,T,D] -> [B,T,D]."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_size)) for project in (self.q, self.k, self.v))
        if context.rotary is not None:
            q, k = rotary(q, *context.rotary), rotary(k, *context.rotary)
        if context.cache is not None:
            k, v = context.cache.extend(self.index, k, v, context.positions, context.keys)
        return self.o(self.core(q, k, v, context.mask, context.causal).flatten(2))


class DocumentMask(nn.Module):
    """[B,1,T,T] bool from document_ids[B,T]: a token sees earlier tokens of its own document, itself included.

    Padding (id 0) sees padding, so that its rows stay finite; nothing real ever sees it. Without parameters, so that a
    plan can put here what its attention core wants to know instead.
    """

    def forward(self, document_ids: Tensor) -> Tensor:
        """See above."""
        return document_mask(document_ids)


def document_mask(document_ids: Tensor) -> Tensor:
    """See `DocumentMask`."""
    same = document_ids.unsqueeze(2) == document_ids.unsqueeze(1)
    return same.tril().unsqueeze(1)


def cache_mask(positions: Tensor, keys: int) -> Tensor:
    """[B,1,T,S] bool from positions[B,T]: the query at position p sees entries 0..p of its slot."""
    return (torch.arange(keys, device=positions.device) <= positions.unsqueeze(-1)).unsqueeze(1)
