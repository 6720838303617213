"""What a layer is made of besides attention: linear maps, norms, the feed-forward block. Initial values: init.py.

Strict mode (law On-policy): the same bits for a row whatever else is in the batch. It is settled at construction.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cuda_ext.layer_norm.op import layer_norm
from cuda_ext.rms_norm.op import rms_norm
from cuda_ext.swiglu.op import swiglu
from framework.models.config import Activation, ModelConfig, Norm

_TANH = (Activation.GELU_TANH, Activation.GEGLU_TANH)
_ROWS = 8  # measured: a CPU matmul over 8k terms gives a row the same bits in any batch whose rows come in eights


class Linear(nn.Linear):
    """nn.Linear that can be strict: fed contiguous 2-d input padded with zero rows to a multiple of 8; `inputs` is then
    a multiple of 8 as well."""

    def __init__(self, inputs: int, outputs: int, bias: bool, strict: bool = False):
        super().__init__(inputs, outputs, bias=bias)
        self.strict = strict

    def forward(self, x: Tensor) -> Tensor:
        """x[..., inputs] -> [..., outputs]."""
        return strict_linear(x, self.weight, self.bias) if self.strict else F.linear(x, self.weight, self.bias)


class Joined:
    """Linears of one input as one product, for a model that only generates: their parameters become rows of one matrix
    and keep their names and shapes, so that loading fills both.

    Training keeps them apart: a joined copy of the weights cost more than it saved, and a plan cuts each by itself.
    """

    def __init__(self, *parts: Linear):
        self.sizes = [len(part.weight) for part in parts]
        self.weight = _in_one_piece([part.weight for part in parts])
        biases = [part.bias for part in parts if part.bias is not None]
        self.bias = _in_one_piece(biases) if biases else None

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """x[..., I] -> what each of the linears gives."""
        return F.linear(x, self.weight, self.bias).split(self.sizes, -1)


def _in_one_piece(parts: Sequence[Tensor]) -> Tensor:
    joined = torch.cat([part.data for part in parts])
    for part, rows in zip(parts, joined.split([len(part) for part in parts]), strict=True):
        part.data = rows
    return joined


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x[..., D] -> [..., D]; with a residual that of the sum, and the sum."""
        return rms_norm(x, self.weight, self.eps) if residual is None else rms_norm(x, self.weight, self.eps, residual)


class LayerNorm(nn.LayerNorm):
    """(x - mean) / deviation * weight + bias over the last dimension."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """x[..., D] -> [..., D]; with a residual that of the sum, and the sum."""
        if residual is None:
            return layer_norm(x, self.weight, self.bias, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps, residual)


class MLP(nn.Module):
    """The feed-forward block: down(act(gate(x)) * up(x)) where gated, else down(act(up(x)))."""

    def __init__(self, config: ModelConfig, strict: bool, inner: int = 0):
        """`inner`: its intermediate size, where that is not the model's."""
        super().__init__()
        hidden, inner, bias = config.hidden_size, inner or config.feed_forward_size, config.mlp_bias
        self.gate = Linear(hidden, inner, bias, strict) if config.activation.is_gated else None
        self.up = Linear(hidden, inner, bias, strict)
        self.down = Linear(inner, hidden, bias, strict)
        self.activation = config.activation
        self.strict = strict
        self.joined: Joined | None = None

    def join(self) -> None:
        """Gate and up in one product from now on (see `Joined`)."""
        self.joined = None if self.gate is None else Joined(self.gate, self.up)

    def forward(self, x: Tensor) -> Tensor:
        """x[B,T,D] -> [B,T,D]."""
        act = strict_activation if self.strict else activation
        if self.gate is None:
            return self.down(act(self.up(x), self.activation))
        gate, up = (self.gate(x), self.up(x)) if self.joined is None else self.joined(x)
        if self.activation is Activation.SWIGLU:
            return self.down(swiglu(gate, up, strict=self.strict))
        return self.down(act(gate, self.activation) * up)


def build_norm(config: ModelConfig) -> nn.Module:
    """The norm that the config names, over hidden_size."""
    if config.norm is Norm.RMS:
        return RMSNorm(config.hidden_size, config.norm_eps)
    return LayerNorm(config.hidden_size, config.norm_eps)


def strict_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear whose result for a row does not depend on the other rows, bit for bit. x[..., I], weight[O, I]."""
    rows = x.reshape(-1, x.shape[-1])
    padded = F.pad(rows, (0, 0, 0, -len(rows) % _ROWS)).contiguous()
    return F.linear(padded, weight, bias)[: len(rows)].view(*x.shape[:-1], len(weight))


def activation(x: Tensor, kind: Activation) -> Tensor:
    """GELU or ReLU, of a block or of its gate, elementwise."""
    if kind is Activation.RELU:
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if kind in _TANH else "none")


def strict_activation(x: Tensor, kind: Activation) -> Tensor:
    """The same values from operations that give an element the same bits anywhere in a buffer (torch's gelu does not:
    the last elements of a buffer take another code path)."""
    if kind is Activation.RELU:
        return F.relu(x)
    if kind in _TANH:
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1 + torch.erf(x * 0.5**0.5))
