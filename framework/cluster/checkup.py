"""Whether the ranks of a run are fit, before any model is built: a matmul on each device, then an all-reduce on each
node and over each pair of neighbouring nodes.

Nobody waits long for a deaf rank: what each has done stands in the store where all meet, rank 0 names who is missing
there at the deadline, and every collective has a group of its own, so that one deaf node stops its neighbours alone.
Left out: who starts the ranks, and bandwidths in absolute numbers.
"""

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from framework.core.errors import DeadlineError
from framework.core.runtime import synchronize

SLOW = 2.0  # times the median
_MEASURE_S = 0.5
_LOOK_S = 0.02
_LATE_S = 2.0  # that ranks may be late to say that they have waited
_MARGIN_S = 5.0  # that rank 0 may be later than the others
_COME, _LEAVE = "coming", "leaving"
WAITED = "did not end in time"


@dataclass(frozen=True)
class Reading:
    """What a probe saw: seconds, the least of several, and what was wrong with the answer, if anything."""

    seconds: float
    wrong: str = ""


@dataclass(frozen=True)
class Probes:
    """How a rank is looked at. A test hands in one that is slow, wrong or deaf."""

    matmul: Callable[[torch.device], Reading]
    all_reduce: Callable[[torch.device, float], Reading]  # over the default group; seconds that it may take


@dataclass(frozen=True)
class Seat:
    """Where a rank stands. Example: Seat(rank=3, node="b", device="cuda:1")."""

    rank: int
    node: str
    device: str

    def __str__(self) -> str:
        return f"node {self.node} (rank {self.rank})"


@dataclass(frozen=True)
class Verdict:
    """One line a rank where all are fit, else one line for each that is not; for one rank to tell: `speaks` is true on
    rank 0, and on all others where rank 0 is deaf."""

    fit: bool
    lines: Sequence[str]
    speaks: bool


@dataclass(frozen=True)
class _Group:
    """Ranks that share one all-reduce."""

    name: str
    ranks: Sequence[int]


def check_ranks(
    seat: Seat,
    world: int,
    store: dist.Store,
    probes: Probes | None = None,
    start_s: float = 30.0,
    work_s: float = 12.0,
) -> Verdict:
    """Look at all ranks of `world`, this one being `seat`; collective, but for ranks that are deaf.

    `start_s`: until all have come to the store; `work_s`: for each of the probes.
    """
    check = _Checkup(seat, world, dist.PrefixStore("checkup", store), probes or Probes(time_matmul, time_all_reduce))
    try:
        return check.run(start_s, work_s)
    except _Unfit as unfit:
        return unfit.verdict
    finally:
        check.leave()


Judge = Callable[[Mapping[int, Reading]], list[str]]  # what is wrong with what the ranks have seen, a line each


class _Unfit(Exception):
    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict


class _Checkup:
    def __init__(self, seat: Seat, world: int, store: dist.Store, probes: Probes) -> None:
        self._seat, self._world, self._store, self._probes = seat, world, store, probes
        self._device = torch.device(seat.device)
        self._seats: list[Seat] = [Seat(rank, "?", "?") for rank in range(world)]

    def run(self, start_s: float, work_s: float) -> Verdict:
        self._tell(_COME, asdict(self._seat))
        self._agree(_COME, start_s, None)
        if self._seat.rank == 0:
            self._store.set("seats", json.dumps([self._read(_COME, rank) for rank in range(self._world)]))
        self._seats = [Seat(**seat) for seat in json.loads(self._store.get("seats"))]
        self._probe("matmul", work_s, lambda: self._probes.matmul(self._device), self._unfit_ranks)
        phases = list(_phases(self._seats))
        for phase, groups in phases:
            mine = next((group for group in groups if self._seat.rank in group.ranks), None)
            self._probe(phase, work_s, partial(self._together, mine, work_s), _unfit_groups(phase, groups))
        seen = ["matmul", *(name for name, _ in phases)]
        speaks = self._seat.rank == 0
        return Verdict(True, [self._line(rank, seen) for rank in range(self._world)] if speaks else [], speaks)

    def leave(self) -> None:
        """Rank 0 goes last, for the store may be in its process."""
        with contextlib.suppress(RuntimeError):
            self._tell(_LEAVE, {})
            if self._seat.rank == 0:
                self._deaf(_LEAVE, _LATE_S)

    def _probe(self, phase: str, seconds: float, probe: Callable[[], Reading | None], judge: Judge) -> None:
        """One probe on all ranks at once, and what rank 0 says of it. Ranks that others are deaf to say that they have
        waited; who is deaf says nothing."""
        until = time.monotonic() + seconds
        try:
            reading = probe() or Reading(0.0)
        except RuntimeError as error:
            torchs_own_deadline = time.monotonic() > until - _LATE_S
            reading = Reading(math.inf, WAITED if torchs_own_deadline else f"failed: {str(error).splitlines()[0]}")
        except DeadlineError:
            reading = Reading(math.inf, WAITED)
        self._tell(phase, asdict(reading))
        self._agree(phase, until - time.monotonic() + _LATE_S, judge)

    def _together(self, group: _Group | None, seconds: float) -> Reading | None:
        """An all-reduce with the ranks of `group`, in a process group that lasts as long."""
        if group is None or len(group.ranks) == 1:
            return None
        backend = "gloo" if self._device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(group.name, self._store),
            rank=group.ranks.index(self._seat.rank),
            world_size=len(group.ranks),
            timeout=timedelta(seconds=seconds),
        )
        reading = self._probes.all_reduce(self._device, seconds)
        dist.destroy_process_group()
        return reading

    def _agree(self, phase: str, seconds: float, judge: Judge | None) -> None:
        """Rank 0 hears all and decides for all; raises _Unfit on all ranks where anything is wrong."""
        if self._seat.rank == 0:
            deaf = self._deaf(phase, seconds)
            heard = [rank for rank in range(self._world) if rank not in deaf]
            wrong = judge({rank: self._reading(phase, rank) for rank in heard}) if judge else []
            own = [line for line in wrong if not (deaf and WAITED in line)]  # who waited for a deaf one is fit
            self._store.set(f"verdict {phase}", json.dumps([*deaf.values(), *own]))
        try:
            self._store.wait([f"verdict {phase}"], timedelta(seconds=max(0.0, seconds) + _MARGIN_S))
        except RuntimeError:
            raise _Unfit(Verdict(False, [f"{self._seats[0]} is deaf: it said nothing of '{phase}'"], True)) from None
        if lines := json.loads(self._store.get(f"verdict {phase}")):
            raise _Unfit(Verdict(False, lines, self._seat.rank == 0))

    def _deaf(self, phase: str, seconds: float) -> dict[int, str]:
        """The ranks that have said nothing of `phase` when the time is up, and how to say so."""
        until = time.monotonic() + seconds
        missing = list(range(self._world))
        while missing := [rank for rank in missing if not self._store.check([f"{phase}/{rank}"])]:
            if time.monotonic() > until:
                break
            time.sleep(_LOOK_S)
        if phase == _COME:
            return {rank: f"rank {rank} never came" for rank in missing}
        return {rank: f"{self._seats[rank]} is deaf: it said nothing of '{phase}'" for rank in missing}

    def _unfit_ranks(self, found: Mapping[int, Reading]) -> list[str]:
        wrong = [f"{self._seats[rank]}: matmul {reading.wrong}" for rank, reading in found.items() if reading.wrong]
        times = {rank: reading.seconds for rank, reading in found.items() if not reading.wrong}
        return wrong + [f"{self._seats[rank]}: matmul {said}" for rank, said in _slow(times).items()]

    def _line(self, rank: int, phases: Sequence[str]) -> str:
        seen = [(phase, reading) for phase in phases if (reading := self._reading(phase, rank)).seconds]
        times = ", ".join(f"{phase} {1e3 * reading.seconds:.2f} ms" for phase, reading in seen)
        return f"{self._seats[rank]} on {self._seats[rank].device}: {times}"

    def _reading(self, phase: str, rank: int) -> Reading:
        return Reading(**self._read(phase, rank))

    def _tell(self, what: str, about: Mapping[str, Any]) -> None:
        self._store.set(f"{what}/{self._seat.rank}", json.dumps(about))

    def _read(self, what: str, rank: int) -> dict[str, Any]:
        read: dict[str, Any] = json.loads(self._store.get(f"{what}/{rank}"))
        return read


def _phases(seats: Sequence[Seat]) -> Iterator[tuple[str, Sequence[_Group]]]:
    """The all-reduces, each a phase of groups that do not meet: every node by itself, then neighbouring pairs in a ring
    of nodes, which an odd number of them needs three phases for."""
    names = list(dict.fromkeys(seat.node for seat in seats))
    ranks = {name: [seat.rank for seat in seats if seat.node == name] for name in names}
    yield "all-reduce on the node", [_Group(f"node {name}", ranks[name]) for name in names]
    count = len(names)
    pairs = [(names[i], names[(i + 1) % count]) for i in range(count if count > 2 else count - 1)]
    colour = [2 if i == count - 1 and count % 2 else i % 2 for i in range(len(pairs))]
    for number, side in enumerate(("next", "last", "first")):
        groups = [_Group(f"nodes {a} and {b}", ranks[a] + ranks[b]) for (a, b), c in zip(pairs, colour) if c == number]
        if groups:
            yield f"all-reduce with the {side} node", groups


def _unfit_groups(phase: str, groups: Sequence[_Group]) -> Callable[[Mapping[int, Reading]], list[str]]:
    """A group is as quick as its slowest rank."""

    def judge(found: Mapping[int, Reading]) -> list[str]:
        wrong = {g.name: w for g in groups for rank in g.ranks if rank in found and (w := found[rank].wrong)}
        whole = [g for g in groups if g.name not in wrong and all(rank in found for rank in g.ranks)]
        times = {g.name: t for g in whole if (t := max(found[rank].seconds for rank in g.ranks))}
        return [f"{name}: all-reduce {said}" for name, said in {**wrong, **_slow(times)}.items()]

    return judge


def _slow(times: Mapping[Any, float]) -> dict[Any, str]:
    """Those that are SLOW times slower than the median (the lower one of two), and how much."""
    middle = statistics.median_low(times.values()) if times else 0.0
    return {
        name: f"{seconds / middle:.1f} times slower than the median"
        for name, seconds in times.items()
        if seconds > SLOW * middle
    }


# --- probes ----------------------------------------------------------------------------------------------------------


def time_matmul(device: torch.device) -> Reading:
    """Small whole numbers, so that every entry, and their sum, is exact in float32 in any order of summing."""
    size = 512 if device.type == "cpu" else 4096
    left = (torch.arange(size * size, dtype=torch.float32, device=device) % 7 - 3).view(size, size)
    right = left.flip(0).T.contiguous()
    expected = float(left.double().sum(0) @ right.double().sum(1))
    return _timed(lambda: left @ right, lambda product: float(product.double().sum()), expected, device)


def time_all_reduce(device: torch.device, seconds: float) -> Reading:
    """A sum over the default group, whose every entry is 1 + 2 + ... + its ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    size = 2**20 if device.type == "cpu" else 2**24
    until = time.monotonic() + seconds

    def reduce() -> torch.Tensor:
        summed = torch.full((size,), rank + 1.0, device=device)
        work = dist.all_reduce(summed, async_op=True)
        while not work.is_completed():
            if time.monotonic() > until:
                raise DeadlineError("no answer")
            time.sleep(0)
        work.wait()
        return summed

    return _timed(reduce, lambda summed: float(summed.double().mean()), world * (world + 1) / 2, device, repeats=5)


def _timed(
    work: Callable[[], torch.Tensor],
    figure: Callable[[torch.Tensor], float],
    expected: float,
    device: torch.device,
    repeats: int = 0,
) -> Reading:
    """The least time of `repeats` times, or of as many as fit in half a second; after one that warms up."""
    first, least, count, until = figure(work()), math.inf, 0, time.monotonic() + _MEASURE_S
    while count < repeats or (not repeats and time.monotonic() < until):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        least, count = min(least, time.perf_counter() - began), count + 1
    return Reading(least, "" if first == expected else f"gave {first:g} in place of {expected:g}")
