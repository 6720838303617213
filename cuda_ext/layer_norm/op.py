"""LayerNorm, with the residual sum in front of it where there is one."""

from typing import Any, overload

import torch
from torch import Tensor

from cuda_ext import apex, dispatch, library
from cuda_ext.layer_norm import reference
from cuda_ext.rms_norm.op import LINES


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """y[..., D]."""


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(y, x + residual), both [..., D]."""


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """See `reference.layer_norm`. x[..., D], weight and bias[D] -> y, or (y, x + residual)."""
    chosen = dispatch.choose("layer_norm", x, weight)
    if chosen is apex.RUNS["norm"]:
        total = x if residual is None else x + residual
        return _apex(total, weight, bias, eps) if residual is None else (_apex(total, weight, bias, eps), total)
    if not chosen.kernel:
        return reference.layer_norm(x, weight, bias, eps, residual)
    y, total, _, _ = fused(x, residual, weight, bias, eps)
    return y if residual is None else (y, total)


_apex = torch.compiler.disable(apex.layer_norm, reason="older versions of apex cannot be traced")


@torch.library.custom_op("cuda_ext::layer_norm", mutates_args=())
def fused(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel: (y, x + residual or nothing, means, 1 / deviations)."""
    y, total, mean, inverse = _like(x, residual, weight, bias, eps)
    further = None if residual is None else residual.contiguous()
    inputs = (x.contiguous(), further, weight.contiguous(), None if bias is None else bias.contiguous(), eps)
    library.operators(x).layer_norm_forward(*inputs, y, None if residual is None else total, mean, inverse)
    return y, total, mean, inverse


@torch.library.custom_op("cuda_ext::layer_norm_backward", mutates_args=())
def fused_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (and of a residual, the same), weight and bias."""
    dx, dweight, dbias = _like_inputs(dy, dtotal, total, weight, mean, inverse)
    partial = total.new_empty(2, min(LINES, inverse.numel()), len(weight), dtype=torch.float32)
    further = None if dtotal is None else dtotal.contiguous()
    inputs = (dy.contiguous(), further, total.contiguous(), weight.contiguous(), mean, inverse)
    library.operators(total).layer_norm_backward(*inputs, dx, dweight, dbias, partial[0], partial[1])
    return dx, dweight, dbias


@fused.register_fake
def _like(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return y, x.new_empty(0) if residual is None else torch.empty_like(y), mean, torch.empty_like(mean)


@fused_backward.register_fake
def _like_inputs(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(total, memory_format=torch.contiguous_format)
    return dx, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _ = inputs
    _, total, mean, inverse = output
    ctx.with_residual, ctx.with_bias = residual is not None, bias is not None
    ctx.save_for_backward(x if residual is None else total, weight, mean, inverse)


def _backward(ctx: Any, dy: Tensor, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    further = dtotal if ctx.with_residual else None
    dx, dweight, dbias = fused_backward(dy, further, *ctx.saved_tensors)
    return dx, dx if ctx.with_residual else None, dweight, dbias if ctx.with_bias else None, None


fused.register_autograd(_backward, setup_context=_keep)
fused.register_autocast("cuda", torch.float32)  # as torch does with its norms
