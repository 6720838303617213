"""The norm of gradients, and a clipped AdamW step with a bf16 copy of the parameters, beside torch's: its norm; its
clipping, fused AdamW and casts. And beside NVIDIA apex's where it is installed: its norm; its step, clipped by that."""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cuda_ext import apex
from cuda_ext.adamw.op import adamw, multi_tensor_norm
from cuda_ext.measure import Case

_SETTINGS: dict[str, Any] = {
    "step": 1, "lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1
}  # fmt: skip
_SIZES = [[4096 * 4096] * 12, [1 << 28], [1 << 16] * 500]  # layers of a model, one flat shard, many small ones


def cases(device: str, sizes: list[list[int]] = _SIZES) -> Iterator[Case]:
    """Lists of numbers of elements, all in fp32. Moved by a norm: the gradients; by a step, norm included: these twice,
    parameters and states both ways, copies."""
    for numels in sizes:
        params, grads, averages, squares = ([torch.rand(n, device=device) for n in numels] for _ in range(4))
        name, total = f"{len(numels)} x {numels[0]:,}", sum(numels)
        theirs: dict[str, Callable[[], object]] = {"eager": partial(torch.nn.utils.get_total_norm, grads)}
        if not apex.why_not("optimizer"):
            theirs["apex"] = partial(_apex_norm, grads)
        yield Case(f"norm of {name}", partial(multi_tensor_norm, grads), theirs, 4 * total)
        copies = [param.bfloat16() for param in params]
        ours = partial(_step, params, grads, averages, squares, copies)
        theirs = {"fused": _torch_step(params, grads, copies)}
        if not apex.why_not("optimizer"):
            theirs["apex"] = partial(_apex_step, params, grads, averages, squares, copies)
        yield Case(f"step of {name}", ours, theirs, (4 + 28 + 2) * total)


def _step(
    params: list[Tensor], grads: list[Tensor], averages: list[Tensor], squares: list[Tensor], copies: list[Tensor]
) -> None:
    norm, non_finite = multi_tensor_norm(grads)
    clip = (1 / (norm + 1e-6)).clamp(max=1)
    adamw(params, grads, averages, squares, **_SETTINGS, clip=clip, non_finite=non_finite, copies=copies)


def _apex_step(
    params: list[Tensor], grads: list[Tensor], averages: list[Tensor], squares: list[Tensor], copies: list[Tensor]
) -> None:
    norm = _apex_norm(grads)
    clip, non_finite = (1 / (norm + 1e-6)).clamp(max=1), (~norm.isfinite()).float()
    apex.adamw(params, grads, averages, squares, **_SETTINGS, clip=clip, non_finite=non_finite, copies=copies)


def _apex_norm(grads: list[Tensor]) -> Tensor:
    kernels = importlib.import_module("amp_C")
    noop = torch.zeros(1, dtype=torch.int32, device=grads[0].device)
    norm: Tensor = kernels.multi_tensor_l2norm(apex.CHUNK, noop, [grads], False)[0]
    return norm


def _torch_step(params: list[Tensor], grads: list[Tensor], copies: list[Tensor]) -> Callable[[], None]:
    leaves = [param.clone().requires_grad_() for param in params]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad.clone()
    optimizer = torch.optim.AdamW(leaves, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        torch._foreach_copy_(copies, [leaf.detach() for leaf in leaves])

    return step
