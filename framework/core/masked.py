"""Sums, means and variances over the True entries of a mask. True means "counts"; a NaN under False never leaks."""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x[mask] as a scalar; x and mask have one shape. Zero where nothing counts."""
    return torch.where(mask, x, x.new_zeros(())).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x[mask] as a scalar; zero where nothing counts."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_variance(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of x[mask] as a scalar: divided by n-1 (unbiased) or n; zero where n is too small."""
    count = mask.sum()
    centred = torch.where(mask, x - masked_mean(x, mask), x.new_zeros(()))
    return centred.square().sum() / (count - int(unbiased)).clamp(min=1)
