"""SwiGLU without its matrices: the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up with silu(x) = x / (1 + exp(-x)) (Shazeer 2020, eq. 6). Both [..., F] -> [..., F]."""
    return F.silu(gate) * up


def strict_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The same value through tanh. torch's silu takes another exponential for the last elements of a buffer, so an
    element's bits depend on its place; tanh, sums and products do not."""
    return gate * (0.5 + 0.5 * torch.tanh(0.5 * gate)) * up
