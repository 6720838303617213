"""The ring's blocks, bits and memory; that it gives one process's numbers is shown in test_context."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh

from framework.core.runtime import Runtime
from framework.parallel.collectives import Ranks
from framework.parallel.context import Cut
from framework.parallel.ring import RingCore, _past
from tests.distributed import run_ranks


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_blocks_hold_every_past_chunk_once_and_no_future_one(size: int) -> None:
    chunks = [[rank, 2 * size - 1 - rank] for rank in range(size)]
    met = [
        (query, key)
        for rank in range(size)
        for owner in range(size)
        for rows, columns in _past(rank, owner, 2)
        for query in chunks[rank][rows]
        for key in chunks[owner][columns]
    ]
    past = [(query, key) for query in range(2 * size) for key in range(query + 1)]
    own_future = [(chunks[rank][0], chunks[rank][1]) for rank in range(size)]
    assert sorted(met) == sorted(past)
    assert not set(own_future) & set(met)


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_every_rank_computes_as_much_at_every_hop(size: int) -> None:
    def cost(rank: int, hop: int) -> int:
        parts = _past(rank, (rank - hop) % size, 6)
        return sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in parts)

    costs = [{cost(rank, hop) for rank in range(size)} for hop in range(size)]
    assert costs == [{27}, *[{18}] * (size - 1)]  # of 36: three quarters of one's own block, half of every other


def _twice(_: Runtime) -> list[list[Tensor]]:
    ranks = Ranks(init_device_mesh("cpu", (3,), mesh_dim_names=("context",)), ("context",))
    core = RingCore(Cut(ranks))
    draw = torch.Generator().manual_seed(ranks.rank)
    q, k, v = (torch.randn(2, 8, heads, 4, generator=draw) for heads in (6, 3, 3))
    runs = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = core(*leaves, None, True)
        y.sum().backward()
        runs.append([y.detach(), *(x.grad for x in leaves if x.grad is not None)])
    return runs  # type: ignore[return-value]


def test_the_same_inputs_give_the_same_bits() -> None:
    for first, second in run_ranks(_twice, 3):
        assert len(first) == 4
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_scores_are_kept_for_the_backward() -> None:
    kept: list[tuple[int, ...]] = []

    def keep(x: Tensor) -> Any:
        kept.append(tuple(x.shape))
        return x

    q, k, v = (torch.randn(1, 64, heads, 4, requires_grad=True) for heads in (4, 2, 2))
    with saved_tensors_hooks(keep, lambda x: x):
        RingCore(Cut(Ranks(None)))(q, k, v, None, True)
    q_like, k_like = (1, 64, 4, 4), (1, 64, 2, 4)
    assert sorted(kept) == sorted([q_like, k_like, k_like, (1, 64), q_like, (1, 64, 2, 2)])  # q k v ids y lse
