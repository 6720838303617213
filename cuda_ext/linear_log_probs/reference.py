"""Log-probabilities of labels from hidden states: the definition. Logits exist for one chunk of rows at a time.

The backward pass is written out, for the sake of memory: autograd's fills three tables M x V with zeros and gradients,
which took a tenth of a small model's step (`launch/bench model`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = 1 << 25  # logits held at once, 128 MiB in fp32
_CACHED_LOGITS = 1 << 18  # of which a CPU works on about so many at a time: 1 MiB, in cache (measured)


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


def log_softmax(logits: Tensor, temperature: float = 1.0, out: Tensor | None = None) -> Tensor:
    """Log-probabilities of logits[..., V] at `temperature`, in at least fp32, written to `out` if given: the one way
    from logits to log-probs, so that a generator which has logits agrees bit for bit with a trainer which has hidden
    states."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide if temperature == 1.0 else wide / temperature, -1, out=out)


def _score(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    keep = torch.is_grad_enabled()
    log_probs, entropy = _Score.apply(hidden, weight, targets, bias, temperature, with_entropy, keep)
    return log_probs, entropy


class _Score(torch.autograd.Function):
    """Forward and backward stretch by stretch, so that on a CPU logits and their gradients stay in its cache: of all
    tables [M,V] only that of the log-probabilities is ever whole. With p = softmax(z), g and h the gradients of
    log_probs and entropy H: dz_j = g (1[j = target] - p_j) - h p_j (log p_j + H)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        temperature: float,
        with_entropy: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """See `linear_log_probs`; without `keep` the table is forgotten stretch by stretch."""
        log_probs = hidden.new_empty(len(hidden))
        entropy = torch.empty_like(log_probs) if with_entropy else None
        table = hidden.new_empty(len(hidden), len(weight)) if keep else None
        for rows in _stretches(hidden, weight):
            out = None if table is None else table[rows]
            part = log_softmax(F.linear(hidden[rows], weight, bias), temperature, out)
            log_probs[rows] = part.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
            if entropy is not None:
                entropy[rows] = -(part.exp() * part).sum(1)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, targets, bias, table, entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_log_probs: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias, each only where it is wanted."""
        hidden, weight, targets, bias, table, entropy = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[at] for at in (0, 1, 3)]
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(x) if want else None for x, want in zip((hidden, weight, bias), wanted, strict=True)
        )
        g = torch.zeros_like(table[:, 0]) if of_log_probs is None else of_log_probs
        for rows in _stretches(hidden, weight):
            d = table[rows].exp()
            if of_entropy is None:
                d *= -g[rows].unsqueeze(1)
            else:
                h = of_entropy[rows].unsqueeze(1)
                d *= -g[rows].unsqueeze(1) - h * (table[rows] + entropy[rows].unsqueeze(1))
            d.scatter_add_(1, targets[rows].unsqueeze(1), g[rows].unsqueeze(1))
            if ctx.temperature != 1.0:
                d /= ctx.temperature
            if of_hidden is not None:
                torch.mm(d, weight, out=of_hidden[rows])
            if of_weight is not None:
                torch.addmm(of_weight, d.t(), hidden[rows], out=of_weight)  # torch counts no work of `addmm_`
            if of_bias is not None:
                of_bias += d.sum(0)
        return of_hidden, of_weight, None, of_bias, None, None, None


def _stretches(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Of rows. A stretch reads the weight twice and its gradient once: below twice as many rows as the weight is wide,
    that would be more to move than the logits are."""
    rows = max(_CACHED_LOGITS // len(weight), 2 * weight.shape[1]) // 8 * 8 if hidden.device.type == "cpu" else 0
    rows = rows or max(8, len(hidden))
    return [slice(start, start + rows) for start in range(0, len(hidden), rows)]
