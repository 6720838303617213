"""Ring attention (Liu et al. 2023) over rows cut head-tail: keys and values travel, queries stay, softmax is running.

What it sends stands in `context`. Scores are taken, and all else is summed, in at least fp32.

Left out: kernels that return their log-sum-exp (a block is matmul, softmax, matmul, so that its B N t t/2 scores stand
in memory, one block at a time); skipping blocks in which no query's document has keys, for that would ask the data;
second derivatives.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from framework.parallel.collectives import Arrival
from framework.parallel.context import Cut, sees

Part = tuple[slice, slice, Tensor]  # of a block: its queries, its keys, and seen[B,queries,1,1,keys]


class RingCore(nn.Module):
    """Attention of this rank's queries to keys and values that come round the ring."""

    def __init__(self, cut: Cut):
        super().__init__()
        self.cut = cut

    @torch.compiler.disable(reason="collectives stand outside of compiled graphs")
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """q[B,t,N,H], k and v[B,t,K,H] -> [B,t,N,H], causal within documents. `mask` is what WholeIds gave; None: each
        row is one document. The same inputs give the same bits: blocks are added in one fixed order."""
        if mask is None:
            mask = torch.zeros(len(q), q.shape[1] * self.cut.ranks.size, dtype=torch.int64, device=q.device)
        return _Ring.apply(q, k, v, mask, self.cut)


class _Ring(torch.autograd.Function):
    """Keeps q, k, v, the output and its log-sum-exp; scores are computed again, block by block (Dao et al. 2022)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, cut: Cut) -> Tensor:
        queries, wide = _by_group(q, k), torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros_like(queries, dtype=wide)
        lse = torch.full_like(queries[..., 0], float("-inf"), dtype=wide)
        for pair, parts in _round(cut, ids, torch.stack([k, v])):
            for rows, columns, seen in parts:
                _attend(out[:, rows], lse[:, rows], queries[:, rows], pair[:, :, columns], seen)
        y = out.flatten(2, 3).to(q.dtype)
        ctx.save_for_backward(q, k, v, ids, y, lse)
        ctx.cut = cut
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, ids, y, lse = ctx.saved_tensors
        queries, grad, y = (_by_group(x, k) for x in (q, grad, y))
        delta = (grad.to(lse.dtype) * y).sum(-1)
        dq = torch.zeros_like(queries, dtype=lse.dtype)
        home: Tensor | None = None
        coming: Arrival | None = None  # what the ranks before this one found for the k and v that are here
        for pair, parts in _round(ctx.cut, ids, torch.stack([k, v])):
            found = torch.zeros_like(pair, dtype=lse.dtype)
            for rows, columns, seen in parts:
                given = (queries[:, rows], pair[:, :, columns], seen, lse[:, rows], grad[:, rows], delta[:, rows])
                _attend_backward(dq[:, rows], found[:, :, columns], *given)
            if home is None:
                home = found
                continue
            if coming is not None:
                found += coming.wait()
            coming = ctx.cut.ranks.pass_on(found, "the gradients of keys and values")
        assert home is not None
        dk, dv = home if coming is None else home + coming.wait()
        scale = q.shape[-1] ** -0.5
        return (dq * scale).flatten(2, 3).to(q.dtype), (dk * scale).to(k.dtype), dv.to(v.dtype), None, None


def _round(cut: Cut, ids: Tensor, pair: Tensor) -> Iterator[tuple[Tensor, list[Part]]]:
    """Every rank's pair[2,B,t,K,H] of k and v, one's own first, and the parts of its block. The next pair is under way
    while a block is computed."""
    ranks, length = cut.ranks, ids.shape[1]
    mine, here = cut.cut(ids), cut.places(length, device=ids.device)
    for hop in range(ranks.size):
        coming = ranks.pass_on(pair, "keys and values") if hop + 1 < ranks.size else None
        owner = (ranks.rank - hop) % ranks.size
        its, there = cut.cut(ids, owner), cut.places(length, owner, ids.device)
        yield (
            pair,
            [
                (rows, columns, sees(mine[:, rows], here[rows], its[:, columns], there[columns])[:, :, None, None])
                for rows, columns in _past(ranks.rank, owner, pair.shape[2])
            ],
        )
        if coming is not None:
            pair = coming.wait()


def _past(rank: int, owner: int, held: int) -> list[tuple[slice, slice]]:
    """The (queries, keys) of a block that are not wholly future. All ranks compute half of every other's block: of an
    earlier rank the head alone is past, a later rank's keys are past for the tail alone. Within a rank's own block
    each query first meets keys of which it sees one, itself, so that no running sum begins at nothing."""
    head, tail, both = slice(0, held // 2), slice(held // 2, held), slice(0, held)
    if owner == rank:
        return [(head, head), (tail, both)]
    return [(both, head)] if owner < rank else [(tail, both)]


def _attend(out: Tensor, lse: Tensor, q: Tensor, pair: Tensor, seen: Tensor) -> None:
    """Add keys and values to the running softmax, in place: out[B,t,K,G,H] and its log-sum-exp lse[B,t,K,G]."""
    scores = _scores(q, pair[0], seen, lse.dtype)
    grown = torch.logaddexp(lse, scores.logsumexp(-1))
    weights = scores.sub_(grown.unsqueeze(-1)).exp_().to(pair.dtype)
    out.mul_((lse - grown).exp_().unsqueeze(-1)).add_(torch.einsum("btkgs,bskh->btkgh", weights, pair[1]))
    lse.copy_(grown)


def _attend_backward(
    dq: Tensor, dpair: Tensor, q: Tensor, pair: Tensor, seen: Tensor, lse: Tensor, grad: Tensor, delta: Tensor
) -> None:
    """Add this part's share to the gradients of q, k (both short of the scale) and v, in place. delta[B,t,K,G] is
    sum(grad * out): where it meets its like, that must not be rounded to bf16 either."""
    weights = _scores(q, pair[0], seen, lse.dtype).sub_(lse.unsqueeze(-1)).exp_()
    dpair[1].add_(torch.einsum("btkgs,btkgh->bskh", weights.to(pair.dtype), grad))
    dweights = torch.einsum("btkgh,bskh->btkgs", grad.to(lse.dtype), pair[1].to(lse.dtype))
    dscores = weights.mul_(dweights.sub_(delta.unsqueeze(-1))).to(pair.dtype)
    dpair[0].add_(torch.einsum("btkgs,btkgh->bskh", dscores, q))
    dq.add_(torch.einsum("btkgs,bskh->btkgh", dscores, pair[0]))


def _scores(q: Tensor, k: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """q[B,t,K,G,H], k[B,s,K,H] -> q k^T / sqrt(H) [B,t,K,G,s] in `dtype`, -inf where not seen."""
    queries = q.to(dtype) * q.shape[-1] ** -0.5
    return torch.einsum("btkgh,bskh->btkgs", queries, k.to(dtype)).masked_fill_(~seen, float("-inf"))


def _by_group(x: Tensor, k: Tensor) -> Tensor:
    """x[B,t,N,H] -> [B,t,K,G,H]: heads by the key head that they share."""
    return x.unflatten(2, (k.shape[2], -1))
