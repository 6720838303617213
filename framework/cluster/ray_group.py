"""A group whose workers are Ray actors, one a rank. With `local_ray` and `session` the only files that import Ray.

A call goes to all ranks at once; waiting for it notices the first rank that fails, not the first in order, gives the
others a moment to say what they saw, and raises the failure that the others follow from.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from framework.cluster import failure
from framework.cluster.config import ClusterConfig
from framework.cluster.failure import Failure
from framework.cluster.group import Group, Pause, Pending, Stream, resolved
from framework.cluster.marks import Answer, Call, Layout, Mark, join, share_out
from framework.cluster.placement import Pool
from framework.cluster.shell import END, MORE, Shell, compact
from framework.core import runtime
from framework.core.deadline import ask
from framework.core.errors import FrameworkError

PAUSE_S = 0.5  # between two looks up from waiting
GRACE_S = 6.0  # for the other ranks to report, once one has failed
STREAM_AHEAD = 4  # items that a stream may hold in Ray's store before anyone takes them


@dataclass(frozen=True)
class Seat:
    """Where a role's workers stand: a pool and its Ray placement group."""

    pool: Pool
    group: Any

    def options(self, rank: int) -> dict[str, Any]:
        """Of the actor for `rank`."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        cpus, gpus = self.pool.share
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank)
        return {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "scheduling_strategy": strategy}


class RayGroup(Group):
    """`world` actors of one role. They start at once and in parallel; the first call, or `ready`, waits for them.

    `settle` is for runtime.start in each worker (device, threads, deterministic); `prepare` runs first in each.
    """

    def __init__(
        self,
        role: str,
        worker_class: type,
        kwargs: dict[str, Any],
        *,
        world: int,
        config: ClusterConfig,
        seat: Seat,
        logs: Path,
        settle: dict[str, Any],
        prepare: Callable[[], None] | None = None,
    ):
        import ray

        super().__init__(role, worker_class)
        self._ray = ray
        self._config = config
        self._logs = [logs / f"{role}-{rank}.log" for rank in range(world)]
        self._failed: FrameworkError | None = None
        self._layout: Layout | None = None
        self._pids: list[int] = []
        actor: Any = ray.remote(Shell)
        self._shells: list[Any] = [
            actor.options(**seat.options(rank)).remote(role, rank, str(log.absolute()))
            for rank, log in enumerate(self._logs)
        ]
        for shell in self._shells:
            shell.listen.remote()
        self._address = self._shells[0].__ray_call__.remote(_address) if world > 1 else None
        settle = settle | {"world_size": world, "deadline_s": config.deadline_s}
        self._starting = [
            shell.start.remote(self._address, worker_class, kwargs, settle, prepare) for shell in self._shells
        ]

    def ready(self) -> None:
        if self._failed is not None:
            raise self._failed
        if self._layout is None:
            seats = self._collect(_ranked(self._starting), "start", self._config.start_deadline_s)
            self._pids = [pid for pid, _ in seats]
            self._layout = Layout(tuple(data_rank for _, data_rank in seats))

    def asked(self) -> Pending[int]:
        self.ready()
        asking = _ranked([shell.asked.remote() for shell in self._shells])
        return Pending(lambda pause: max(self._collect(asking, "asked", self._config.deadline_s, pause=pause)))

    def close(self) -> None:
        """End the workers at once, whatever they are doing."""
        for shell in self._shells:
            self._ray.kill(shell)

    def _call(self, name: str, mark: Mark, call: Call) -> Any:
        self.ready()
        assert self._layout is not None
        layout = self._layout
        calls, rows = share_out(mark, compact(resolved(call, keep_references=not mark.split)), layout)
        if mark.answer is Answer.STREAM:
            return self._stream(name, calls)
        references = [
            shell.call.remote(name, *args, **kwargs) for shell, (args, kwargs) in zip(self._shells, calls, strict=True)
        ]

        def wait(pause: Pause | None) -> Any:
            answers = self._collect(_ranked(references), name, self._config.deadline_s, pause=pause)
            return join(mark, answers, layout, rows)

        return Pending(wait)

    def _stream(self, name: str, calls: list[Call]) -> Stream[Any]:
        (args, kwargs), *rest = calls
        speaker = self._shells[0].stream.options(
            num_returns="streaming", _generator_backpressure_num_objects=2 * STREAM_AHEAD
        )
        items = speaker.remote(name, *args, **kwargs)
        peers = {
            shell.drain.remote(name, *args, **kwargs): rank
            for rank, (shell, (args, kwargs)) in enumerate(zip(self._shells[1:], rest, strict=True), start=1)
        }
        return self._items(items, peers, name)

    def _items(self, items: Any, peers: dict[Any, int], name: str) -> Stream[Any]:
        """Pass on references; read only the word that follows each."""
        while True:
            item = self._next(items, peers, name)
            # The stream of a process that died ends with the error in place of an item, and no word after it.
            said = self._open(self._next(items, peers, name) or item, 0, name)
            if said == MORE:
                yield Pending(partial(self._get, item), reference=item)
            elif said == END:
                self._collect(peers, name, self._config.deadline_s)
                return
            else:
                self._collect(peers, name, 0.0, [said])

    def _next(self, items: Any, peers: dict[Any, int], name: str) -> Any:
        """The next reference of a stream, None at its end; unless a peer fails first."""
        until = time.monotonic() + self._config.deadline_s
        watched = dict(peers)
        while True:
            left = max(0.0, until - time.monotonic())
            ready: list[Any] = self._ray.wait([items, *watched], timeout=left, fetch_local=False)[0]
            if not ready:
                raise self._late([0], name, self._config.deadline_s)
            if ready[0] is items:
                return next(items, None)
            rank = watched.pop(ready[0])
            if isinstance(said := self._open(ready[0], rank, name), Failure):
                self._collect({}, name, 0.0, [said])

    def _get(self, item: Any, pause: Pause | None) -> Any:
        return self._ray.get(item)

    def _collect(
        self,
        waiting: dict[Any, int],
        phase: str,
        seconds: float,
        failures: list[Failure] | None = None,
        pause: Pause | None = None,
    ) -> list[Any]:
        """All answers by rank. The first failure cuts the wait to a moment; the one that the others follow from is
        raised."""
        failures, answers, waiting = list(failures or []), {}, dict(waiting)
        until = time.monotonic() + (GRACE_S if failures else seconds)
        while waiting:
            left = max(0.0, until - time.monotonic())
            ready, _ = self._ray.wait(list(waiting), timeout=left if pause is None else min(left, PAUSE_S))
            if not ready and pause is not None and left > PAUSE_S:
                pause()
                continue
            if not ready:
                break
            rank = waiting.pop(ready[0])
            answer = self._open(ready[0], rank, phase)
            if isinstance(answer, Failure):
                failures.append(answer)
                until = min(until, time.monotonic() + GRACE_S)
            else:
                answers[rank] = answer
        if failures:
            self._fail(failure.first(failures, self._where))
        if waiting:
            raise self._late(sorted(waiting.values()), phase, seconds)
        return [answers[rank] for rank in sorted(answers)]

    def _open(self, reference: Any, rank: int, phase: str) -> Any:
        """What a rank answered; a dead process and an answer that cannot be read become a Failure."""
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except exceptions.RayActorError as error:
            return Failure(self.role, rank, phase, _cause_of_death(str(error)))
        except exceptions.RayError as error:
            return Failure.of(error, self.role, rank, phase)

    def _fail(self, first: Failure) -> None:
        self._failed = first.exception(self._logs[first.rank])
        raise self._failed

    def _late(self, ranks: list[int], phase: str, seconds: float) -> FrameworkError:
        """The deadline has passed: ask workers on this machine for their stacks, then tell."""
        for rank in ranks:
            if rank < len(self._pids) and _is_ours(self._pids[rank]):
                with contextlib.suppress(OSError):
                    os.kill(self._pids[rank], signal.SIGUSR2)
        time.sleep(0.2)  # for the stacks to reach the log
        self._failed = failure.late(self.role, ranks, phase, seconds, self._logs[ranks[0]], self._where())
        return self._failed

    def _where(self) -> str:
        """Where the ranks stand that have met; "" where they have not, or cannot be asked."""
        if self._layout is None or self._address is None:
            return ""
        host, _, port = str(self._ray.get(self._address)).rpartition(":")
        return ask(host, int(port), len(self._shells))


def _ranked(references: list[Any]) -> dict[Any, int]:
    return {reference: rank for rank, reference in enumerate(references)}


def _address(_: Shell) -> str:
    """Run on rank 0: where its peers meet it."""
    import ray

    return f"{ray.util.get_node_ip_address()}:{runtime.free_port()}"


def _cause_of_death(message: str) -> str:
    """Ray's report of a dead actor in one sentence."""
    pid = next((line.split(":")[1].strip() for line in message.splitlines() if line.strip().startswith("pid:")), "?")
    detail = message.partition("Worker exit detail: ")[2].partition("Some common causes")[0].strip()
    if not detail or "End of file" in detail:
        detail = "killed from outside (SIGKILL, out of memory), a crash, or os._exit"
    return f"its process (pid {pid}) died: {detail}"


def _is_ours(pid: int) -> bool:
    """Whether `pid` is a Ray worker on this machine: pids of another machine mean nothing here."""
    try:
        return b"ray::" in open(f"/proc/{pid}/cmdline", "rb").read()
    except OSError:
        return False
