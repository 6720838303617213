"""The checkup over real gloo ranks: all fit is one line a rank; a slow, wrong or deaf one is named, the others live."""

from datetime import timedelta

import pytest
import torch
import torch._dynamo  # the ranks inherit it, instead of importing it each
import torch.distributed as dist

from framework.cluster import checkup
from framework.cluster.checkup import Probes, Reading, Seat, Verdict, check_ranks
from framework.core import runtime
from tests.distributed import run_ranks

CPU = torch.device("cpu")


class Deaf(Exception):
    """What the test's deaf rank leaves with, once the others are through."""


def check(here: runtime.Runtime, nodes: str, odd: int, matmul: Reading | None, deaf_to: str) -> Verdict | None:
    """Rank r stands on node nodes[r]. Rank `odd` reads `matmul`, or never answers what `deaf_to` names."""
    store = runtime._store
    assert store is not None
    dist.barrier()
    dist.destroy_process_group()
    is_odd, others = here.rank == odd, [f"checkup/leaving/{rank}" for rank in range(here.world_size) if rank != odd]

    def wait() -> None:
        store.wait(others if odd == 0 else [f"checkup/leaving/{1 if odd != 1 else 2}"], timedelta(seconds=60))
        raise Deaf

    def multiply(device: torch.device) -> Reading:
        if is_odd and deaf_to == "matmul":
            wait()
        return matmul if is_odd and matmul is not None else Reading(0.01)

    def reduce(device: torch.device, seconds: float) -> Reading:
        if is_odd and deaf_to == "all-reduce":
            wait()
        return Reading(0.001, checkup.time_all_reduce(device, seconds).wrong)

    seat = Seat(here.rank, nodes[here.rank], "cpu")
    try:
        return check_ranks(seat, here.world_size, store, Probes(multiply, reduce), start_s=20.0, work_s=3.0)
    except Deaf:
        return None


def lines_of(verdicts: list[Verdict | None]) -> list[str]:
    """Of a checkup that found something: all that heard of it heard the same, and one of them tells it."""
    heard = [verdict for verdict in verdicts if verdict is not None]
    assert not any(verdict.fit for verdict in heard)
    assert len({tuple(verdict.lines) for verdict in heard}) == 1
    assert heard[0].speaks
    return list(heard[0].lines)


def real(here: runtime.Runtime, nodes: str) -> Verdict:
    store = runtime._store
    assert store is not None
    dist.barrier()
    dist.destroy_process_group()
    return check_ranks(Seat(here.rank, nodes[here.rank], "cpu"), here.world_size, store)


def test_where_all_are_fit_there_is_a_line_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "SLOW", 1e6)  # whatever else this machine is doing
    verdicts = run_ranks(real, 4, "abbc")
    assert [verdict.fit for verdict in verdicts] == [True] * 4
    assert [verdict.speaks for verdict in verdicts] == [True, False, False, False]
    seen = [[part.rsplit(" ", 2)[0] for part in line.split(": ", 1)[1].split(", ")] for line in verdicts[0].lines]
    sides = ("on the node", "with the next node", "with the last node", "with the first node")
    own, after, before, ring = (f"all-reduce {side}" for side in sides)
    assert seen == [["matmul", after, ring], ["matmul", own, after, before], ["matmul", own, after, before],
                    ["matmul", before, ring]]  # fmt: skip
    assert verdicts[0].lines[2].startswith("node b (rank 2) on cpu: matmul ")


@pytest.mark.parametrize(
    ("matmul", "said"),
    [
        (Reading(0.081), "node b (rank 3): matmul 8.1 times slower than the median"),
        (Reading(0.01, "gave nan in place of 7"), "node b (rank 3): matmul gave nan in place of 7"),
    ],
)
def test_a_slow_or_wrong_rank_is_named(matmul: Reading, said: str) -> None:
    assert lines_of(run_ranks(check, 4, "aabb", 3, matmul, "")) == [said]


@pytest.mark.parametrize("deaf_to", ["matmul", "all-reduce"])
def test_a_deaf_rank_is_named_and_nobody_else(deaf_to: str) -> None:
    said = "matmul" if deaf_to == "matmul" else "all-reduce on the node"
    verdicts = run_ranks(check, 4, "aabb", 3, None, deaf_to)
    assert lines_of(verdicts) == [f"node b (rank 3) is deaf: it said nothing of '{said}'"]
    assert verdicts[3] is None


def test_a_deaf_rank_0_is_named_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "_LATE_S", 0.5)
    monkeypatch.setattr(checkup, "_MARGIN_S", 1.0)
    verdicts = run_ranks(check, 3, "abc", 0, None, "all-reduce")
    assert verdicts[0] is None
    assert lines_of(verdicts) == ["node a (rank 0) is deaf: it said nothing of 'all-reduce with the next node'"]


def absent(here: runtime.Runtime) -> Verdict | None:
    store = runtime._store
    assert store is not None
    dist.barrier()
    dist.destroy_process_group()
    if here.rank == 1:
        store.wait(["checkup/leaving/2"], timedelta(seconds=60))
        return None
    return check_ranks(Seat(here.rank, "a", "cpu"), 3, store, start_s=1.0)


def test_a_rank_that_never_comes_is_named() -> None:
    assert lines_of(run_ranks(absent, 3)) == ["rank 1 never came"]


def test_a_slow_pair_of_nodes_is_named() -> None:
    groups = [checkup._Group(f"nodes {a} and {b}", ranks) for a, b, ranks in (("a", "b", [0, 1]), ("c", "d", [2, 3]))]
    judge = checkup._unfit_groups("all-reduce with the next node", groups)
    found = dict(enumerate([Reading(0.01), Reading(0.01), Reading(0.01), Reading(0.05)]))
    assert judge(found) == ["nodes c and d: all-reduce 5.0 times slower than the median"]
    assert judge(found | {3: Reading(0.01, checkup.WAITED)}) == ["nodes c and d: all-reduce did not end in time"]


def test_no_node_is_in_two_groups_of_a_phase() -> None:
    for count in range(1, 9):
        seats = [Seat(2 * node + side, str(node), "cpu") for node in range(count) for side in range(2)]
        phases = dict(checkup._phases(seats))
        met = [group.name for groups in phases.values() for group in groups]
        assert len(met) == len(set(met)) == count + (count if count > 2 else count - 1)
        for groups in phases.values():
            ranks = [rank for group in groups for rank in group.ranks]
            assert len(ranks) == len(set(ranks))


def test_the_matmul_is_exact_and_a_nan_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkup.time_matmul(CPU).wrong == ""
    real = torch.Tensor.matmul
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: real(a, b).fill_(torch.nan) if a.dim() == 2 else real(a, b)
    )
    assert checkup.time_matmul(CPU).wrong.startswith("gave nan in place of ")
