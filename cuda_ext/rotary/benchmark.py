"""Rotary positions in bf16 beside eager torch and torch.compile, forward and backward: queries, and the keys of
grouped attention out of a joined projection. Where they are installed, beside Liger and transformers too, who turn
queries and keys in one call: they are given one head of keys besides."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cuda_ext.measure import Case, Rivals, backward, beside_torch, rival
from cuda_ext.rotary.op import rotary

_SIZES = [(4, 2048, 32, 128), (4, 2048, 8, 128), (1, 8192, 64, 64)]


def cases(device: str, sizes: list[tuple[int, int, int, int]] = _SIZES) -> Iterator[Case]:
    """B x T x N x H. Moved: x and y, and the first halves of cos and sin in fp32, once."""
    for batch, length, heads, size in sizes:
        joined = torch.randn(batch, length, 2 * heads, size, device=device).bfloat16()
        x, dy = joined[:, :, :heads], torch.randn(batch, length, heads, size, device=device).bfloat16()
        angles = torch.arange(length, device=device)[None, :, None] * torch.logspace(0, -4, size // 2, device=device)
        cos, sin = (torch.cat((half, half), -1) for half in (angles.cos(), angles.sin()))
        name, moved = f"{batch} x {length} x {heads} x {size}", 2 * x.numel() * 2 + 2 * length * size * 2
        yield beside_torch(f"forward {name}", rotary, _torch, (x, cos, sin), moved, others=_rivals(x))
        ours, theirs = (partial(call, cos=cos, sin=sin) for call in (rotary, _torch))
        yield backward(f"backward {name}", ours, theirs, (x,), (dy,), moved)


def _rivals(x: Tensor) -> Rivals:
    heads = x.transpose(1, 2).contiguous()  # [B,N,T,H]; Liger may write there
    keys = heads[:, :1].clone()

    def liger(module: Any) -> Callable[..., Any]:
        return lambda _, cos, sin: module.liger_rope(heads, keys, cos, sin)

    def transformers(module: Any) -> Callable[..., Any]:
        return lambda _, cos, sin: module.apply_rotary_pos_emb(heads, keys, cos, sin)

    return {
        **rival("liger", "liger_kernel.transformers.functional", liger),
        **rival("transformers", "transformers.models.llama.modeling_llama", transformers),
    }


def _torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return (x * cos.unsqueeze(2) + torch.cat((-second, first), -1) * sin.unsqueeze(2)).to(x.dtype)
