"""Advantages and returns of a batch of rollouts."""

import torch
from torch import Tensor

from cuda_ext import dispatch, library
from cuda_ext.gae import reference

_DTYPE = dispatch.Implementation("reference", "the kernel takes float32")
_GRADIENTS = dispatch.Implementation("reference", "the kernel has no gradients")


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap_values: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.gae`. rewards, values, mask, ends[B,T], bootstrap_values[B] -> (advantages, returns), both
    [B,T]."""
    given = (rewards, values) if bootstrap_values is None else (rewards, values, bootstrap_values)
    if not dispatch.choose("gae", *given).kernel:
        return reference.gae(rewards, values, mask, gamma, lam, bootstrap_values, ends)
    needs_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    if needs_gradients or any(tensor.dtype != torch.float32 for tensor in given):
        dispatch.announce("gae", _GRADIENTS if needs_gradients else _DTYPE)
        return reference.gae(rewards, values, mask, gamma, lam, bootstrap_values, ends)
    advantages, returns = fused(rewards, values, mask, gamma, lam, bootstrap_values, ends)
    return advantages, returns


@torch.library.custom_op("cuda_ext::gae", mutates_args=())
def fused(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap_values: Tensor | None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel: (advantages, returns), [B,T] in fp32."""
    advantages, returns = _like(rewards, values, mask, gamma, lam, bootstrap_values)
    given = (rewards, values, mask, ends, bootstrap_values)
    inputs = (None if x is None else x.contiguous() for x in given)
    library.operators(rewards).gae_forward(*inputs, gamma, lam, advantages, returns)
    return advantages, returns


@fused.register_fake
def _like(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap_values: Tensor | None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    first, second = (torch.empty_like(rewards, memory_format=torch.contiguous_format) for _ in range(2))
    return first, second
