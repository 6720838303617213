"""Orders that never lock, equal to torch's own; stages of even cost; states that arrive as they were sent."""

import itertools
import re
from collections import deque
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.testing._internal.distributed.fake_pg import FakeStore

from framework.core.errors import UsageError
from framework.core.runtime import Runtime
from framework.parallel.config import ParallelConfig, Schedule
from framework.parallel.mesh import build_mesh
from framework.parallel.pipeline import Line, Work, order, partition
from tests.distributed import run_ranks

Ways = dict[tuple[int, int, bool], deque[tuple[int, int]]]  # what is under way: (from, to, forward) -> (stage, micro)
INTERLEAVED = Schedule.INTERLEAVED


def shown(works: list[Work], rank: int, ranks: int) -> list[str]:
    """As torch writes an order: 2F0 = forward of stage 2, micro-batch 0."""
    return [f"{work.chunk * ranks + rank}{'F' if work.forward else 'B'}{work.micro}" for work in works]


def test_by_hand() -> None:
    assert shown(order(Schedule.GPIPE, 0, 2, 3), 0, 2) == ["0F0", "0F1", "0F2", "0B0", "0B1", "0B2"]
    assert shown(order(Schedule.ONE_F_ONE_B, 0, 2, 3), 0, 2) == ["0F0", "0F1", "0B0", "0F2", "0B1", "0B2"]
    assert shown(order(Schedule.ONE_F_ONE_B, 1, 2, 3), 1, 2) == ["1F0", "1B0", "1F1", "1B1", "1F2", "1B2"]
    last = ["1F0", "1F1", "3F0", "3B0", "3F1", "3B1", "1B0", "1B1"]
    assert shown(order(INTERLEAVED, 1, 2, 2), 1, 2) == last


def _torch_orders(_: Runtime) -> dict[tuple[str, int, int], dict[int, list[str]]]:
    """(schedule, ranks, micro-batches) -> rank -> order, of torch.distributed.pipelining."""
    found = {}
    for ranks, micros in itertools.product((2, 3, 4), (2, 3, 4, 8, 12)):
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        stages = [PipelineStage(nn.Linear(1, 1), i, n, torch.device("cpu")) for i, n in ((0, ranks), (0, 2 * ranks))]
        second = PipelineStage(nn.Linear(1, 1), ranks, 2 * ranks, torch.device("cpu"))
        made: dict[str, Any] = {"gpipe": ScheduleGPipe(stages[0], micros, loss_fn=torch.sum)}
        if micros >= ranks:  # torch's wants no fewer
            made["1f1b"] = Schedule1F1B(stages[0], micros, loss_fn=torch.sum)
        if micros % ranks == 0:
            made["interleaved"] = ScheduleInterleaved1F1B([stages[1], second], micros, loss_fn=torch.sum)
        for name, schedule in made.items():
            found[name, ranks, micros] = {
                rank: [str(action) for action in actions if re.fullmatch(r"\d+[FB]\d+", str(action))]
                for rank, actions in schedule.pipeline_order.items()
            }
        dist.destroy_process_group()
    return found


def test_orders_are_torch_s_own() -> None:
    (found,) = run_ranks(_torch_orders, 1)
    assert len(found) > 30
    for (name, ranks, micros), by_rank in found.items():
        for rank, theirs in by_rank.items():
            ours = shown(order(Schedule(name), rank, ranks, micros), rank, ranks)
            if name == "1f1b":  # torch's picture of it numbers forwards past the last micro-batch
                ours, theirs = (re.findall("[FB]", "".join(each)) for each in (ours, theirs))
            assert ours == theirs, (name, ranks, micros, rank)


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("backward", [True, False])
def test_no_order_locks_and_messages_arrive_in_the_order_sent(
    schedule: Schedule, ranks: int, rounds: int, backward: bool
) -> None:
    """Ranks go ahead whenever what they wait for is the next thing on its way; each way is a queue."""
    micros, chunks = rounds * ranks, 2 if schedule is INTERLEAVED else 1
    total = ranks * chunks
    left = [deque(order(schedule, rank, ranks, micros, backward)) for rank in range(ranks)]
    assert all(len(works) == micros * chunks * (1 + backward) for works in left)
    ways: Ways = {}
    held, most = [0] * ranks, [0] * ranks
    while any(left):
        moved = False
        for rank, works in enumerate(left):
            if works and _can(works[0], rank, ranks, total, ways):
                work = works.popleft()
                held[rank] += 1 if work.forward else -1
                most[rank] = max(most[rank], held[rank])
                moved = True
        assert moved, "locked"
    assert not any(ways.values())
    if schedule is Schedule.ONE_F_ONE_B and backward:
        assert most == [min(micros, ranks - rank) for rank in range(ranks)]


def _can(
    work: Work, rank: int, ranks: int, total: int, ways: dict[tuple[int, int, bool], deque[tuple[int, int]]]
) -> bool:
    """Do it, where it can be done."""
    stage = work.chunk * ranks + rank
    source, target = (stage - 1, stage + 1) if work.forward else (stage + 1, stage - 1)
    if 0 <= source < total:
        way = ways.setdefault((source % ranks, rank, work.forward), deque())
        if not way:
            return False
        assert way.popleft() == (stage, work.micro)
    if 0 <= target < total:
        ways.setdefault((rank, target % ranks, work.forward), deque()).append((target, work.micro))
    return True


def test_micro_batches_that_do_not_interleave_are_refused() -> None:
    with pytest.raises(ValueError, match="3 micro-batches do not interleave over 2 ranks"):
        order(INTERLEAVED, 0, 2, 3)


def test_stages_are_balanced_by_cost() -> None:
    assert partition([1.0] * 8, (0.0, 0.0), 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert partition([1.0] * 8, (0.0, 3.0), 2) == [range(0, 5), range(5, 8)]  # the head weighs three layers
    assert partition([1.0, 1.0], (0.0, 50.0), 2) == [range(0, 1), range(1, 2)]  # no stage without a layer


def test_no_other_cut_is_better() -> None:
    random = torch.Generator().manual_seed(0)
    for count, stages in ((5, 2), (6, 3), (7, 4), (6, 6)):
        costs = torch.rand(count, generator=random).tolist()
        ends = tuple(torch.rand(2, generator=random).tolist())

        def worst(cuts: tuple[int, ...], costs: list[float] = costs, ends: tuple[float, ...] = ends) -> float:
            each = [sum(costs[a:b]) for a, b in itertools.pairwise(cuts)]
            return max([each[0] + ends[0], *each[1:-1], each[-1] + ends[1]])

        found = partition(costs, (ends[0], ends[1]), stages)
        cuts = (0, *(span.stop for span in found))
        every = [(0, *inner, count) for inner in itertools.combinations(range(1, count), stages - 1)]
        assert worst(cuts) == pytest.approx(min(map(worst, every)))


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(UsageError, match="3 layers cannot be cut into 4 pipeline stages; choose at most 3"):
        partition([1.0] * 3, (0.0, 0.0), 4)


def _round_trip(runtime: Runtime) -> list[float]:
    """Every rank sends to both neighbours, forward and backward, before it takes anything."""
    line = Line(build_mesh(ParallelConfig("pp", pipeline=0), runtime), torch.device("cpu"), torch.float64)
    for number in range(3):
        for step, forward in ((1, True), (-1, False)):
            line.send(torch.tensor([line.rank, number, forward], dtype=torch.float64), line.rank + step, forward)
    came = []
    for step, forward in ((-1, True), (1, False)):
        for number in range(3):
            x = line.receive([3], line.rank + step, forward)
            assert x.tolist() == [(line.rank + step) % line.size, number, forward]
            came += x.tolist()
    line.settle()
    return came


@pytest.mark.parametrize("ranks", [2, 3])
def test_states_and_gradients_pass_each_other(ranks: int) -> None:
    assert all(len(came) == 18 for came in run_ranks(_round_trip, ranks))
