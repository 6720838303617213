"""A decoder-only transformer as a pure function of (config, weights, tokens). It knows no rank, no loss, no optimizer.

Embedding, head and final norm may be absent (set to None by a pipeline cut), and layers may be missing from the dict:
what is left still runs, on hidden states instead of tokens. Mixtures of experts (`moe`) and adapters (`lora`) stand
elsewhere.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.core.config import require
from framework.core.errors import UsageError
from framework.models.attention import Attention, Context
from framework.models.config import ModelConfig, NormPlace, Position
from framework.models.kv_cache import CacheView
from framework.models.layers import MLP, Linear, build_norm, strict_linear
from framework.models.mask import DocumentMask, View, cache_mask, near, triangle
from framework.models.moe import Balance, Mixture
from framework.models.positions import Alibi, rotary_tables


class Layer(nn.Module):
    """One block: attention, then the feed-forward; where it normalises says `config.NormPlace`."""

    def __init__(self, config: ModelConfig, index: int, strict: bool):
        super().__init__()
        sandwich = config.norm_place is NormPlace.SANDWICH
        self.attention_norm = build_norm(config)
        self.attention = Attention(config, index, strict)
        self.attention_out_norm = build_norm(config) if sandwich else None
        self.mlp_norm = build_norm(config)
        self.mlp = Mixture(config, strict) if config.moe.at(index) else MLP(config, strict)
        self.mlp_out_norm = build_norm(config) if sandwich else None
        self.norms_first = config.ends_with_norm
        self.residual_scale = config.residual_scale

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x[B,T,D] -> [B,T,D]."""
        if self.norms_first:
            x = x + _normed(self.attention(self.attention_norm(x), context), self.attention_out_norm)
            return x + _normed(self._fed(self.mlp_norm(x), context), self.mlp_out_norm)
        x = self.attention_norm(self.residual_scale * x + self.attention(x, context))
        return self.mlp_norm(self.residual_scale * x + self._fed(x, context))

    def _fed(self, x: Tensor, context: Context) -> Tensor:
        return self.mlp(x, context.real) if isinstance(self.mlp, Mixture) else self.mlp(x)


def _normed(x: Tensor, norm: nn.Module | None) -> Tensor:
    return x if norm is None else norm(x)


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
        self.embedding_norm = build_norm(config) if config.embedding_norm else None
        self.mask = DocumentMask()
        self.alibi = Alibi(config.num_heads) if config.position is Position.ALIBI else None
        self.layers = nn.ModuleDict({str(i): Layer(config, i, strict) for i in range(config.num_layers)})
        self.norm = build_norm(config) if config.ends_with_norm else None
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
        real: Tensor | None = None,
    ) -> Tensor:
        """tokens[B,T] int64 (hidden[B,T,D] where the embedding was cut off) -> hidden[B,T,D], normalised.

        positions[B|1,T] default to 0..T-1; packed rows restart them per document. document_ids[B,T]: attention is
        causal within equal ids; None means that each row is one document, padded on the right if at all, which is
        faster. With `cache`, rows are the view's slots, and positions say where in them the tokens stand. real[B,T]:
        False at padding, for the balance of experts alone.
        """
        _refuse(token_types=token_types, prefix_lengths=prefix_lengths, encoder_tokens=encoder_tokens)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        hidden = tokens if self.embedding is None else self.embedding(tokens)
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(positions)
        hidden = _normed(hidden, self.embedding_norm)
        context = replace(self._context(hidden, positions, document_ids, cache), real=real)
        for layer in self.layers.values():
            hidden = layer(hidden, context)
        return _normed(hidden, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden[..., D] -> [..., V]. For users and generation; training goes through the Scorer, which keeps none."""
        if self.head is not None:
            return self.head(hidden)
        return (strict_linear if self.strict else F.linear)(hidden, self.output_weight, None)

    def balances(self) -> list[Balance]:
        """Of the layers with experts: whoever trains tells them how many rows there are, and asks what they saw."""
        return [part for part in self.modules() if isinstance(part, Balance)]

    @property
    def output_weight(self) -> Tensor:
        """weight[V,D] from hidden states to logits: the head's, or the embedding's where they are tied."""
        if self.head is not None:
            return self.head.weight
        if self.embedding is None or not self.config.tied:
            raise ValueError("this part of the model holds neither head nor embedding: no logits can be had from it")
        return self.embedding.weight

    def _context(
        self, hidden: Tensor, positions: Tensor, document_ids: Tensor | None, cache: CacheView | None
    ) -> Context:
        tables = None
        if self.config.position is Position.ROTARY:
            tables = rotary_tables(positions, self.config, hidden.dtype)
        places, keys = torch.arange(positions.shape[1], device=positions.device).unsqueeze(0), positions.shape[1]
        mask = None if document_ids is None else self.mask(document_ids)
        if cache is not None:
            places = positions = positions.expand(hidden.shape[0], -1)
            keys = cache.cache.length if self.strict else cache.used
            mask = cache_mask(positions, keys)
        whole = self._view(mask, places, keys, 0, hidden.dtype)
        window = self.config.window
        close = self._view(mask, places, keys, window, hidden.dtype) if window else whole
        return Context(positions, tables, whole, close, cache, keys)

    def _view(self, mask: Tensor | None, places: Tensor, keys: int, window: int, dtype: torch.dtype) -> View:
        """What layers with that window see (0: without one) of what `mask` shows; None shows all up to the query."""
        narrow = 0 < window < keys
        if mask is None and not narrow and self.alibi is None:
            return View(None, causal=True)
        if mask is None:
            mask = triangle(keys, places.device)
        if narrow:
            mask = near(mask, places, window)
        return View(mask if self.alibi is None else self.alibi(mask, places, dtype), causal=False)


def _require_strict_sizes(config: ModelConfig) -> None:
    """A CPU matmul over 33 terms into 7 columns gives a row bits that depend on its place, 8 rows a block or not: rows
    must start on 16 bytes (measured)."""
    sizes = {
        "hidden_size": config.hidden_size,
        "head_dim": config.head_size,
        "intermediate_size": config.feed_forward_size,
        "moe.intermediate_size": config.expert_size,
        "moe.shared": config.moe.shared,
    }
    for name, size in sizes.items():
        require(
            size % 8 == 0, f"strict mode needs model.{name}={size} to be a multiple of 8; choose {-(-size // 8) * 8}"
        )


def _refuse(**inputs: Tensor | None) -> None:
    given = [name for name, value in inputs.items() if value is not None]
    if given:
        raise UsageError(f"a decoder-only model takes no {given[0]}; leave it None, or use a family that reads it")
