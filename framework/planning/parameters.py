"""Every parameter's shape, and how tensor ranks cut it: the model as a table, free of torch.

A table is a list of Entry; a block's is the same for every layer, but for experts, which some may lack; the rest
("root") depends on which ends of the model a pipeline stage has. Left out: who holds what of it (`memory`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from framework.models.config import Architecture, Bias, ModelConfig, Norm, NormPlace, Position


@dataclass(frozen=True)
class Entry:
    """One parameter: its shape, and the dimension that tensor ranks share out; None where each holds it whole.

    Example, the way down of a feed-forward block: Entry((512, 1376), 1).
    """

    shape: tuple[int, ...]
    cut: int | None = None
    embeds: bool = False

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def decayed(self) -> bool:
        """As `optim.build.is_decayed`: those that are and those that are not are updated apart."""
        return len(self.shape) >= 2 and not self.embeds

    def on(self, place: int, ranks: int) -> tuple[int, ...]:
        """What tensor rank `place` of `ranks` holds, as `parallel.tensor.span` cuts it."""
        if self.cut is None:
            return self.shape
        size = self.shape[self.cut]
        part = size * (place + 1) // ranks - size * place // ranks
        return (*self.shape[: self.cut], part, *self.shape[self.cut + 1 :])


Table = Sequence[Entry]


def num_parameters(model: ModelConfig) -> int:
    """Exact number of parameters of the transformer (heads for values or classes not counted)."""
    blocks = [block(model, layer) for layer in range(model.num_layers)] + encoder_blocks(model)
    return count(root(model)) + sum(map(count, blocks))


def active_parameters(model: ModelConfig) -> int:
    """Of those, how many one token meets: of the experts of a layer the chosen ones."""
    idle = model.moe.experts - model.moe.top_k
    layers = sum(map(model.moe.at, range(model.num_layers)))
    return num_parameters(model) - layers * idle * 3 * model.hidden_size * model.expert_size


def kv_bytes(model: ModelConfig, number: int = 2) -> int:
    """What each token leaves in the cache of keys and values, in numbers of so many bytes (2: bf16); an encoder
    leaves nothing."""
    if model.architecture is Architecture.ENCODER:
        return 0
    return 2 * model.num_layers * model.kv_heads * model.head_size * number


def count(table: Table) -> int:
    """Elements of all parameters, whole."""
    return sum(entry.size for entry in table)


def block(model: ModelConfig, layer: int = 0) -> list[Entry]:
    """One layer: attention, to an encoder too where there is one, feed-forward or experts, norms."""
    table = _attention(model) + (_attention(model) + _norm(model) if model.encoder else [])
    table += _mixture(model) if model.moe.at(layer) else _feed_forward(model, model.feed_forward_size)
    return table + (4 if model.norm_place is NormPlace.SANDWICH else 2) * _norm(model)


def encoder_blocks(model: ModelConfig) -> list[list[Entry]]:
    """The layers of an encoder beside a decoder."""
    own = model.encoder
    return [block(own, layer) for layer in range(own.num_layers)] if own else []


def _attention(model: ModelConfig) -> list[Entry]:
    hidden, bias = model.hidden_size, model.attention_bias
    queries, keys = model.num_heads * model.head_size, model.kv_heads * model.head_size
    table = [entry for size in (queries, keys, keys) for entry in _columns(hidden, size, bias is not Bias.NONE)]
    return table + _rows(queries, hidden, bias is Bias.ALL) + [Entry((model.head_size,))] * (2 if model.qk_norm else 0)


def _feed_forward(model: ModelConfig, inner: int) -> list[Entry]:
    hidden, ups = model.hidden_size, 2 if model.activation.is_gated else 1
    return ups * _columns(hidden, inner, model.mlp_bias) + _rows(inner, hidden, model.mlp_bias)


def _mixture(model: ModelConfig) -> list[Entry]:
    """Router, experts (each cut along its own inner size), what every token takes beside them."""
    moe, hidden, inner = model.moe, model.hidden_size, model.expert_size
    stacks = [Entry((moe.experts, inner, hidden), 1)] * 2 + [Entry((moe.experts, hidden, inner), 2)]
    shared = _feed_forward(model, moe.shared) if moe.shared else []
    return [Entry((moe.experts, hidden)), *stacks, *shared, *([Entry((1, hidden))] if moe.shared_gate else [])]


def root(model: ModelConfig, first: bool = True, last: bool = True, classes: int = 0) -> list[Entry]:
    """What a stage holds besides its layers. A stage that has only one end of a tied model has the matrix as well.

    `classes`: rows of a value or class head, which takes the language head's place.
    """
    table = Entry((model.vocab_size, model.hidden_size), 0, embeds=True)
    matrix = replace(table, embeds=model.tied)
    learned = (
        [Entry((model.max_positions, model.hidden_size), embeds=True)] if model.position is Position.LEARNED else []
    )
    types = [Entry((model.token_types, model.hidden_size), embeds=True)] if model.token_types else []
    relative = [Entry((model.relative_buckets, model.num_heads), 1, embeds=True)] * (
        model.position is Position.RELATIVE
    )
    read = [*relative, *_norm(model)] if model.encoder else []
    tables = [table, *learned, *types, *relative, *read]
    begin = [*tables, *(_norm(model) if model.embedding_norm else [])] if first else []
    norm = _norm(model) if model.ends_with_norm else []
    head = [] if classes or (model.tied and first) else [matrix]
    transform = _transform(model) if model.head_transform and not classes else []
    return begin + (norm + transform + head + _classes(model, classes) if last else [])


def _transform(model: ModelConfig) -> list[Entry]:
    """In front of the logits, and what is added to them."""
    size = model.hidden_size
    return [Entry((size, size)), Entry((size,)), *_norm(model), Entry((model.vocab_size,), 0)]


def _classes(model: ModelConfig, classes: int) -> list[Entry]:
    """A head for so many values or classes, an encoder's with its pooler."""
    size = model.hidden_size
    pooled = model.architecture is Architecture.ENCODER
    pooler = [Entry((classes,)), Entry((size, size)), Entry((size,))] if pooled else []
    return [Entry((classes, size)), *pooler] if classes else []


def _columns(inputs: int, outputs: int, bias: bool) -> list[Entry]:
    return [Entry((outputs, inputs), 0)] + ([Entry((outputs,), 0)] if bias else [])


def _rows(inputs: int, outputs: int, bias: bool) -> list[Entry]:
    return [Entry((outputs, inputs), 1)] + ([Entry((outputs,))] if bias else [])


def _norm(model: ModelConfig) -> list[Entry]:
    return [Entry((model.hidden_size,))] * (2 if model.norm is Norm.LAYER else 1)
