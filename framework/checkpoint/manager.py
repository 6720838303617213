"""Saving so that a kill at any instant costs nothing, and believing only what verifies.

A checkpoint is staged in a hidden folder, every file synced and hashed, the manifest written last, and the folder
renamed into place: it exists when its manifest verifies. Left out: what the parts hold (`engine.shards`), how a box is
laid out (`format`), and saving while training goes on (`saver`).
"""

import contextlib
import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import torch.distributed as dist

from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.format import Shards, write_bytes, write_part
from framework.checkpoint.manifest import MANIFEST, Checkpoint, describe, render_manifest
from framework.core.errors import CheckpointError

_NAME = re.compile(r"step_(\d{8,})")

Gather = Callable[[Any], list[Any]]


def gather_objects(value: Any) -> list[Any]:
    """What every rank of the default process group passed, by rank; [value] where there is no group."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


class CheckpointManager:
    """The checkpoints of one run, in `folder`. `save`, `saving` and `latest` are collective over the ranks that share
    it; `gather` passes one small object from every rank to every rank. `guard` raises, on rank 0, where the folder has
    another owner by now; it is asked before anything is written there, and again before that becomes a checkpoint."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig | None = None,
        rank: int = 0,
        world_size: int = 1,
        gather: Gather = gather_objects,
        guard: Callable[[], None] = lambda: None,
    ):
        self.folder, self.config = Path(folder), config or CheckpointConfig()
        self.rank, self.world_size, self._gather, self._guard = rank, world_size, gather, guard

    def save(
        self,
        step: int,
        parts: Mapping[str, Shards],
        state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> Checkpoint:
        """Save `parts` (name -> (logical name, box, tensor) of this rank) as the checkpoint of `step`."""
        with self.saving(step, state, metrics) as staging:
            for part, shards in parts.items():
                write_part(staging, part, self.rank, shards, self.world_size)
        return Checkpoint(self._path(step))

    @contextlib.contextmanager
    def saving(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> Iterator[Path]:
        """The staging folder, to be filled by `write_part`, here or in worker processes; leaving commits it.

        Whatever goes wrong on any rank, every rank leaves with a CheckpointError (or its own error), the staging folder
        is removed and older checkpoints stand as before.
        """
        try:
            staging = self.begin(step)
            with self.together(step):
                yield staging
            with self.together(step):
                if self.rank == 0:
                    self.commit(step, state, metrics)
        except BaseException:
            self.discard(step)
            raise

    def begin(self, step: int) -> Path:
        """The staging folder for `step`, empty and there for all ranks. Collective."""
        with self.together(step):
            return self.stage(step) if self.rank == 0 else self._staging(step)

    def discard(self, step: int) -> None:
        """Drop what is staged of `step`. Raises where the folder has another owner by now: its staging folder has the
        same name."""
        if self.rank == 0:
            self._guard()
            shutil.rmtree(self._staging(step), ignore_errors=True)

    def stage(self, step: int) -> Path:
        """An empty staging folder for `step`; leftovers of killed saves are cleared away."""
        self._guard()
        self._clear_leftovers()
        staging = self._staging(step)
        staging.mkdir(parents=True)
        return staging

    def commit(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> Checkpoint:
        """Make the staged files of `step` a checkpoint: check that nothing is missing, manifest, rename, retention."""
        self._guard()
        staging, final = self._staging(step), self._path(step)
        write_bytes(staging / MANIFEST, render_manifest(describe(staging, step, state, metrics or {})))
        _sync_folder(staging)
        if final.exists():
            final.rename(self._replaced(step))
        staging.rename(final)
        _sync_folder(self.folder)
        self._retain(step)
        return Checkpoint(final)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; one warning line for each newer one that does not. None: start anew."""
        if self.rank == 0:
            self._clear_leftovers()
        for step in sorted(self._gather(self._steps())[0], reverse=True):
            found = Checkpoint(self._path(step))
            shares = self._gather(found.problems(self.rank, self.world_size))
            problems = [problem for share in shares for problem in share]
            if not problems:
                return found
            if self.rank == 0:
                print(f"warning: checkpoint {found.folder.name} is not used: {problems[0]}", file=sys.stderr)
        return None

    def best(self) -> Checkpoint | None:
        """The kept checkpoint with the best `config.best`; None where none measured it."""
        name, sign = self.config.best.removeprefix("-"), -1.0 if self.config.best.startswith("-") else 1.0
        figures = {}
        for step in self._steps():
            with contextlib.suppress(CheckpointError):
                figure = Checkpoint(self._path(step)).metrics.get(name)
                if figure is not None and isfinite(figure):
                    figures[step] = sign * figure
        return Checkpoint(self._path(min(figures, key=lambda step: (figures[step], -step)))) if figures else None

    @contextlib.contextmanager
    def together(self, step: int) -> Iterator[None]:
        """A phase that all ranks leave together: where one fails, all do, and nobody waits for the one that left."""
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
        messages = self._gather(None if failure is None else _sentence(failure))
        if isinstance(failure, OSError | CheckpointError):
            raise self.error(step, failure) from failure
        if failure is not None:
            raise failure
        failed = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None]
        if failed:
            raise self._error(step, failed[0])

    def error(self, step: int, failure: BaseException) -> CheckpointError:
        """What to say where `step` cannot be saved, in one line."""
        return self._error(step, _sentence(failure))

    def _error(self, step: int, why: str) -> CheckpointError:
        return CheckpointError(f"cannot save step {step} in {self.folder}: {why}")

    def _retain(self, step: int) -> None:
        """Keep the newest and the best. What lies beyond `step` belongs to a course that the run no longer follows:
        had it verified, the run would have gone on from there."""
        steps = sorted(self._steps())
        keep = set([s for s in steps if s <= step][-self.config.keep :])
        for old in steps:
            if old > step:
                shutil.rmtree(self._path(old), ignore_errors=True)
        best = self.best()
        keep |= {best.step} if best else set()
        for old in steps:
            if old not in keep:
                shutil.rmtree(self._path(old), ignore_errors=True)
        shutil.rmtree(self._replaced(step), ignore_errors=True)

    def _clear_leftovers(self) -> None:
        """Drop half-written folders; put back a checkpoint whose replacement never arrived."""
        for path in self.folder.glob(".step_*"):
            home = self.folder / path.name[1:].partition(".")[0]
            if path.suffix == ".replaced" and not home.exists():
                path.rename(home)
            else:
                shutil.rmtree(path, ignore_errors=True)

    def _steps(self) -> list[int]:
        names = (_NAME.fullmatch(path.name) for path in self.folder.glob("step_*"))
        return sorted(int(name[1]) for name in names if name)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _staging(self, step: int) -> Path:
        return self.folder / f".step_{step:08d}.partial"

    def _replaced(self, step: int) -> Path:
        return self.folder / f".step_{step:08d}.replaced"


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.strerror or 'no space left'}; free some space and run the same command again"
    return str(error) or type(error).__name__


def _sync_folder(folder: Path) -> None:
    """The entries of a folder reach the disk like those of a file."""
    if os.name == "nt":  # no folder can be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
