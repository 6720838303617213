"""Generalised advantage estimation: the definition, a loop from the last token to the first."""

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap_values: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t (Schulman et al. 2016, eq. 16).

    rewards, values, mask[B,T]; t+1 is the next position where mask is True, so gaps (a tool's answer between two
    turns) are carried over, and what stands in them is never read. `bootstrap_values`[B] is the value after the last
    True position of a row that was cut off; zero where not given. `ends`[B,T] bool, of rows that hold several
    sequences: True at the last position of each, to which nothing behind it is carried (of one that was cut off there,
    add gamma V to its last reward). Returns (advantages, returns = advantages + values), both [B,T] and zero outside
    the mask.
    """
    next_value = values.new_zeros(len(values)) if bootstrap_values is None else bootstrap_values
    running = torch.zeros_like(next_value)
    columns = []
    given = (rewards, values, mask, torch.zeros_like(mask) if ends is None else ends)
    for reward, value, counts, end in zip(*(x.flip(1).unbind(1) for x in given), strict=True):
        running, next_value = (torch.where(end, 0, behind) for behind in (running, next_value))
        running = torch.where(counts, reward + gamma * next_value - value + gamma * lam * running, running)
        next_value = torch.where(counts, value, next_value)
        columns.append(running)
    advantages = torch.stack(columns[::-1], dim=1)
    zero = advantages.new_zeros(())
    return torch.where(mask, advantages, zero), torch.where(mask, advantages + values, zero)
