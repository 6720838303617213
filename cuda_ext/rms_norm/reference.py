"""RMSNorm: the definition."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, eq. 4), computed in at least fp32.

    x[..., D], weight[D] -> y[..., D]. With `residual`[..., D] the sum x + residual is normalised instead, and
    (y, x + residual) returned: the next layer needs both, and one pass over memory makes them.
    """
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)
    return y if residual is None else (y, total)
