"""Terms added to a loss to keep the policy from narrowing too soon."""

from torch import Tensor

from framework.core.masked import counting, ratio
from framework.core.records import Metrics


def entropy_loss(entropy: Tensor, weights: Tensor, denominator: Tensor | float) -> tuple[Tensor, Metrics]:
    """L = -(1/D) Σ_bt w_bt H_bt: to be added to a policy loss times the entropy coefficient (Mnih et al. 2016).

    entropy [B, T] float: of the next-token distribution at the rollout temperature, in nats, at token positions.
    weights [B, T] ≥ 0, 0 = does not count. denominator: D of the whole optimizer step.

    Metrics: `entropy`, nats a token.
    """
    total = (weights * counting(entropy, weights > 0)).sum()
    return -ratio(total, denominator), {"entropy": (total.detach(), weights.sum().to(total.dtype))}
