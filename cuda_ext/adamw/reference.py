"""AdamW: the definition, in single IEEE operations; and the norm of many tensors."""

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The numbers of one update, worked out in fp64 and each rounded to the tensors' dtype where it is used."""

    beta1: float
    rest1: float
    beta2: float
    rest2: float
    root: float  # sqrt(1 - beta2^t)
    eps: float
    rate: float  # lr / (1 - beta1^t)
    kept: float  # of the parameter, by weight decay

    @classmethod
    def of(cls, step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> "Factors":
        """Of update number `step`."""
        root, rate = (1 - beta2**step) ** 0.5, lr / (1 - beta1**step)
        return cls(beta1, 1 - beta1, beta2, 1 - beta2, root, eps, rate, 1 - lr * weight_decay)


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    unscale: float = 1.0,
    clip: Tensor | None = None,
    non_finite: Tensor | None = None,
    copies: list[Tensor] | None = None,
) -> None:
    """One decoupled-decay Adam update, number `step` from 1 (Loshchilov & Hutter 2019, algorithm 2), in place.

    m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  p <- (1 - lr wd) p - lr/(1-b1^t) m / (sqrt(v)/sqrt(1-b2^t) + eps).

    Every operation rounds once, so the bits of an element depend on that element alone, not on its place in a shard:
    by construction, where addcmul, addcdiv, lerp and fused updates leave multiply-adds to the build. (Not always to the
    nearest: torch's square root on a CPU is MKL's, which is an ulp off for one number in five.)

    g is the gradient, in its parameter's dtype if that is wider, x `unscale` x `clip` (one number, on the device).
    Where the one number `non_finite` is not 0, nothing is written. `copies` get the parameters in their own dtype.
    """
    if not params or (non_finite is not None and bool(non_finite != 0)):
        return
    by = Factors.of(step, lr, beta1, beta2, eps, weight_decay)
    grads = [g.to(torch.promote_types(g.dtype, p.dtype)) for g, p in zip(grads, params, strict=True)]
    if unscale != 1:
        grads = list(torch._foreach_mul(grads, unscale))
    if clip is not None:
        grads = [g * clip.reshape(()) for g in grads]
    torch._foreach_mul_(exp_avgs, by.beta1)
    torch._foreach_add_(exp_avgs, torch._foreach_mul(grads, by.rest1))
    squares = torch._foreach_mul(grads, grads)
    torch._foreach_mul_(squares, by.rest2)
    torch._foreach_mul_(exp_avg_sqs, by.beta2)
    torch._foreach_add_(exp_avg_sqs, squares)

    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, by.root)
    torch._foreach_add_(denominators, by.eps)
    updates = torch._foreach_div(exp_avgs, denominators)
    torch._foreach_mul_(updates, by.rate)
    torch._foreach_mul_(params, by.kept)
    torch._foreach_sub_(params, updates)
    if copies:
        torch._foreach_copy_(copies, params)


def multi_tensor_norm(tensors: list[Tensor], unscale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(norm, non_finite), two numbers on the device: the root of the sum of all (x unscale)^2 in at least fp32, and 1
    where that is not finite, else 0. Nothing is read back."""
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    total = torch.stack([(x * unscale).square().sum() for x in wide]).sum() if wide else torch.zeros(())
    return total.sqrt(), (~total.isfinite()).to(total.dtype)
