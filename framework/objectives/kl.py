"""How far the policy has gone from the reference, how that is paid for, and how the price adapts."""

from collections.abc import Callable

import torch
from torch import Tensor

from framework.core.errors import UsageError, nearest
from framework.core.masked import counting


def estimate_kl(log_probs: Tensor, reference_log_probs: Tensor, kind: str) -> Tensor:
    """KL(π ‖ π_ref) of each token in nats, from tokens drawn from π (Schulman 2020, "Approximating KL divergence").

    With d = log π - log π_ref:   k1 = d   k2 = d²/2   k3 = e^(-d) - 1 + d

    log_probs, reference_log_probs: one shape; returns it. k1 is unbiased and may be negative, k3 is unbiased and
    never negative, k2 is biased with little variance. Nothing is clamped (OpenRLHF clamps all three to ±10, verl k3).
    Made for rewards and reports: as a *loss* only k2 has the right gradient.
    """
    if kind not in _ESTIMATORS:
        raise UsageError(f"unknown KL estimator '{kind}': {nearest(kind, _ESTIMATORS)}")
    return _ESTIMATORS[kind](log_probs - reference_log_probs)


_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(-d) + d,
}


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, coefficient: float) -> Tensor:
    """r_bt = -β kl_bt + [t is the last response token] score_b  (Ziegler et al. 2019, eq. 2, spread over the tokens).

    scores [B], kl [B, T], response_mask [B, T] bool, β = coefficient; returns [B, T], zero outside the response.
    The score stands on the last token that counts, the end token where there is one (trl up to 1.12 put it one
    later); a row with no response gets none. Nothing is clipped: clip scores before, where wanted, never the KL.
    """
    penalty = -coefficient * counting(kl, response_mask)
    return torch.where(_last(response_mask), penalty + scores[:, None], penalty)


def adapt_coefficient(coefficient: float, kl: float, target: float, horizon: float, num_sequences: int) -> float:
    """The next KL coefficient: β (1 + clip(kl/target - 1, ±0.2) n/horizon)  (Ziegler et al. 2019, section 2.2).

    kl and target in nats a response, as measured under `coefficient`; n = num_sequences responses were drawn since
    the last call; horizon in responses. OpenAI used β = 0.15, target 6, horizon 10 000.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * num_sequences / horizon)


def _last(mask: Tensor) -> Tensor:
    """[B, T] bool: the last True of each row."""
    remaining = mask.long().flip(1).cumsum(1).flip(1)
    return mask & (remaining == 1)
