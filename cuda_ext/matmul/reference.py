"""The product of two matrices: the definition."""

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """c[M,N] = a[M,K] b[K,N], summed in at least fp32 and rounded once."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) @ b.to(wide)).to(a.dtype)
