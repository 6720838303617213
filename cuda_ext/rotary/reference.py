"""Rotary position embedding in the rotate-half layout: the definition. Its backward pass, the turn back, is written
out: autograd's goes through memory twice as often."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+H/2}) by the angle of their position (Su et al. 2021, eq. 34, halves for pairs).

    x[B,T,N,H]; cos and sin[B|1,T,H], both halves alike. Computed in the wider of the dtypes, returned in x's.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a compiler fuses the plain form by itself
        turned: Tensor = _Turned.apply(x, cos, sin)
        return turned
    return _turned(x, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    across = torch.cat((-second, first), dim=-1)
    return (x * cos.unsqueeze(2) + across * sin.unsqueeze(2)).to(x.dtype)


class _Turned(torch.autograd.Function):
    """The gradient is turned by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `rotary`."""
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x; positions have none."""
        cos, sin = ctx.saved_tensors
        first, second = (of_y * sin.unsqueeze(2)).chunk(2, dim=-1)
        back = torch.cat((second, -first), dim=-1)
        return (of_y * cos.unsqueeze(2) + back).to(of_y.dtype), None, None
