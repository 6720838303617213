"""How much arithmetic a step is worth, in the field's two conventions, and the share of the hardware's peak it reaches.

    parameters   6 N a token (Kaplan et al. 2020; Chowdhery et al. 2022 without attention): N counts every weight that
                 multiplies a token, the output head and the chosen experts with them. Simple, and what most published
                 MFU figures mean.
    exact        the head only where a label counts, and attention over the keys that a causal query really sees:
                 12 N H a key of each layer (scores and mixture, forward and twice backward)
A multiply-add counts as 2, backward as twice forward; norms, softmax and recomputation count as nothing; padding is no
work. Left out: what the kernels really execute (torch's FlopCounterMode tells).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from framework.models.config import Architecture, ModelConfig
from framework.models.frozen import BEHIND_THE_LAYERS

if TYPE_CHECKING:  # torch, which `framework models` answers without
    from torch import Tensor

    from framework.core.records import Rows, TokenBatch


@dataclass(frozen=True)
class Work:
    """What some rows are worth. Example: Work(tokens=4096, parameters=1.2e10, exact=1.4e10)."""

    tokens: float = 0.0
    parameters: float = 0.0  # FLOPs by the 6 N convention
    exact: float = 0.0  # FLOPs by the exact one

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.parameters + other.parameters, self.exact + other.exact)


def multiplied_weights(config: ModelConfig) -> tuple[int, int]:
    """Weights that multiply every token: (of all layers, of the output head)."""
    layers = sum(layer_weights(config, layer) for layer in range(config.num_layers))
    transform = config.hidden_size if config.head_transform else 0
    return layers, config.hidden_size * (config.vocab_size + transform)


def layer_weights(config: ModelConfig, layer: int) -> int:
    """Weights of a layer that multiply every token: of its experts, as many as a token takes."""
    return config.hidden_size * sum(_matrices(config, layer).values())


def _matrices(config: ModelConfig, layer: int) -> dict[str, int]:
    """Name of each matrix -> weights that multiply a token / hidden_size."""
    size, moe = config.head_size, config.moe
    matrices = {"attention.q": config.num_heads * size, "attention.o": config.num_heads * size}
    matrices |= dict.fromkeys(("attention.k", "attention.v"), config.kv_heads * size)
    if config.encoder:
        matrices |= dict.fromkeys(("cross.q", "cross.o"), config.num_heads * size)
    leaves = ("gate", "up", "down") if config.activation.is_gated else ("up", "down")
    if not moe.at(layer):
        return matrices | {f"mlp.{leaf}": config.feed_forward_size for leaf in leaves}
    matrices |= {"mlp.router": moe.experts, "mlp.shared_gate": int(moe.shared_gate)}
    matrices |= {f"mlp.experts.{leaf}": moe.top_k * config.expert_size for leaf in leaves}
    return matrices | {f"mlp.shared.{leaf}": moe.shared for leaf in leaves}


def forward_flops(config: ModelConfig, keys: int = 0) -> int:
    """Of one token's way forward: 2 a multiplied weight, and 4 N H (scores, mixture) a layer and key that it sees.
    `keys` counts the token itself; a window lets fewer through."""
    narrow = sum(config.windowed(layer) for layer in range(config.num_layers))
    seen = (config.num_layers - narrow) * keys + (narrow * min(keys, config.window) if narrow else 0)
    return 2 * sum(multiplied_weights(config)) + 4 * config.num_heads * config.head_size * seen


def training_work(
    config: ModelConfig, rows: Rows, scores_labels: bool = True, frozen: frozenset[str] = frozenset()
) -> Work:
    """Of forward and backward over `rows`. `scores_labels` False: the output head does not run (critic, classifier).

    `frozen`: names of parameters that do not learn; a pass backward then ends in front of the first layer that does.
    An adapter's own products are not counted, and an encoder beside a decoder as if all of it learned.
    """
    inputs = rows.inputs()
    read = _reading_work(config, inputs) if config.encoder else Work()
    real = inputs.document_ids > 0
    tokens, labels = int(real.sum()), int(inputs.loss_mask.sum())
    near, far = (int((_seen(config, inputs, window) * real).sum()) for window in (config.window, 0))
    layers = head = attention = 0
    for layer in range(config.num_layers):
        weights, passes = _multiplied(config, layer, frozen)
        layers += weights
        attention += passes * (near if config.windowed(layer) else far)
    if scores_labels:
        head_name = "embedding.weight" if config.tied else "head.weight"
        head = multiplied_weights(config)[1] * (2 + (head_name not in frozen))
    per_key = 4 * config.num_heads * config.head_size
    exact = 2.0 * (layers * tokens + head * labels) + per_key * attention
    return Work(tokens, 2.0 * (layers + head) * tokens, exact) + read


def _reading_work(config: ModelConfig, inputs: TokenBatch) -> Work:
    """Of an encoder over what it reads, and of the keys, values and scores that a decoder makes of that."""
    assert config.encoder is not None
    assert inputs.source is not None
    encoder = training_work(config.encoder, inputs.source, scores_labels=False)
    keys = 2 * config.kv_heads * config.head_size * config.hidden_size * config.num_layers
    made = 6.0 * keys * encoder.tokens
    pairs = (inputs.document_ids.unsqueeze(2) == inputs.source.document_ids.unsqueeze(1)).sum((1, 2))
    padding = (inputs.document_ids == 0).sum(1) * (inputs.source.document_ids == 0).sum(1)
    scores = 12.0 * config.num_heads * config.head_size * config.num_layers * float((pairs - padding).sum())
    return Work(encoder.tokens, encoder.parameters + made, encoder.exact + made + scores)


def _seen(config: ModelConfig, inputs: TokenBatch, window: int) -> Tensor:
    """[B,T]: how many keys each query meets; window 0: all before it, and what an encoder or a prefix shows ahead."""
    seen = inputs.positions + 1
    if config.architecture is Architecture.ENCODER:
        return inputs.lengths()
    if config.architecture is Architecture.PREFIX and inputs.prefix_lengths is not None:
        if inputs.span_positions is not None:  # places in the row, for those of a span all stand at its mask
            at = seen.new_ones(seen.shape).cumsum(1)
            first = at.new_full((len(at), int(inputs.document_ids.max()) + 1), seen.shape[1])
            first = first.scatter_reduce(1, inputs.document_ids, at, "amin")
            seen = at - first.gather(1, inputs.document_ids) + 1
        return seen.maximum(inputs.prefix_lengths)
    return seen.clamp(max=window) if window else seen


@functools.lru_cache(maxsize=1024)
def _multiplied(config: ModelConfig, layer: int, frozen: frozenset[str]) -> tuple[int, int]:
    """(weights x passes, passes of attention's scores) of a layer: once forward, once for the gradient of what it took
    in, once for its own. Nothing goes back into a layer if nothing up to there learns."""
    matrices = _matrices(config, layer)
    own = sum(rows for name, rows in matrices.items() if f"layers.{layer}.{name}.weight" not in frozen)
    reached = layer >= _first_learning(config, frozen)
    passes = 1 + reached
    return config.hidden_size * (passes * sum(matrices.values()) + own), 3 if reached else 1


@functools.lru_cache(maxsize=64)
def _first_learning(config: ModelConfig, frozen: frozenset[str]) -> int:
    """The first layer that learns, 0 where something in front of the layers does, their number where none does."""
    from framework.models.init import parameter_shapes  # torch

    names = [name.split(".") for name in parameter_shapes(config) if name not in frozen]
    behind = dict.fromkeys(BEHIND_THE_LAYERS, config.num_layers)
    first = (int(rest[0]) if module == "layers" else behind.get(module, 0) for module, *rest in names)
    return min(first, default=0)  # nothing of its own: an adapter


def utilisation(flops: float, seconds: float, peak_flops: float) -> float:
    """MFU: the share of `peak_flops` (a second, all ranks together) that `flops` in `seconds` make."""
    return flops / seconds / peak_flops
