"""Pipeline parallelism as data: which layers a stage holds, in which order a rank works, and how states travel.

Stage c * P + r stands on rank r of P as its c-th; there is one a rank, or two where stages interleave. An order is a
list of `Work`; the engine goes through it. Why not torch.distributed.pipelining: it wants to know all shapes before,
holds buffers for all micro-batches at once and wraps every error in its own, so that a late rank could not be named;
its orders are the independent check of ours (tests). Left out: zero-bubble schedules.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from framework.core.errors import UsageError
from framework.parallel.config import Schedule
from framework.parallel.mesh import Mesh


@dataclass(frozen=True)
class Work:
    """One micro-batch through one of this rank's stages, forward or backward. Example: Work(False, 1, 0)."""

    forward: bool
    chunk: int  # which of this rank's stages
    micro: int


def partition(costs: Sequence[float], ends: tuple[float, float], stages: int) -> list[range]:
    """Layers of each stage: consecutive, at least one each, so that the costliest stage costs least. `ends`: what the
    first stage (embedding) and the last (heads) cost besides their layers."""
    count = len(costs)
    if stages > count:
        raise UsageError(f"{count} layers cannot be cut into {stages} pipeline stages; choose at most {count}")

    def cost(first: int, end: int, stage: int) -> float:
        return sum(costs[first:end]) + ends[0] * (stage == 0) + ends[1] * (stage == stages - 1)

    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}  # end of the last stage so far -> (costliest, cuts)
    for stage in range(stages):
        best = {
            end: min((max(worst, cost(at, end, stage)), [*cuts, end]) for at, (worst, cuts) in best.items() if at < end)
            for end in range(stage + 1, count - (stages - stage - 1) + 1)
        }
    cuts = best[count][1]
    return [range(first, end) for first, end in pairwise(cuts)]


def order(schedule: Schedule, rank: int, ranks: int, micros: int, backward: bool = True) -> list[Work]:
    """What `rank` of `ranks` does with `micros` micro-batches, in order. Interleaved, their number must be a multiple
    of `ranks`."""
    chunks = 2 if schedule is Schedule.INTERLEAVED else 1
    total = micros * chunks
    if chunks > 1 and micros % ranks:
        raise ValueError(f"{micros} micro-batches do not interleave over {ranks} ranks")
    forwards = [Work(True, *_nth(k, ranks, chunks)) for k in range(total)]
    if not backward:
        return forwards
    backwards = [Work(False, chunks - 1 - work.chunk, work.micro) for work in forwards]
    ahead = min(total, _warm_up(schedule, rank, ranks, micros))
    steady = [work for pair in zip(forwards[ahead:], backwards) for work in pair]
    return forwards[:ahead] + steady + backwards[total - ahead :]


def _warm_up(schedule: Schedule, rank: int, ranks: int, micros: int) -> int:
    """Forwards before the first pair of forward and backward."""
    if schedule is Schedule.GPIPE:
        return micros
    behind = ranks - rank - 1
    return behind if schedule is Schedule.ONE_F_ONE_B else 2 * behind + ranks


def _nth(k: int, ranks: int, chunks: int) -> tuple[int, int]:
    """(chunk, micro-batch) of a rank's k-th forward: `ranks` micro-batches through one chunk, then through the next."""
    if chunks == 1:
        return 0, k
    group, within = divmod(k, ranks * chunks)
    chunk, micro = divmod(within, ranks)
    return chunk, group * ranks + micro


class Line:
    """The ranks of one pipeline, and what passes between neighbours: states forward, their gradients backward.

    Each direction of each pair has a process group of its own: what is sent there arrives in the same order, and no
    send can stand in the way of another pair's (on a GPU they would queue up behind each other and lock).
    """

    def __init__(self, mesh: Mesh, device: torch.device, dtype: torch.dtype):
        self.rank, self.size = mesh.place("pipeline"), mesh.size("pipeline")
        self.device, self._dtype = device, dtype
        self._ways: dict[tuple[int, int, bool], dist.ProcessGroup] = {}
        self._under_way: deque[tuple[dist.Work, Tensor]] = deque()
        for ranks in mesh.lines("pipeline"):
            for first, second in {tuple(sorted((r, (r + 1) % self.size))) for r in range(self.size)}:
                for ascending in (True, False):
                    for forward in (True, False):
                        group = dist.new_group([ranks[first], ranks[second]])
                        if dist.get_rank() in ranks:
                            pair = (first, second) if ascending else (second, first)
                            self._ways[(*pair, forward)] = group

    def send(self, x: Tensor, to_stage: int, forward: bool) -> None:
        """Hand x on; returns at once. It is kept until it has left."""
        x, to = x.detach().contiguous(), to_stage % self.size
        group = self._ways[(self.rank, to, forward)]
        work = dist.isend(x, group=group, group_dst=int(to > self.rank))
        assert work is not None
        self._under_way.append((work, x))
        while self._under_way and self._under_way[0][0].is_completed():
            self._under_way.popleft()

    def receive(self, shape: Sequence[int], from_stage: int, forward: bool) -> Tensor:
        """The next tensor of that stage."""
        x, source = torch.empty(*shape, device=self.device, dtype=self._dtype), from_stage % self.size
        group = self._ways[(source, self.rank, forward)]
        work = dist.irecv(x, group=group, group_src=int(source > self.rank))
        assert work is not None
        work.wait()
        return x

    def settle(self) -> None:
        """Wait until all that was sent has left."""
        while self._under_way:
            self._under_way.popleft()[0].wait()
