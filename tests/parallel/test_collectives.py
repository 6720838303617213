"""Sums, gathers, exchanges and hops over ranks."""

import math

import torch
from torch.distributed.device_mesh import init_device_mesh

from framework.core.runtime import Runtime, agreed, largest
from framework.parallel.collectives import Ranks
from framework.parallel.mesh import DATA
from tests.distributed import run_ranks


def test_a_process_alone_is_its_own_sum() -> None:
    ranks, x = Ranks(None), torch.tensor([3, 4])
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.sum(x, "x") is x
    assert ranks.gather(x, "x").tolist() == [[3, 4]]
    assert ranks.exchange(x[None], "x").tolist() == [[3, 4]]
    assert ranks.pass_on(x, "x").wait().tolist() == [3, 4]


def _sums(runtime: Runtime) -> tuple[object, ...]:
    ranks = Ranks(init_device_mesh("cpu", (2, 2), mesh_dim_names=DATA))
    mine = torch.tensor([runtime.rank, 10])
    total, table = ranks.sum(mine, "x"), ranks.gather(mine, "x")
    wishes = agreed(143 if runtime.rank == 2 else 0), agreed(0)
    most = largest(torch.tensor([-float("inf"), -float(runtime.rank)]), "x").tolist()
    return ranks.rank, ranks.size, total.tolist(), table.tolist(), mine.tolist(), wishes, most


def test_sums_and_gathers_over_both_data_axes() -> None:
    table = [[0, 10], [1, 10], [2, 10], [3, 10]]
    expected = [(rank, 4, [6, 40], table, [rank, 10], (143, 0), [-math.inf, 0.0]) for rank in range(4)]
    assert run_ranks(_sums, 4) == expected


def _moves(runtime: Runtime) -> tuple[object, ...]:
    ranks = Ranks(init_device_mesh("cpu", (2, 2), mesh_dim_names=DATA), (DATA[1],))
    mine = torch.tensor([[runtime.rank, 0], [runtime.rank, 1]])
    first, second = ranks.pass_on(mine, "x"), ranks.pass_on(mine.T + 10, "x")  # both under way at once
    return ranks.exchange(mine, "x").tolist(), first.wait().tolist(), second.wait().tolist()


def test_exchanges_and_hops_stay_within_their_axis() -> None:
    other = [1, 0, 3, 2]
    pairs = [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert run_ranks(_moves, 4) == [
        ([[a, rank % 2], [b, rank % 2]], [[its, 0], [its, 1]], [[its + 10, its + 10], [10, 11]])
        for rank, ((a, b), its) in enumerate(zip(pairs, other))
    ]
