"""The loss of pretraining and SFT. How hidden states become log-probs is the Scorer's matter."""

from torch import Tensor

from framework.core.masked import masked_sum, ratio
from framework.core.records import Metrics


def next_token_loss(log_probs: Tensor, loss_mask: Tensor, num_tokens: Tensor | float) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood in nats a token: L = -(1/N) Σ_bt m_bt log p(label_bt | tokens_b,≤t).

    log_probs [B, T] float: of the labels, at prediction positions. loss_mask [B, T] bool. num_tokens: N, the number of
    True entries of the *whole* optimizer step, over all micro-batches and ranks; so long rows weigh more than short
    ones, as in pretraining everywhere and in SFT since transformers 4.46.

    Metrics: `loss`, nats a token; `perplexity` is its exponential and no mean, so whoever reports takes it last.
    """
    total = -masked_sum(log_probs, loss_mask)
    return ratio(total, num_tokens), {"loss": (total.detach(), loss_mask.sum().to(total.dtype))}
