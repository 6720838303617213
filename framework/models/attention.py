"""Multi-head attention with grouped keys: projections around an exchangeable, parameterless core.

Head counts are read off the shapes, so a column-parallel q, k, v leaves this page as it is.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from cuda_ext.attention.op import attention
from framework.models.config import Bias, ModelConfig
from framework.models.kv_cache import CacheView
from framework.models.layers import Linear, RMSNorm
from framework.models.mask import View
from framework.models.positions import turn


@dataclass(frozen=True)
class Context:
    """What all layers of one forward share: built once, so that no layer builds a mask or a table.

    Example, a packed row: Context(positions[1,T], (cos, sin), whole=View(mask[1,1,T,T], False), near=..., None, T).
    """

    positions: Tensor  # [B|1, T] int64
    rotary: tuple[Tensor, Tensor] | None  # cos, sin [B|1, T, R]
    whole: View
    near: View  # of layers with a window
    cache: CacheView | None
    keys: int  # S: how many keys a query is shown
    real: Tensor | None = None  # [B,T] bool: False at padding, which has no part in the balance of experts


class AttentionCore(nn.Module):
    """softmax(q k^T / sqrt(H)) v. Without parameters, so that a plan can put a ring or an exchange of heads here."""

    def __init__(self, strict: bool):
        super().__init__()
        self.strict = strict

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """q[B,T,N,H], k and v[B,S,K,H], mask[B|1,1|N,T,S] -> [B,T,N,H]."""
        return attention(q, k, v, mask=mask, causal=causal, strict=self.strict)


class Attention(nn.Module):
    """Project, turn, attend, project back. `index` is the layer's place in the KV cache."""

    def __init__(self, config: ModelConfig, index: int, strict: bool):
        super().__init__()
        hidden, bias = config.hidden_size, config.attention_bias is not Bias.NONE
        queries, keys = config.num_heads * config.head_size, config.kv_heads * config.head_size
        self.q = Linear(hidden, queries, bias, strict)
        self.k = Linear(hidden, keys, bias, strict)
        self.v = Linear(hidden, keys, bias, strict)
        self.o = Linear(queries, hidden, config.attention_bias is Bias.ALL, strict)
        self.q_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else None
        self.core = AttentionCore(strict)
        self.head_size = config.head_size
        self.interleaved = config.rope_interleaved
        self.windowed = config.windowed(index)
        self.index = index

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x[B,T,D] -> [B,T,D]."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_size)) for project in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rotary is not None:
            q, k = (turn(x, context.rotary, self.interleaved) for x in (q, k))
        if context.cache is not None:
            k, v = context.cache.extend(self.index, k, v, context.positions, context.keys)
        view = context.near if self.windowed else context.whole
        return self.o(self.core(q, k, v, view.mask, view.causal).flatten(2))
