"""Saving while training goes on: this rank's shards are copied into host memory, and a thread writes the copies.

Rank 0's thread makes them a checkpoint once every rank's index file stands in the staging folder. No thread takes part
in a collective: ranks look at each other's writers at a safe point of the loop. One save is under way at most, and its
copies use the memory of the last one's. Left out: what a checkpoint is (`manager`).
"""

import contextlib
import copy
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from framework.checkpoint.format import Shards, write_part
from framework.checkpoint.manager import CheckpointManager
from framework.core.deadline import deadline
from framework.core.errors import FrameworkError, Interrupted
from framework.core.records import Box
from framework.core.runtime import agreed, copy_to_host

_POLL_S = 0.02  # between two looks for the other ranks' index files
_GRACE_S = 10.0  # that a rank on its way out with an error waits for the other ranks' parts
_AT_ONCE_S = 2.0  # that one on its way out at once waits for its thread
_DONE, _WRITING, _FAILED = 0, 1, 2

Held = list[tuple[str, Box, Tensor]]


class Saver:
    """Saves by `manager`; rank 0 calls `then` behind every checkpoint. Leaving the block waits for what is under way.

        with Saver(manager, then=folder.flush) as saver:
            for step in ...:
                saver.look()
                saver.save(step, {"trainer": engine.shards()}, state)

    Where manager.config.background is off, `save` returns when all is written, and needs no copy.
    """

    def __init__(self, manager: CheckpointManager, then: Callable[[], None] = lambda: None):
        self._manager, self._then = manager, then
        self._memory = HostMemory()
        self._writing: _Writing | None = None

    def save(
        self, step: int, parts: Mapping[str, Shards], state: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Save `parts` as they are now as the checkpoint of `step`; see `CheckpointManager.save`. Waits for the save
        before it, and raises what that one met. Collective."""
        self.finish()
        with deadline(f"saving step {step}", patient=True):
            self._begin(step, parts, state, metrics)

    def _begin(
        self, step: int, parts: Mapping[str, Shards], state: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Save at once, or copy and leave the rest to a thread."""
        if not self._manager.config.background:
            self._manager.save(step, parts, state, metrics)
            if self._manager.rank == 0:
                self._then()
            return
        try:
            staging = self._manager.begin(step)
            with self._manager.together(step):
                held = self._memory.hold(parts)
        except BaseException:
            self._manager.discard(step)
            raise
        self._writing = _Writing(self._manager, staging, step, held, copy.deepcopy((state, metrics)), self._then)

    def look(self) -> None:
        """A safe point: raises where a rank could not write. Collective while a save is under way."""
        if self._writing is not None and agreed(self._writing.state) != _WRITING:
            self.finish()

    def finish(self) -> None:
        """Wait until what is under way is a checkpoint; raises, on all ranks, where it cannot be one. Collective."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            with deadline(f"the writing of step {writing.step}", patient=True):
                with self._manager.together(writing.step):
                    writing.wait_for_part()
                with self._manager.together(writing.step):
                    writing.wait()
        except BaseException as error:
            writing.give_up(None if isinstance(error, Exception) else _AT_ONCE_S)
            self._manager.discard(writing.step)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None or isinstance(error, Interrupted):  # which all ranks leave with together
            self.finish()
        elif self._writing is not None:
            self._leave(self._writing, at_once=not isinstance(error, Exception))

    def _leave(self, writing: "_Writing", at_once: bool) -> None:
        """On the way out with an error that others may not share: what is under way may still become a checkpoint, but
        nobody is asked. Its own error is told, and does not hide the first."""
        if at_once:
            writing.give_up(_AT_ONCE_S)
            return
        writing.let_finish(_GRACE_S)
        if failure := writing.give_up():
            print(f"warning: {self._manager.error(writing.step, failure)}", file=sys.stderr)
            with contextlib.suppress(FrameworkError):
                self._manager.discard(writing.step)


class HostMemory:
    """Copies on the host, page-locked for a GPU's tensors. The memory is that of the last copies where shapes fit."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str, Box], Tensor] = {}

    def hold(self, parts: Mapping[str, Shards]) -> dict[str, Held]:
        """`parts` as they are now; the copies hold until the next call."""
        old, self._kept = self._kept, {}
        for part, shards in parts.items():
            for name, box, tensor in shards:
                key = part, name, box
                self._kept[key] = copy_to_host(tensor.detach(), old.pop(key, None))
        return {p: [(n, box, t) for (part, n, box), t in self._kept.items() if part == p] for p in parts}


class _GivenUp(Exception):
    """Nobody waits for this checkpoint any more."""


class _Writing:
    """One save under way: a thread that writes this rank's parts and, on rank 0, commits."""

    def __init__(
        self,
        manager: CheckpointManager,
        staging: Path,
        step: int,
        held: Mapping[str, Held],
        told: tuple[Mapping[str, Any], Mapping[str, float]],
        then: Callable[[], None],
    ):
        self.step = step
        self._manager, self._staging, self._held, self._told, self._then = manager, staging, held, told, then
        self._failure: BaseException | None = None
        self._part_written, self._given_up = threading.Event(), threading.Event()
        # A daemon: a second signal must not wait for it.
        self._thread = threading.Thread(target=self._run, name="saver", daemon=True)
        self._thread.start()

    @property
    def state(self) -> int:
        """How far this rank is, without waiting."""
        if self._thread.is_alive():
            return _WRITING
        return _DONE if self._failure is None else _FAILED

    def wait_for_part(self) -> None:
        """Until this rank's parts are written; raises what went wrong."""
        self._part_written.wait()
        self._raise()

    def wait(self) -> None:
        """Until the thread ends: on rank 0, until the checkpoint is there."""
        self._thread.join()
        self._raise()

    def let_finish(self, seconds: float) -> None:
        """Wait for this rank's parts, and so long for the rest."""
        self._part_written.wait()
        self._thread.join(seconds)

    def give_up(self, seconds: float | None = None) -> BaseException | None:
        """Have the thread end where it stands, and wait so long for it; what went wrong, if anything did."""
        self._given_up.set()
        self._thread.join(seconds)
        return self._failure

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            self._write()
            self._part_written.set()
            if self._manager.rank == 0:
                self._wait_for_others()
                self._manager.commit(self.step, *self._told)
                self._then()
        except BaseException as error:
            self._failure = error
        self._part_written.set()

    def _write(self) -> None:
        for part, held in self._held.items():
            write_part(self._staging, part, self._manager.rank, held, self._manager.world_size, self._point)

    def _wait_for_others(self) -> None:
        missing = [f"{part}-{rank:05d}.json" for part in self._held for rank in range(self._manager.world_size)]
        while missing := [name for name in missing if not (self._staging / name).exists()]:
            self._point(_POLL_S)

    def _point(self, seconds: float = 0.0) -> None:
        if self._given_up.wait(seconds) if seconds else self._given_up.is_set():
            raise _GivenUp(f"not every rank has written its part of step {self.step}")
