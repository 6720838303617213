"""A transformer as a pure function of (config, weights, tokens). It knows no rank, no loss, no optimizer.

Embedding, head and final norm may be absent (set to None by a pipeline cut), and layers may be missing from the dict:
what is left still runs, on hidden states instead of tokens. Mixtures of experts (`moe`) and adapters (`lora`) stand
elsewhere.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cuda_ext.attention.documents import find_documents, whole_rows
from cuda_ext.attention.op import takes_documents
from framework.core.config import require
from framework.core.errors import UsageError
from framework.core.records import document_lengths
from framework.models.attention import Attention, Context, CrossAttention
from framework.models.config import Architecture, ModelConfig, NormPlace, Position
from framework.models.heads import HeadTransform, OutputBias
from framework.models.kv_cache import CacheView
from framework.models.layers import MLP, Linear, build_norm, strict_linear
from framework.models.mask import DocumentMask, View, between, cache_mask, near, triangle, with_prefix, within
from framework.models.moe import Balance, Mixture
from framework.models.positions import Alibi, RelativeBias, Sinusoids, rotary_tables

HEAD_PARTS = ("head_transform", "head", "head_bias")


class Layer(nn.Module):
    """One block: attention, then the feed-forward; where it normalises says `config.NormPlace`."""

    def __init__(self, config: ModelConfig, index: int, strict: bool):
        super().__init__()
        sandwich = config.norm_place is NormPlace.SANDWICH
        self.attention_norm = build_norm(config)
        self.attention = Attention(config, index, strict)
        self.attention_out_norm = build_norm(config) if sandwich else None
        self.cross_norm = build_norm(config) if config.encoder else None
        self.cross = CrossAttention(config, index, strict) if config.encoder else None
        self.mlp_norm = build_norm(config)
        self.mlp = Mixture(config, strict) if config.moe.at(index) else MLP(config, strict)
        self.mlp_out_norm = build_norm(config) if sandwich else None
        self.norms_first = config.ends_with_norm
        self.norms_scaled = config.norm_place is NormPlace.SCALED
        self.residual_scale = config.residual_scale

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x[B,T,D] -> [B,T,D]."""
        if self.norms_scaled:
            normed = self.attention_norm(x)
            normed = self.mlp_norm(self.residual_scale * normed + self.attention(normed, context))
            return self.residual_scale * normed + self._fed(normed, context)
        if self.norms_first:
            more = _normed(self.attention(self.attention_norm(x), context), self.attention_out_norm)
            if self.cross is not None:
                x = x + more
                more = self.cross(_normed(x, self.cross_norm), context)
            normed, x = self.mlp_norm(more, x)
            return x + _normed(self._fed(normed, context), self.mlp_out_norm)
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
        self._encodes = config.architecture is Architecture.ENCODER
        self.embedding: nn.Embedding | None = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = _position_embedding(config)
        self.type_embedding = nn.Embedding(config.token_types, config.hidden_size) if config.token_types else None
        self.embedding_norm = build_norm(config) if config.embedding_norm else None
        self.mask = DocumentMask()
        self.alibi = Alibi(config.num_heads) if config.position is Position.ALIBI else None
        self.relative = RelativeBias(config) if config.position is Position.RELATIVE else None
        self.encoder = Transformer(config.encoder, strict) if config.encoder else None
        if self.encoder is not None:
            self.encoder.embedding = None  # the decoder's serves both
        self.layers = nn.ModuleDict({str(i): Layer(config, i, strict) for i in range(config.num_layers)})
        self.norm = build_norm(config) if config.ends_with_norm else None
        self.head_transform = HeadTransform(config, strict) if config.head_transform else None
        self.head = None if config.tied else Linear(config.hidden_size, config.vocab_size, False, strict)
        self.head_bias = OutputBias(config.vocab_size) if config.head_transform else None

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        token_types: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        span_positions: Tensor | None = None,
        encoder_tokens: Tensor | None = None,
        encoder_document_ids: Tensor | None = None,
        cache: CacheView | None = None,
        real: Tensor | None = None,
    ) -> Tensor:
        """tokens[B,T] int64 (hidden[B,T,D] where the embedding was cut off) -> hidden[B,T,D], normalised.

        positions[B|1,T] default to 0..T-1; packed rows restart them per document. document_ids[B,T]: attention stays
        within equal ids, 0 is padding; None means that each row is one document, for a decoder padded on the right if
        at all, which is faster; its length, where a dynamic scaling asks, is what its positions count to.
        prefix_lengths[B] or, a token for its document, [B,T]: how much of it all may see; what stands in a span,
        span_positions[B,T] > 0 (from 1 on; 0 in the text around), is none of it.
        token_types[B,T] default to 0. encoder_tokens[B,S] is what an encoder reads, or states[B,S,D] that `encode` has
        made of it; of encoder_document_ids[B,S] a token sees those equal to its own, or all but 0. With `cache`, rows
        are the view's slots, and positions say where in them the tokens stand; what an encoder has read is given once
        for each slot, and kept. real[B,T]: False at padding, for the balance of experts alone.
        """
        self._refuse_unread(
            token_types=token_types,
            prefix_lengths=prefix_lengths,
            span_positions=span_positions,
            encoder_tokens=encoder_tokens,
            cache=cache,
        )
        source = self._source(encoder_tokens, encoder_document_ids, cache)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        hidden = tokens if self.embedding is None else self.embedding(tokens)
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(positions).to(hidden.dtype)
        if self.type_embedding is not None:
            hidden = hidden + self.type_embedding(torch.zeros_like(positions) if token_types is None else token_types)
        hidden = _normed(hidden, self.embedding_norm)
        context = self._context(hidden, positions, document_ids, prefix_lengths, span_positions, cache)
        across = self._across(source, document_ids, encoder_document_ids, cache)
        context = replace(context, real=real, source=source, across=across)
        for layer in self.layers.values():
            hidden = layer(hidden, context)
        return _normed(hidden, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden[..., D] -> [..., V]. For users and generation; training goes through the Scorer, which keeps none."""
        hidden = self.before_head(hidden)
        if self.head is not None and self.head_bias is None:
            return self.head(hidden)
        return (strict_linear if self.strict else F.linear)(hidden, self.output_weight, self.output_bias)

    def before_head(self, hidden: Tensor) -> Tensor:
        """hidden[..., D] -> [..., D]: what the language head's matrix multiplies."""
        if self.config.scaled_head:
            hidden = hidden * self.config.hidden_size**-0.5
        return _normed(hidden, self.head_transform)

    def encode(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """tokens[B,S] -> [B,S,D]: what the encoder makes of them; document_ids[B,S] as in `forward`."""
        if self.encoder is None or self.embedding is None:
            raise UsageError(f"a model of architecture={self.config.architecture} has no encoder to read a text with")
        places = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        states: Tensor = self.encoder(self.embedding(tokens), positions=places, document_ids=document_ids)
        return states

    def _source(self, tokens: Tensor | None, document_ids: Tensor | None, cache: CacheView | None) -> Tensor | None:
        if self.encoder is None or (tokens is None and cache is not None):
            return None
        if tokens is None:
            raise UsageError("a model of architecture=encoder_decoder needs encoder_tokens: the text that it reads")
        return tokens if tokens.is_floating_point() else self.encode(tokens, document_ids)

    def _across(
        self,
        source: Tensor | None,
        document_ids: Tensor | None,
        encoder_document_ids: Tensor | None,
        cache: CacheView | None,
    ) -> View | None:
        """What a decoder's token sees of what an encoder has read; a cache is told of it once for each slot."""
        if cache is None or self.encoder is None:
            return None if source is None else _across(document_ids, encoder_document_ids)
        if source is not None:
            every = torch.ones(source.shape[:2], dtype=torch.bool, device=source.device)
            cache.note_source(every if encoder_document_ids is None else encoder_document_ids > 0)
        return View(cache.seen_source()[:, None, None], causal=False)

    def drop_head(self) -> None:
        """Leave the language head out: a classifier has none."""
        for part in HEAD_PARTS:
            setattr(self, part, None)

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

    @property
    def output_bias(self) -> Tensor | None:
        """bias[V] of the logits, where they have one."""
        return None if self.head_bias is None else self.head_bias.bias

    def _context(
        self,
        hidden: Tensor,
        positions: Tensor,
        document_ids: Tensor | None,
        prefix_lengths: Tensor | None,
        span_positions: Tensor | None,
        cache: CacheView | None,
    ) -> Context:
        tables = self._tables(positions, document_ids, span_positions, cache, hidden.dtype)
        places, keys = torch.arange(positions.shape[1], device=positions.device).unsqueeze(0), positions.shape[1]
        # where the keys stand in their documents: in a row of its own, padding may be said to stand anywhere
        standing = places if document_ids is None else positions
        if cache is None and prefix_lengths is None and (views := self._unmasked(hidden, document_ids, keys)):
            return Context(positions, tables, *views, cache=None, keys=keys)
        mask = None if document_ids is None else (within if self._encodes else self.mask)(document_ids)
        if cache is not None:
            places = positions = positions.expand(hidden.shape[0], -1)
            cache = cache.at(positions)
            keys = cache.cache.length if self.strict else cache.used
            mask, standing = cache_mask(positions, keys), torch.arange(keys, device=positions.device).unsqueeze(0)
        if prefix_lengths is not None:
            first = standing < prefix_lengths.view(hidden.shape[0], -1)
            if span_positions is not None:
                first = first & (span_positions == 0)
            mask = with_prefix(triangle(keys, places.device) if mask is None else mask, first, document_ids)
        whole = self._view(mask, places, keys, 0, hidden.dtype)
        window = self.config.window
        close = self._view(mask, places, keys, window, hidden.dtype) if window else whole
        return Context(positions, tables, whole, close, cache, keys)

    def _unmasked(self, hidden: Tensor, document_ids: Tensor | None, length: int) -> tuple[View, View] | None:
        """What layers without and with a window see, in documents; None where that takes a mask, or nothing at all."""
        window = self.config.window if self.config.window < length else 0
        masked = self.strict or self.config.position.adds_to_scores or not isinstance(self.mask, DocumentMask)
        if masked or (document_ids is None and not window):
            return None
        if not takes_documents(hidden.device, hidden.dtype, self.config.head_size, self.config.score_cap):
            return None
        rows = whole_rows(len(hidden), length, hidden.device) if document_ids is None else find_documents(document_ids)
        if rows is None:
            return None
        whole = View(None, not self._encodes, None if document_ids is None else rows)
        return whole, View(None, whole.causal, replace(rows, window=window)) if window else whole

    def _tables(
        self,
        positions: Tensor,
        document_ids: Tensor | None,
        span_positions: Tensor | None,
        cache: CacheView | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines, [B|1,T,R] each; of two kinds of positions one behind the other."""
        if not self.config.rotary_parts:
            return None
        known = None if cache is None else cache.rotary(positions)
        if known is None:
            lengths = _lengths(positions, document_ids) if self.config.scales_by_length else None
            known = rotary_tables(positions, self.config, dtype, lengths)
        cos, sin = known
        if self.config.rotary_parts == 1:
            return cos, sin
        inner = torch.zeros_like(positions) if span_positions is None else span_positions
        also = rotary_tables(inner, self.config, dtype)
        return torch.cat((cos, also[0]), -1), torch.cat((sin, also[1]), -1)

    def _refuse_unread(self, **inputs: object) -> None:
        reads = {"token_types": self.config.token_types > 0, "cache": not self._encodes}
        reads["cache"] &= self.config.position is not Position.ROTARY_2D  # its positions are no places of a slot
        reads["span_positions"] = self.config.position is Position.ROTARY_2D
        reads["encoder_tokens"] = self.encoder is not None
        reads["prefix_lengths"] = self.config.architecture is Architecture.PREFIX
        for name, value in inputs.items():
            if value is not None and not reads.get(name, False):
                raise UsageError(
                    f"this model (architecture={self.config.architecture}, token_types={self.config.token_types}) "
                    f"takes no {name}; leave it None, or use a family that reads it"
                )

    def _view(self, mask: Tensor | None, places: Tensor, keys: int, window: int, dtype: torch.dtype) -> View:
        """What layers with that window see (0: without one) of what `mask` shows; None shows all up to the query, and
        an encoder all."""
        narrow, bias = 0 < window < keys, self.alibi if self.relative is None else self.relative
        if mask is None and not narrow and bias is None:
            return View(None, causal=not self._encodes)
        if mask is None:
            mask = triangle(keys, places.device)
            mask = torch.ones_like(mask) if self._encodes else mask
        if narrow:
            mask = near(mask, places, window)
        return View(mask if bias is None else bias(mask, places, dtype), causal=False)


def _position_embedding(config: ModelConfig) -> nn.Module | None:
    if config.position is Position.SINUSOIDAL:
        return Sinusoids(config.hidden_size)
    learned = config.position is Position.LEARNED
    return nn.Embedding(config.max_positions, config.hidden_size) if learned else None


def _lengths(positions: Tensor, document_ids: Tensor | None) -> Tensor:
    """[B|1,T|1]: how long the document of each token is."""
    if document_ids is None:
        return positions.amax(1, keepdim=True) + 1
    return document_lengths(positions.expand_as(document_ids), document_ids)


def _across(document_ids: Tensor | None, encoder_document_ids: Tensor | None) -> View:
    """What a decoder's token sees of an encoder's. Padding sees all, so that its rows stay finite."""
    if encoder_document_ids is None:
        return View(None, causal=False)
    if document_ids is None:
        document_ids = encoder_document_ids.amax(1, keepdim=True)
        encoder_document_ids = (encoder_document_ids > 0) * document_ids
    return View(between(document_ids, encoder_document_ids), causal=False)


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
