"""Sums, means and variances over what counts, and the one division by a count.

True in a mask means "counts"; a NaN or an infinity under False reaches neither a result nor a gradient.
"""

import torch
from torch import Tensor


def counting(x: Tensor, mask: Tensor) -> Tensor:
    """x where mask is True, else 0; x and mask [...] have one shape.

    Clean inputs, not results: a NaN that went through a function comes back in its gradient as 0 x NaN.
    """
    return torch.where(mask, x, x.new_zeros(()))


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x[mask] as a scalar. Zero where nothing counts."""
    return counting(x, mask).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x[mask] as a scalar; zero where nothing counts."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_variance(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of x[mask] as a scalar: divided by n-1 (unbiased) or n; zero where n is too small."""
    centred = counting(x - masked_mean(x, mask), mask)
    return centred.square().sum() / (mask.sum() - int(unbiased)).clamp(min=1)


def ratio(total: Tensor, denominator: Tensor | float) -> Tensor:
    """total / denominator as a scalar; zero, with zero gradient, where nothing counted and both are zero.

    `total` is a scalar, `denominator` a number or a tensor of one element of any dtype (a global count).
    """
    count = torch.as_tensor(denominator, device=total.device).to(total.dtype).reshape(())
    return total / count.clamp(min=torch.finfo(total.dtype).tiny)
