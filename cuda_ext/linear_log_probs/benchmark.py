"""Log-probs and entropy from hidden states in bf16, beside eager torch and torch.compile on whole logits; the pointwise
loss beside cross_entropy and, where it is installed, Liger's."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_ext.linear_log_probs.op import linear_log_probs
from cuda_ext.linear_log_probs.token_loss import Metrics, linear_token_loss
from cuda_ext.measure import Case, backward, beside_torch, rival

_SIZES = [(8192, 768, 50304), (8192, 2048, 32000), (8192, 4096, 131072)]


def cases(device: str, sizes: list[tuple[int, int, int]] = _SIZES) -> Iterator[Case]:
    """Rows x width x vocabulary. Operations: 2 M D V a product; torch's backward keeps the logits that ours makes
    again."""
    for rows, width, vocabulary in sizes:
        hidden = torch.randn(rows, width, device=device).bfloat16()
        weight = (torch.randn(vocabulary, width, device=device) / width**0.5).bfloat16()
        targets = torch.randint(0, vocabulary, (rows,), device=device)
        gradients = (torch.randn(rows, device=device), torch.randn(rows, device=device))
        size, product = f"{rows} x {width} x {vocabulary}", 2 * rows * width * vocabulary
        yield beside_torch(f"forward {size}", _ours, _torch, (hidden, weight, targets), flops=product)
        ours, eager = (functools.partial(call, targets=targets) for call in (_ours, _torch))
        yield backward(f"backward {size}", ours, eager, (hidden, weight), gradients, flops=3 * product)
        inputs = (hidden.requires_grad_(), weight.requires_grad_(), targets)
        liger = rival("liger", "liger_kernel.transformers.functional", _liger_loss)
        name = f"loss and gradients {size}"
        yield beside_torch(name, _loss, _torch_loss, inputs, flops=3 * product, others=liger)


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_probs, entropy = linear_log_probs(hidden, weight, targets, with_entropy=True)
    assert entropy is not None
    return log_probs, entropy


def _torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    table = F.linear(hidden, weight).float().log_softmax(1)
    return table.gather(1, targets.unsqueeze(1)).squeeze(1), -(table.exp() * table).sum(1)


def _mean(log_probs: Tensor, _: Tensor | None, rows: Any, *, count: int) -> tuple[Tensor, Metrics]:
    return -log_probs.sum() / count, {}


def _loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    loss, _ = linear_token_loss(hidden, weight, targets, functools.partial(_mean, count=len(hidden)), None)
    return torch.autograd.grad(loss, (hidden, weight))


def _liger_loss(module: Any) -> Callable[..., tuple[Tensor, ...]]:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        mean = module.liger_fused_linear_cross_entropy(hidden, weight, targets)
        return torch.autograd.grad(mean, (hidden, weight))

    return loss


def _torch_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    loss = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    return torch.autograd.grad(loss, (hidden, weight))
