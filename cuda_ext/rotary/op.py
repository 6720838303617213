"""Rotary position embedding of queries or keys."""

from typing import Any

import torch
from torch import Tensor

from cuda_ext import dispatch, library
from cuda_ext.rotary import reference

_LEARNED = dispatch.Implementation("reference", "the kernel has no gradients of cos and sin")


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.rotary`. x[B,T,N,H], cos and sin[B|1,T,H] -> [B,T,N,H]."""
    if not dispatch.choose("rotary", x, cos, sin).kernel:
        return reference.rotary(x, cos, sin)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        dispatch.announce("rotary", _LEARNED)
        return reference.rotary(x, cos, sin)
    y: Tensor = fused(x, cos, sin, 1.0)
    return y


@torch.library.custom_op("cuda_ext::rotary", mutates_args=())
def fused(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """The kernel: x turned by `sign` times its angles. x may be a part of a wider tensor, if its last stride is 1."""
    y = _like(x, cos, sin, sign)
    library.operators(x).rotary_forward(*(_in_order(each) for each in (x, cos.float(), sin.float())), sign, y)
    return y


def _in_order(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@fused.register_fake
def _like(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    _, cos, sin, ctx.sign = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    """A turn is undone by turning back: the transpose of its matrix is its inverse."""
    return fused(dy, *ctx.saved_tensors, -ctx.sign), None, None, None


fused.register_autograd(_backward, setup_context=_keep)
