"""Log-probabilities (and entropy) of labels straight from hidden states, without keeping the logits."""

from torch import Tensor

from cuda_ext import dispatch
from cuda_ext.linear_log_probs import reference


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `reference.linear_log_probs`. hidden[M,D], weight[V,D], targets[M] -> (log_probs[M], entropy[M] or None)."""
    dispatch.announce("linear_log_probs", dispatch.REFERENCE)
    return reference.linear_log_probs(hidden, weight, targets, bias, temperature, vocab_size, with_entropy)


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """See `reference.log_softmax`. logits[..., V] -> [..., V], the bits that `linear_log_probs` gives."""
    return reference.log_softmax(logits, temperature)
