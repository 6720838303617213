"""Places of rows on their way between ranks, and sums over ranks, with their gradients.

What backward does depends on what the ranks do with the outcome: where each uses it for a share of the work, the
gradients add up; where all do the same with it, each has the whole gradient already. Left out: attention's own
movements (`context`, `ring`).
"""

from typing import Any

import torch
from torch import Tensor

from framework.parallel.collectives import Ranks

_outside = torch.compiler.disable(reason="collectives stand outside of compiled graphs")


@_outside
def gather_places(x: Tensor, ranks: Ranks) -> Tensor:
    """x[B,t,...] of each rank -> [B,T,...]; backward adds up what every rank's use of it says."""
    return x if ranks.group is None else _GatherPlaces.apply(x, ranks)


@_outside
def scatter_places(x: Tensor, ranks: Ranks) -> Tensor:
    """A summand x[B,T,...] of each rank -> this rank's places [B,t,...] of their sum."""
    return x if ranks.group is None else _ScatterPlaces.apply(x, ranks)


@_outside
def sum_over(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum of every rank's x, for something that every rank does alike: backward is the identity."""
    return x if ranks.group is None else _Sum.apply(x, ranks)


@_outside
def constant_sum(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum of every rank's x, which counts as a constant: no gradient."""
    return ranks.sum(x.detach(), "a constant")


@_outside
def gather_alike(x: Tensor, ranks: Ranks) -> Tensor:
    """x[B,t,...] of each rank -> [B,T,...], for something that every rank does alike: its gradient is what stands at
    its own places, nothing is added up."""
    return x if ranks.group is None else _GatherAlike.apply(x, ranks)


class _GatherPlaces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _joined(x, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _scattered(gradient, ctx.ranks), None


class _ScatterPlaces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _scattered(x, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _joined(gradient, ctx.ranks), None


class _GatherAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _joined(x, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(ctx.ranks.size, dim=1)[ctx.ranks.rank], None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum(x, "partial sums")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _joined(x: Tensor, ranks: Ranks) -> Tensor:
    return torch.cat(list(ranks.gather(x, "the places of a block's input").unbind()), dim=1)


def _scattered(x: Tensor, ranks: Ranks) -> Tensor:
    return ranks.scatter_sum(torch.stack(x.chunk(ranks.size, dim=1)), "a block's output")
