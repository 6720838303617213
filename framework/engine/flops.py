"""How much arithmetic a step is worth, in the field's two conventions, and the share of the hardware's peak it reaches.

    parameters   6 N a token (Kaplan et al. 2020; Chowdhery et al. 2022 without attention): N counts every weight that
                 multiplies, the output head with them. Simple, and what most published MFU figures mean.
    exact        the head only where a label counts, and attention over the keys that a causal query really sees:
                 12 N H a key of each layer (scores and mixture, forward and twice backward)
A multiply-add counts as 2, backward as twice forward; norms, softmax and recomputation count as nothing; padding is no
work. Left out: what the kernels really execute (torch's FlopCounterMode tells).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from framework.models.config import ModelConfig

if TYPE_CHECKING:
    from framework.core.records import Rows  # torch, which `framework models` answers without


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
    hidden = config.hidden_size
    attention = hidden * config.head_size * 2 * (config.num_heads + config.kv_heads)
    feed_forward = hidden * config.feed_forward_size * (3 if config.activation.is_gated else 2)
    return config.num_layers * (attention + feed_forward), hidden * config.vocab_size


def forward_flops(config: ModelConfig, keys: int = 0) -> int:
    """Of one token's way forward: 2 a multiplied weight, and 4 N H (scores, mixture) a layer and key that it sees.
    `keys` counts the token itself; a window lets fewer through."""
    narrow = sum(config.windowed(layer) for layer in range(config.num_layers))
    seen = (config.num_layers - narrow) * keys + (narrow * min(keys, config.window) if narrow else 0)
    return 2 * sum(multiplied_weights(config)) + 4 * config.num_heads * config.head_size * seen


def training_work(config: ModelConfig, rows: Rows, scores_labels: bool = True) -> Work:
    """Of forward and backward over `rows`. `scores_labels` False: the output head does not run (critic, classifier)."""
    inputs = rows.inputs()
    real = inputs.document_ids > 0
    tokens, labels = int(real.sum()), int(inputs.loss_mask.sum())
    seen, narrow = inputs.positions + 1, sum(config.windowed(layer) for layer in range(config.num_layers))
    keys = (config.num_layers - narrow) * int((seen * real).sum())
    keys += narrow * int((seen.clamp(max=config.window) * real).sum()) if narrow else 0
    layers, head = multiplied_weights(config)
    head *= scores_labels
    attention = 12 * config.num_heads * config.head_size * keys
    return Work(tokens, 6.0 * (layers + head) * tokens, 6.0 * (layers * tokens + head * labels) + attention)


def utilisation(flops: float, seconds: float, peak_flops: float) -> float:
    """MFU: the share of `peak_flops` (a second, all ranks together) that `flops` in `seconds` make."""
    return flops / seconds / peak_flops
