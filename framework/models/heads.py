"""What stands on the hidden states besides the language head's weight, which belongs to the Transformer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cuda_ext.linear_log_probs.op import linear_log_probs, uses_kernel
from cuda_ext.linear_log_probs.token_loss import TokenLoss, linear_token_loss
from framework.core.records import Metrics
from framework.models.config import ModelConfig
from framework.models.layers import Linear, activation, build_norm


class HeadTransform(nn.Module):
    """norm(act(dense(x))), between the last layer and the logits (Devlin et al. 2018, as published)."""

    def __init__(self, config: ModelConfig, strict: bool):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, True, strict)
        self.norm = build_norm(config)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        """x[..., D] -> [..., D]."""
        y: Tensor = self.norm(activation(self.dense(x), self.activation))
        return y


class OutputBias(nn.Module):
    """What is added to the logits: bias[V]. A module, so that a plan can cut it as it cuts the vocabulary."""

    def __init__(self, size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(size))


class Pooler(Linear):
    """tanh(dense(x)) of a row's first state: what an encoder's class head reads (Devlin et al. 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        """x[B,D] -> [B,D]."""
        return super().forward(x).tanh()


class LogProbs(nn.Module):
    """Log-probabilities of labels. Without parameters, so that a plan can put a vocabulary-parallel one here."""

    def __init__(self, temperature: float, strict: bool = False):
        super().__init__()
        self.temperature, self.strict = temperature, strict

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        vocab_size: int,
        with_entropy: bool,
        token_loss: TokenLoss | None = None,
        rows: Any = None,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Metrics]:
        """hidden[M,D], weight[V,D], bias[V], labels[M] -> (log_probs[M], entropy[M] or None), in at least fp32. With
        `token_loss`, its (loss, metrics) of these and `rows`, a record of [M]; by the kernel chunk by chunk."""
        if token_loss is not None and uses_kernel(hidden, weight, self.strict):
            return linear_token_loss(
                hidden, weight, labels, token_loss, rows, bias, self.temperature, vocab_size, with_entropy
            )
        # Rows in eights, strict or not: how many labels count differs from batch to batch, and a row must have the same
        # bits in the update as when it was inferred (law On-policy).
        count = len(hidden)
        hidden, labels = F.pad(hidden, (0, 0, 0, -count % 8)), F.pad(labels, (0, -count % 8))
        log_probs, entropy = linear_log_probs(
            hidden, weight, labels, bias, self.temperature, vocab_size, with_entropy, strict=self.strict
        )
        scores = log_probs[:count], None if entropy is None else entropy[:count]
        return scores if token_loss is None else token_loss(*scores, rows)
