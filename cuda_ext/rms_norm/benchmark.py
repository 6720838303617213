"""RMSNorm in bf16 beside eager torch and torch.compile, and where they are installed Liger, NVIDIA apex and
transformers: forward, with the residual, and backward."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_ext import apex
from cuda_ext.measure import Case, Rivals, backward, beside_torch, rival
from cuda_ext.rms_norm.op import rms_norm

_SIZES = [(8192, 1024), (8192, 4096), (4096, 8192), (4096, 16384)]


def cases(device: str, sizes: list[tuple[int, int]] = _SIZES) -> Iterator[Case]:
    """Rows x width. Moved: x and y; with a residual this and the sum too; backward dy, that of the sum, x and dx."""
    for rows, width in sizes:
        x, residual, dy, dtotal = (torch.randn(rows, width, device=device).bfloat16() for _ in range(4))
        weight = torch.ones(width, device=device).bfloat16()
        size, one = f"{rows} x {width}", x.numel() * x.element_size()
        theirs = _rivals(weight)
        yield beside_torch(f"forward {size}", _ours, _torch, (x, weight), 2 * one, others=theirs)
        inputs = (x, weight, residual)
        yield beside_torch(f"with residual {size}", _ours, _torch, inputs, 4 * one, others=theirs)
        theirs = {name: call for name, call in theirs.items() if name != "transformers"}  # whose weight is its own
        yield backward(f"backward {size}", _ours, _torch, inputs, (dy, dtotal), 4 * one, others=theirs)


def _rivals(weight: Tensor) -> Rivals:
    return {
        **rival("liger", "liger_kernel.transformers.functional", _liger),
        **({} if apex.why_not("norm") else {"apex": lambda *inputs: _summed(apex.rms_norm, *inputs)}),
        **rival(
            "transformers", "transformers.models.llama.modeling_llama", lambda module: _transformers(module, weight)
        ),
    }


def _liger(module: Any) -> Callable[..., Any]:
    def norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return module.liger_rms_norm(x, weight, 1e-5, in_place=False)
        return module.liger_fused_add_rms_norm(x, residual, weight, 1e-5, in_place=False)

    return norm


def _transformers(module: Any, weight: Tensor) -> Callable[..., Any]:
    norm = module.LlamaRMSNorm(len(weight), 1e-5).to(weight)
    return lambda *inputs: _summed(lambda x, _, __: norm(x), *inputs)


def _summed(
    norm: Callable[..., Tensor], x: Tensor, weight: Tensor, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    y = norm(total, weight, 1e-5)
    return y if residual is None else (y, total)


def _ours(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    return rms_norm(x, weight, 1e-5) if residual is None else rms_norm(x, weight, 1e-5, residual)


def _torch(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    y = F.rms_norm(total, weight.shape, weight, 1e-5)
    return y if residual is None else (y, total)
