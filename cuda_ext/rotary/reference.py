"""Rotary position embedding in the rotate-half layout: the definition."""

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+H/2}) by the angle of their position (Su et al. 2021, eq. 34, halves for pairs).

    x[B,T,N,H]; cos and sin[B|1,T,H], both halves alike. Computed in the wider of the dtypes, returned in x's.
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos.unsqueeze(2) + turned * sin.unsqueeze(2)).to(x.dtype)
