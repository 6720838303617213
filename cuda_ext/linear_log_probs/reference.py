"""Log-probabilities of labels from hidden states: the definition. Logits exist for one chunk of rows at a time.

A backward pass written out by hand was no faster on a CPU (M=2048, D=96, V=2500: within noise); autograd's is kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = 1 << 25  # logits held at once, 128 MiB in fp32


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax((hidden weight^T + bias) / temperature)[targets], and that distribution's entropy in nats.

    hidden[M,D], weight[V,D], targets[M] int64, bias[V] -> (log_probs[M], entropy[M] or None), products and sums in at
    least fp32. Rows of `weight` from `vocab_size` on are padding and have no probability. Where M x V is large, rows
    go in chunks whose logits are computed again in the backward pass instead of being kept.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if vocab_size not in (None, len(weight)):  # a slice of all would cost a zeroed gradient and its copy
        weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    hidden, weight, bias = hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    rows = max(8, _CHUNK_LOGITS // len(weight) // 8 * 8)  # eights: strict mode needs them
    if len(hidden) <= rows:
        return _score(hidden, weight, targets, bias, temperature, with_entropy)
    parts = [
        checkpoint(_score, h, weight, t, bias, temperature, with_entropy, use_reentrant=False)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    entropy = torch.cat([part[1] for part in parts]) if with_entropy else None
    return torch.cat([part[0] for part in parts]), entropy


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of logits[..., V] at `temperature`, in at least fp32: the one way from logits to log-probs, so
    that a generator which has logits agrees bit for bit with a trainer which has hidden states."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide if temperature == 1.0 else wide / temperature).log_softmax(-1)


def _score(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    table = log_softmax(F.linear(hidden, weight, bias), temperature)
    log_probs = table.gather(1, targets.unsqueeze(1)).squeeze(1)
    return log_probs, -(table.exp() * table).sum(1) if with_entropy else None
