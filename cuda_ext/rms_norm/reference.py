"""RMSNorm: the definition. Its backward pass is written out: fewer passes over memory, and one tensor kept, not two."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, eq. 4), computed in at least fp32.

    x[..., D], weight[D] -> y[..., D]. With `residual`[..., D] the sum x + residual is normalised instead, and
    (y, x + residual) returned: the next layer needs both, and one pass over memory makes them.
    """
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a compiler fuses the plain form by itself
        y = _Scaled.apply(wide, weight, eps).to(x.dtype)
    else:
        y = (_normalised(wide, eps)[0] * weight).to(x.dtype)
    return y if residual is None else (y, total)


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x), and 1 / rms(x)."""
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * inverse, inverse


class _Scaled(torch.autograd.Function):
    """y = n w with n = x / rms(x). Then dx = (w dy - n mean(w dy n)) / rms(x), dw = sum(n dy)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `rms_norm`; x is wide."""
        normalised, inverse = _normalised(x, eps)
        ctx.save_for_backward(normalised, inverse, weight)
        return normalised * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of x and weight, each only where it is wanted."""
        normalised, inverse, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = of_y * weight
            along = (of_x * normalised).mean(-1, keepdim=True)
            of_x = of_x.addcmul_(normalised, along, value=-1).mul_(inverse)
        if ctx.needs_input_grad[1]:
            of_weight = (of_y * normalised).flatten(0, -2).sum(0).to(weight.dtype)
        return of_x, of_weight, None
