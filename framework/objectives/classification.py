"""Losses of whole sequences: one class of several, or one number.

Rows that only fill up a batch are left out by the caller (`record.select`). Left out: several classes at once.
"""

import torch
from torch import Tensor

from framework.core.masked import ratio
from framework.core.records import Metrics


def classification_loss(logits: Tensor, labels: Tensor, num_sequences: Tensor | float) -> tuple[Tensor, Metrics]:
    """Cross-entropy in nats a sequence: L = -(1/N) Σ_b log softmax(logits_b)[label_b]  (Devlin et al. 2018, sec. 4.1).

    logits [B, C] float. labels [B] int64 in range(C). num_sequences: N of the whole optimizer step. At equal logits the
    loss is ln C.

    Metrics: `loss`; `accuracy`, the share whose label has the largest logit (of equal ones the first).
    """
    losses = -torch.log_softmax(logits, dim=-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    right = logits.argmax(dim=-1) == labels
    return ratio(losses.sum(), num_sequences), _means(losses, loss=losses, accuracy=right)


def regression_loss(values: Tensor, targets: Tensor, num_sequences: Tensor | float) -> tuple[Tensor, Metrics]:
    """Mean squared error: L = (1/N) Σ_b (value_b - target_b)², without a half, as transformers has it.

    values, targets [B] float. num_sequences: N of the whole optimizer step.

    Metrics: `loss`, whose root is the RMSE; a root is no mean, so whoever reports takes it last. `absolute_error`.
    """
    errors = values - targets.to(values.dtype)
    squares = errors.square()
    return ratio(squares.sum(), num_sequences), _means(squares, loss=squares, absolute_error=errors.abs())


def _means(like: Tensor, **rows: Tensor) -> Metrics:
    """(sum, number of rows) of each [B] tensor."""
    weight = like.new_tensor(len(like))
    return {name: (x.detach().to(like.dtype).sum(), weight) for name, x in rows.items()}
