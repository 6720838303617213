"""Multi-head attention with grouped keys: projections around an exchangeable, parameterless core.

Head counts are read off the shapes, so a column-parallel q, k, v leaves this page as it is.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from cuda_ext.attention.documents import Documents
from cuda_ext.attention.op import attention
from framework.models.config import Bias, ModelConfig
from framework.models.kv_cache import CacheView
from framework.models.layers import Joined, Linear, RMSNorm
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
    source: Tensor | None = None  # [B,S,D]: what an encoder has read; None where a cache keeps it
    across: View | None = None  # what of it a query sees


class AttentionCore(nn.Module):
    """softmax(q k^T / sqrt(H)) v. Without parameters, so that a plan can put a ring or an exchange of heads here."""

    def __init__(self, strict: bool, cap: float = 0.0):
        super().__init__()
        self.strict, self.cap = strict, cap

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        documents: Documents | None = None,
    ) -> Tensor:
        """q[B,T,N,H], k and v[B,S,K,H], mask[B|1,1|N,T,S] or documents in its place -> [B,T,N,H]."""
        told = {"mask": mask, "documents": documents, "causal": causal}
        return attention(q, k, v, **told, cap=self.cap, strict=self.strict)  # type: ignore[arg-type]


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
        self.core = AttentionCore(strict, config.score_cap)
        self.head_size = config.head_size
        self.unscaled = not config.scaled_scores
        self.interleaved = config.rope_interleaved
        self.rotary_parts = config.rotary_parts
        self.windowed = config.windowed(index)
        self.index = index
        self.joined: Joined | None = None

    def join(self) -> None:
        """q, k and v in one product from now on (see `Joined`)."""
        self.joined = Joined(self.q, self.k, self.v)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x[B,T,D] -> [B,T,D]."""
        q, k, v = (self.q(x), self.k(x), self.v(x)) if self.joined is None else self.joined(x)
        q, (k, v) = self._queries(q), self._keys(k, v)
        if context.rotary is not None:
            q, k = (turn(x, context.rotary, self.interleaved, self.rotary_parts) for x in (q, k))
        if context.cache is not None:
            k, v = context.cache.extend(self.index, k, v, context.keys)
        view = context.near if self.windowed else context.whole
        told = [] if view.documents is None else [view.documents]  # a plan's core knows of none
        return self.o(self.core(q, k, v, view.mask, view.causal, *told).flatten(2))

    def _queries(self, q: Tensor) -> Tensor:
        """By heads: [B,T,N*H] -> [B,T,N,H]."""
        q = q.unflatten(-1, (-1, self.head_size))
        q = q if self.q_norm is None else self.q_norm(q)
        return q * self.head_size**0.5 if self.unscaled else q

    def _keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """By heads: [B,S,K*H] -> [B,S,K,H] each."""
        k, v = (y.unflatten(-1, (-1, self.head_size)) for y in (k, v))
        return k if self.k_norm is None else self.k_norm(k), v


class CrossAttention(Attention):
    """Attention to what an encoder has read: nothing turns, for there is no distance between two texts. With a cache,
    keys and values are made once, by the call that is given a source."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x[B,T,D] -> [B,T,D]."""
        assert context.across is not None
        q = self._queries(self.q(x))
        if context.source is not None:
            k, v = self._keys(self.k(context.source), self.v(context.source))
            if context.cache is not None:
                context.cache.keep_source(self.index, k, v)
        if context.cache is not None:
            k, v = context.cache.kept_source(self.index)
        return self.o(self.core(q, k, v, context.across.mask, context.across.causal).flatten(2))
