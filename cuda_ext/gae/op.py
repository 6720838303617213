"""Advantages and returns of a batch of rollouts."""

from torch import Tensor

from cuda_ext import dispatch
from cuda_ext.gae import reference


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.gae`. rewards, values, mask[B,T], bootstrap_values[B] -> (advantages, returns), both [B,T]."""
    dispatch.announce("gae", dispatch.REFERENCE)
    return reference.gae(rewards, values, mask, gamma, lam, bootstrap_values)
