"""By how much an action was better than expected: with a critic (GAE), or against the other answers to its prompt.

Shapes: B responses, T tokens, token positions. A registered advantage is called as

    estimator(rewards [B, T], values [B, T], response_mask [B, T], *, gamma, lam, group_ids [B]) -> advantages, returns

both [B, T] and zero outside the response; it leaves whitening to the caller.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cuda_ext.gae.op import gae as gae_op
from framework.core.errors import UsageError, nearest
from framework.core.masked import counting, masked_mean, masked_variance
from framework.core.registry import register

# Added to a standard deviation before it divides, as in trl.
_GROUP_EPS = 1e-4
# Added to a variance before its root divides, as in trl and verl.
_WHITEN_EPS = 1e-8


def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap_values: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): over the response tokens of a row,

        δ_t = r_t + γ V_{t+1} - V_t      A_t = δ_t + γ λ A_{t+1}      R_t = A_t + V_t

    rewards, values [B, T] float, response_mask [B, T] bool. "t+1" is the next *response* token: where observations (a
    tool's answer) stand between, the sums carry over the gap undecayed. Behind the last one V is 0, or
    bootstrap_values[b] where the row was cut off and the episode goes on. `ends` [B, T] bool, of rows into which
    several sequences are packed: True at the last position of each, to which nothing behind it is carried. Returns
    advantages and returns [B, T], zero outside the response. With γ = λ = 1 the return is the reward to go.
    """
    return gae_op(rewards, values, response_mask, gamma, lam, bootstrap_values, ends)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - μ)/√(σ² + 1e-8), or with shift_mean=False + μ again: variance 1 and mean 0, or the mean kept.

    x, mask [B, T]; returns [B, T], zero outside the mask. μ and σ² are of all counting entries, so hand in the global
    batch. σ² is divided by n - 1 as in trl, verl and NeMo-RL; OpenAI's lm-human-preferences and OpenRLHF divide by n.
    """
    mean = masked_mean(x, mask)
    scaled = (x - mean) * torch.rsqrt(masked_variance(x, mask) + _WHITEN_EPS)
    return counting(scaled if shift_mean else scaled + mean, mask)


def group_advantages(scores: Tensor, group_ids: Tensor, kind: str) -> Tensor:
    """A_i = (s_i - baseline) / scale of whole responses, without a critic.

        kind                baseline            scale               paper
        grpo                group mean          group std + 1e-4    Shao et al. 2024, section 4.1.2
        dr_grpo             group mean          1                   Liu et al. 2025
        rloo                mean of the others  1                   Ahmadian et al. 2024, eq. 8
        reinforce           batch mean          batch std + 1e-4    Hu et al. 2025 (REINFORCE++)
        reinforce_baseline  group mean          batch std + 1e-4    the same, "with baseline"

    scores [B] float, group_ids [B] int64: equal for the answers to one prompt, in any order and number. Returns [B].
    Standard deviations divide by n - 1 (as trl; verl's GRPO too), that of reinforce_baseline is of s - group mean. A
    group (or batch) whose scores are all equal, one of a single answer too, has advantage exactly 0: rounding residue
    is never divided by rounding residue.
    """
    if kind not in _KINDS:
        raise UsageError(f"unknown group_advantages kind '{kind}': {nearest(kind, _KINDS)}")
    return _KINDS[kind](scores, group_ids)


def _grpo(scores: Tensor, ids: Tensor) -> Tensor:
    centred, size = _centred(scores, ids)
    variance = _group_sum(centred.square(), ids) / (size - 1).clamp(min=1)
    return centred / (variance.sqrt() + _GROUP_EPS)


def _dr_grpo(scores: Tensor, ids: Tensor) -> Tensor:
    return _centred(scores, ids)[0]


def _rloo(scores: Tensor, ids: Tensor) -> Tensor:
    # s - (sum of the others)/(n - 1) = (s - mean) n/(n - 1)
    centred, size = _centred(scores, ids)
    return centred * size / (size - 1).clamp(min=1)


def _reinforce(scores: Tensor, _: Tensor) -> Tensor:
    return _grpo(scores, torch.zeros_like(scores, dtype=torch.int64))


def _reinforce_baseline(scores: Tensor, ids: Tensor) -> Tensor:
    return _reinforce(_centred(scores, ids)[0], ids)


_KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "rloo": _rloo,
    "reinforce": _reinforce,
    "reinforce_baseline": _reinforce_baseline,
}


def _centred(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """([B] score less its group's mean, exactly 0 where the group's scores are equal; [B] the group's size)."""
    size = _group_sum(torch.ones_like(scores), ids)
    centred = scores - _group_sum(scores, ids) / size
    same = _group_extreme(scores, ids, "amax") == _group_extreme(scores, ids, "amin")
    return torch.where(same, torch.zeros_like(centred), centred), size


def _group_sum(x: Tensor, ids: Tensor) -> Tensor:
    place = ids.unique(return_inverse=True)[1]
    return torch.zeros_like(x).index_add(0, place, x)[place]


def _group_extreme(x: Tensor, ids: Tensor, reduction: str) -> Tensor:
    place = ids.unique(return_inverse=True)[1]
    return torch.zeros_like(x).scatter_reduce(0, place, x, reduction, include_self=False)[place]


@register("advantage", "gae")
def critic_advantages(
    rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float, group_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """GAE with a critic; groups play no part."""
    return gae(rewards, values, response_mask, gamma, lam)


def _register_group_kind(kind: str) -> None:
    def estimator(
        rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float, group_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        scores = counting(rewards, response_mask).sum(dim=1)
        advantages = group_advantages(scores, group_ids, kind)[:, None] * response_mask
        _, returns = gae(rewards, torch.zeros_like(rewards), response_mask, gamma, lam=1.0)
        return advantages, returns

    estimator.__doc__ = f"group_advantages '{kind}' of the summed rewards, on every token of the response."
    register("advantage", kind)(estimator)


for _kind in _KINDS:
    _register_group_kind(_kind)
