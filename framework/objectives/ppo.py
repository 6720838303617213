"""The two losses of proximal policy optimisation (Schulman et al. 2017), and how well the critic explains the returns.

Shapes: B rows, T tokens; all tensors at token positions. A position with weight 0 does not count: whatever stands
there, NaN included, reaches neither loss nor gradient.
"""

import torch
from torch import Tensor

from framework.core.errors import UsageError
from framework.core.masked import counting, ratio
from framework.core.records import Metrics
from framework.core.registry import register


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    denominator: Tensor | float,
    clip_low: float,
    clip_high: float,
    level: str = "token",
) -> tuple[Tensor, Metrics]:
    """L = -(1/D) Σ_bt w_bt min(ρ_bt A_bt, clip(ρ_bt, 1 - clip_low, 1 + clip_high) A_bt)  (Schulman et al., eq. 7).

    level "token": ρ_bt = π(y_t) / π_old(y_t). level "sequence": ρ_bt = (π(y) / π_old(y))^(1/|y|) for every t of row b,
    |y| its number of counting tokens (Zheng et al. 2025, GSPO, eq. 7). Two clip bounds: Yu et al. 2025, DAPO, eq. 8.

    log_probs (with gradient), old_log_probs, advantages [B, T] float. weights [B, T] float or bool ≥ 0 and D say what
    is averaged: mask and number of tokens for the mean over tokens; mask / length and number of sequences for the
    mean over sequences; mask and a constant for Dr. GRPO's sum. D is of the whole optimizer step. Where π = π_old,
    ρ = 1 exactly and L = -Σ w A / D. The log-ratio is not clamped (verl: ±20), so an absurd one stops the run.

    Metrics, means by weight: `policy_loss`; `approx_kl`, the k3 estimate of KL(π_old ‖ π) in nats a token;
    `clip_fraction`, where the clip took the gradient away (below the low bound with A < 0, above the high one with
    A > 0; CleanRL counts every ratio out of bounds), and its parts `clip_fraction_low` and `clip_fraction_high`;
    `ratio`; `ratio_deviation`, |ρ - 1|, exactly 0 in the first update (law On-policy).
    """
    counts = weights > 0
    advantages = counting(advantages, counts)
    log_ratio = counting(log_probs - old_log_probs, counts)
    if level == "sequence":
        lengths = counts.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(dim=1, keepdim=True) / lengths).expand_as(log_ratio)
    elif level != "token":
        raise UsageError(f"unknown policy_loss level '{level}'; choose token or sequence")
    ratios = log_ratio.exp()
    kept = ratios.clamp(1 - clip_low, 1 + clip_high)
    losses = -torch.minimum(ratios * advantages, kept * advantages)
    low = (ratios < 1 - clip_low) & (advantages < 0)
    high = (ratios > 1 + clip_high) & (advantages > 0)
    figures = {
        "policy_loss": losses,
        "approx_kl": torch.expm1(log_ratio) - log_ratio,
        "clip_fraction": (low | high).to(losses.dtype),
        "clip_fraction_low": low.to(losses.dtype),
        "clip_fraction_high": high.to(losses.dtype),
        "ratio": ratios,
        "ratio_deviation": (ratios - 1).abs(),
    }
    return ratio((weights * losses).sum(), denominator), _means(figures, weights)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    weights: Tensor,
    denominator: Tensor | float,
    clip: float,
) -> tuple[Tensor, Metrics]:
    """L = (1/D) Σ_bt w_bt ½ max((V - R)², (V_old + clip(V - V_old, ±clip) - R)²).

    The clipped value loss of OpenAI's baselines, with its ½. values (with gradient), old_values (the critic's before
    the update), returns [B, T] float, in units of reward. weights and denominator as in `policy_loss`.

    Metrics, means by weight: `value_loss`; `value_clip_fraction`, where the clipped square is the larger; `value`
    (of V_old); `return`; and `return_square`, `return_error`, `return_error_square` (of R - V_old), from which
    `explained_variance` comes after the sums over ranks.
    """
    values, old_values, returns = (counting(x, weights > 0) for x in (values, old_values, returns))
    near = old_values + (values - old_values).clamp(-clip, clip)
    squares, clipped = (values - returns).square(), (near - returns).square()
    losses = torch.maximum(squares, clipped) / 2
    error = returns - old_values
    figures = {
        "value_loss": losses,
        "value_clip_fraction": (clipped > squares).to(losses.dtype),
        "value": old_values,
        "return": returns,
        "return_square": returns.square(),
        "return_error": error,
        "return_error_square": error.square(),
    }
    return ratio((weights * losses).sum(), denominator), _means(figures, weights)


def explained_variance(returns: float, return_square: float, return_error: float, return_error_square: float) -> float:
    """1 - Var(R - V) / Var(R) from the means of `value_loss`'s metrics, exact over any split; 0 where R never varies.

    1: the critic predicts the returns; 0: no better than a constant; below 0: worse than that.
    """
    variance = return_square - returns**2
    return 1.0 - (return_error_square - return_error**2) / variance if variance > 0 else 0.0


@register("policy_loss", "clip")
def clipped_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    denominator: Tensor | float,
    clip_low: float,
    clip_high: float,
    *,
    entropy: Tensor,
    reference_log_probs: Tensor,
) -> tuple[Tensor, Metrics]:
    """PPO's: a ratio for each token. A registered policy_loss is called as this one is: `entropy` (with gradient) and
    `reference_log_probs`, [B, T] at token positions, are there for terms of one's own. One that is a sum over tokens,
    each by itself, may say so as this one does (`pointwise`): it is given response tokens alone, all of them [M], M may
    be 0, and kernels take it chunk by chunk, so that logits are computed once."""
    return policy_loss(log_probs, old_log_probs, advantages, weights, denominator, clip_low, clip_high)


clipped_policy_loss.pointwise = True  # type: ignore[attr-defined]


@register("policy_loss", "gspo")
def sequence_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    denominator: Tensor | float,
    clip_low: float,
    clip_high: float,
    *,
    entropy: Tensor,
    reference_log_probs: Tensor,
) -> tuple[Tensor, Metrics]:
    """GSPO's: one length-normalised ratio for a response; its bounds are narrower by far (Zheng et al.: 3e-4, 4e-4)."""
    return policy_loss(
        log_probs, old_log_probs, advantages, weights, denominator, clip_low, clip_high, level="sequence"
    )


def _means(figures: dict[str, Tensor], weights: Tensor) -> Metrics:
    """(Σ w x, Σ w) of each [B, T] tensor, which is finite where w = 0."""
    return {name: ((weights * x.detach()).sum(), weights.sum().to(x.dtype)) for name, x in figures.items()}
