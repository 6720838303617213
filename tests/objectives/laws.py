"""Laws that every loss of the room must keep, stated once: split a batch as you like, and masked poison stays out."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# What every trl config needs to run here.
TRL_ON_CPU: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none"}

Loss = Callable[..., tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]]


def rows(tensors: Sequence[Tensor], part: slice) -> list[Tensor]:
    return [x[part] for x in tensors]


def check_split_invariance(loss: Loss, trained: Sequence[Tensor], fixed: Sequence[Tensor], cuts: Sequence[int]) -> None:
    """Parts divided by the global denominator add up to the whole: loss, gradient and metrics.

    `loss(*trained, *fixed)` has its denominator bound; the first tensors get gradients; cuts are row numbers.
    """
    bounds = [0, *sorted(cuts), len(trained[0])]
    whole_leaves = [x.clone().requires_grad_() for x in trained]
    whole, whole_metrics = loss(*whole_leaves, *fixed)
    whole.backward()
    leaves = [x.clone().requires_grad_() for x in trained]
    total, sums = torch.zeros_like(whole), {}
    for start, end in pairwise(bounds):
        part, metrics = loss(*rows(leaves, slice(start, end)), *rows(fixed, slice(start, end)))
        part.backward()
        total = total + part.detach()
        for name, (value, weight) in metrics.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + value, before[1] + weight)
    torch.testing.assert_close(total, whole.detach())
    for leaf, whole_leaf in zip(leaves, whole_leaves):
        torch.testing.assert_close(leaf.grad, whole_leaf.grad)
    assert sums.keys() == whole_metrics.keys()
    for name, pair in whole_metrics.items():
        torch.testing.assert_close(sums[name], pair)


def check_poison(loss: Loss, tensors: Sequence[Tensor], mask: Tensor, num_trained: int) -> None:
    """NaN and infinity where mask is False change neither loss, metrics nor gradient, which is zero there."""
    for poison in (float("nan"), float("inf"), float("-inf")):
        results = []
        for filler in (0.0, poison):
            inputs = [torch.where(mask, x, torch.full_like(x, filler)) for x in tensors]
            for x in inputs[:num_trained]:
                x.requires_grad_()
            value, metrics = loss(*inputs)
            value.backward()
            results.append((value.detach(), [x.grad for x in inputs[:num_trained]], metrics))
        assert torch.isfinite(results[0][0])
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
        assert all((grad[~mask] == 0).all() for grad in results[1][1])


def check_metrics(metrics: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Metrics are pairs of detached scalars."""
    for total, weight in metrics.values():
        assert total.shape == weight.shape == ()
        assert not total.requires_grad
        assert not weight.requires_grad


def mean(metrics: dict[str, tuple[Tensor, Tensor]], name: str) -> float:
    total, weight = metrics[name]
    return float(total / weight)
