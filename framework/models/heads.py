"""What stands on the hidden states besides the language head's weight, which belongs to the Transformer."""

import torch.nn.functional as F
from torch import Tensor, nn

from cuda_ext.linear_log_probs.op import linear_log_probs


class LogProbs(nn.Module):
    """Log-probabilities of labels. Without parameters, so that a plan can put a vocabulary-parallel one here."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """hidden[M,D], weight[V,D], labels[M] -> (log_probs[M], entropy[M] or None), in at least fp32."""
        # Rows in eights, strict or not: how many labels count differs from batch to batch, and a row must have the same
        # bits in the update as when it was inferred (law On-policy).
        count = len(hidden)
        hidden, labels = F.pad(hidden, (0, 0, 0, -count % 8)), F.pad(labels, (0, -count % 8))
        log_probs, entropy = linear_log_probs(
            hidden, weight, labels, temperature=self.temperature, vocab_size=vocab_size, with_entropy=with_entropy
        )
        return log_probs[:count], None if entropy is None else entropy[:count]
