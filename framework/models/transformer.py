"""A decoder-only transformer as a pure function of (config, weights, tokens). It knows no rank, no loss, no optimizer.

Embedding, head and final norm may be absent (set to None by a pipeline cut), and layers may be missing from the dict:
what is left still runs, on hidden states instead of tokens. Mixtures of experts and low-rank adapters stand elsewhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.core.config import require
from framework.core.errors import UsageError
from framework.models.attention import Attention, Context, DocumentMask, cache_mask
from framework.models.config import ModelConfig, NormPlace, Position
from framework.models.kv_cache import CacheView
from framework.models.layers import MLP, Linear, build_norm, strict_linear
from framework.models.positions import rotary_tables


class Layer(nn.Module):
    """One block. Pre-norm: x + f(norm(x)); post-norm: norm(x + f(x)); f is attention, then the feed-forward block."""

    def __init__(self, config: ModelConfig, index: int, strict: bool):
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = Attention(config, index, strict)
        self.mlp_norm = build_norm(config)
        self.mlp = MLP(config, strict)
        self.pre = config.norm_place is NormPlace.PRE

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x[B,T,D] -> [B,T,D]."""
        if self.pre:
            x = x + self.attention(self.attention_norm(x), context)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x, context))
        return self.mlp_norm(x + self.mlp(x))


class Transformer(nn.Module):
    """`model(tokens[B,T]) -> hidden[B,T,D]`, `model.logits(hidden) -> [B,T,V]`. Build it on the meta device and fill it
    from a ReadBox (init.py, hub.py, a checkpoint); what nn.Module draws by itself is never used.

    strict: bit-equal for a token whatever else is in the batch and however the sequence is cut (law On-policy).
    """

    def __init__(self, config: ModelConfig, strict: bool = False):
        super().__init__()
        require(config.vocab_size > 0, "model.vocab_size=0: a model is built with its tokenizer's vocabulary size")
        if strict:
            _require_strict_sizes(config)
        self.config = config
        self.strict = strict
        learned = config.position is Position.LEARNED
        self.embedding: nn.Embedding | None = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_positions, config.hidden_size) if learned else None
        self.mask = DocumentMask()
        self.layers = nn.ModuleDict({str(i): Layer(config, i, strict) for i in range(config.num_layers)})
        self.norm = build_norm(config) if config.norm_place is NormPlace.PRE else None
        self.head = None if config.tied else Linear(config.hidden_size, config.vocab_size, False, strict)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        token_types: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        encoder_tokens: Tensor | None = None,
        cache: CacheView | None = None,
    ) -> Tensor:
        """tokens[B,T] int64 (hidden[B,T,D] where the embedding was cut off) -> hidden[B,T,D], normalised.

        positions[B|1,T] default to 0..T-1; packed rows restart them per document. document_ids[B,T]: attention is
        causal within equal ids; None means that each row is one document, padded on the right if at all, which is
        faster. With `cache`, rows are the view's slots, and positions say where in them the tokens stand.
        """
        _refuse(token_types=token_types, prefix_lengths=prefix_lengths, encoder_tokens=encoder_tokens)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        hidden = tokens if self.embedding is None else self.embedding(tokens)
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(positions)
        context = self._context(hidden, positions, document_ids, cache)
        for layer in self.layers.values():
            hidden = layer(hidden, context)
        return hidden if self.norm is None else self.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden[..., D] -> [..., V]. For users and generation; training goes through the Scorer, which keeps none."""
        if self.head is not None:
            return self.head(hidden)
        return (strict_linear if self.strict else F.linear)(hidden, self.output_weight, None)

    @property
    def output_weight(self) -> Tensor:
        """weight[V,D] from hidden states to logits: the head's, or the embedding's where they are tied."""
        if self.head is not None:
            return self.head.weight
        if self.embedding is None:
            raise ValueError("this part of the model holds neither head nor embedding: no logits can be had from it")
        return self.embedding.weight

    def _context(
        self, hidden: Tensor, positions: Tensor, document_ids: Tensor | None, cache: CacheView | None
    ) -> Context:
        tables = None
        if self.config.position is Position.ROTARY:
            tables = rotary_tables(positions, self.config.head_size, self.config.rope_theta, hidden.dtype)
        length = positions.shape[1]
        if cache is not None:
            positions = positions.expand(hidden.shape[0], -1)
            keys = cache.cache.length if self.strict else cache.used
            return Context(positions, tables, cache_mask(positions, keys), False, cache, keys)
        if document_ids is None:
            return Context(positions, tables, None, True, None, length)
        return Context(positions, tables, self.mask(document_ids), False, None, length)


def _require_strict_sizes(config: ModelConfig) -> None:
    """A CPU matmul over 33 terms into 7 columns gives a row bits that depend on its place, 8 rows a block or not: rows
    must start on 16 bytes (measured)."""
    sizes = {
        "hidden_size": config.hidden_size,
        "head_dim": config.head_size,
        "intermediate_size": config.feed_forward_size,
    }
    for name, size in sizes.items():
        require(
            size % 8 == 0, f"strict mode needs model.{name}={size} to be a multiple of 8; choose {-(-size // 8) * 8}"
        )


def _refuse(**inputs: Tensor | None) -> None:
    given = [name for name, value in inputs.items() if value is not None]
    if given:
        raise UsageError(f"a decoder-only model takes no {given[0]}; leave it None, or use a family that reads it")
