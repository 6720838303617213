"""LayerNorm: the definition."""

import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias (Ba et al. 2016, eq. 4), computed in at least fp32.

    x[..., D], weight and bias[D] -> y[..., D]. With `residual`[..., D] the sum x + residual is normalised instead, and
    (y, x + residual) returned.
    """
    total = x if residual is None else x + residual
    y = F.layer_norm(total, weight.shape, weight, bias, eps)
    return y if residual is None else (y, total)
