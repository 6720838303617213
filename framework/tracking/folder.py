"""The run folder: what a run is, how far it came, what it measured. Only the main rank writes, and only one attempt.

    config.yaml     the whole recipe, resolved          status.json    state, step, total, ETA, attempt, last error
    metrics.jsonl   one object a logged step            summary.json   final figures; it stands there when all is done
    samples.jsonl   what the model said on the way      logs/          ROLE-RANK.log
    digests.jsonl   what two runs are compared by       (see `divergence`)
    checkpoints/    see `checkpoint`                    model/         the result, in the Hugging Face format

Figures are logged before the checkpoint of their step is saved; then `cut_back` to a restored step leaves neither holes
nor doubles. Left out: wall-clock times in metrics.jsonl, so that a resumed file can equal an undisturbed one.
"""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import yaml

from framework.core.errors import FrameworkError, UsageError
from framework.tracking.atomic import replace_json, replace_text
from framework.tracking.config import TrackingConfig
from framework.tracking.divergence import FILE, Trace
from framework.tracking.identity import Identity, identify, refuse
from framework.tracking.provenance import provenance
from framework.tracking.remote import Remote, Unreachable
from framework.tracking.status import Status, read_status, write_status
from framework.tracking.tracker import Tracker, open_tracker

_FLUSH_EVERY = 30.0  # seconds between two uploads of logs, where the run lives on object storage
_STATUS_EVERY = 0.5  # seconds between status files while steps fly by


class RunFolder:
    """Open with `RunFolder.open`. On other ranks than the main one every writing method does nothing."""

    def __init__(
        self, path: Path, recipe: Mapping[str, Any], identity: Identity, is_main: bool, remote: Remote | None = None
    ):
        self.path, self.recipe, self.identity, self.is_main, self._remote = path, recipe, identity, is_main, remote
        self.attempt = 0  # 0 = this process may not write
        self._status = read_status(path) or Status()
        self._before, self._started = self._status.seconds, time.monotonic()
        self._pace: tuple[float, int] | None = None  # when and at which step this attempt began
        self._written = 0.0
        self._taken, self._flushed = 0, time.monotonic()  # the attempt's number there, and when it was last sent
        self._uploading = threading.Lock()
        self._opened: Tracker | None = None
        self._new = False  # whether this attempt made the run
        self._made: list[Path] = []  # folders that it made, the innermost first

    @classmethod
    def open(
        cls,
        path: Path,
        recipe: Mapping[str, Any],
        parents: Mapping[str, str] | None = None,
        ignore: Iterable[str] = (),
        is_main: bool = True,
        remote: Remote | None = None,
    ) -> Self:
        """Begin or continue the run of `recipe` (nested, plain) in `path`; a finished one is left untouched.

        `parents`: role -> digest of what the result depends on. `ignore`: dotted keys, or prefixes, that do not change
        the answer. `remote`: the object storage that `path` is the spool of, already fetched. Raises UsageError where
        the folder holds another run, or the recipe's tracker cannot be had.
        """
        path = Path(path)
        identity = identify(recipe, parents or {}, ignore)
        try:
            _compare(path, identity, ignore)
            folder = cls(path, recipe, identity, is_main, remote)
            if is_main and not folder.is_finished:
                folder._begin()
        except OSError as error:
            raise UsageError(f"{path} cannot be a run folder (run.dir): {error.filename}: {error.strerror}") from None
        return folder

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json; {} where the run never finished."""
        try:
            content = json.loads((self.path / "summary.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def is_finished(self) -> bool:
        """A summary stands here, of an equal recipe and equal parents, that went as far as this recipe asks."""
        summary = self.summary
        return summary.get("digest") == self.identity.digest and self.identity.reaches(summary.get("lengths", {}))

    def log(self, step: int, figures: Mapping[str, float | str]) -> None:
        """Append one object to metrics.jsonl and pass its numbers to the tracker. One that is not finite becomes null;
        a string (a digest) stays in the file alone."""
        if not self._may_write():
            return
        clean = {name: value if isinstance(value, str) else _number(value) for name, value in figures.items()}
        _append(self.path / "metrics.jsonl", {"step": step, **clean})
        self._tracker.log(step, {n: value for n, value in clean.items() if isinstance(value, int | float)})

    def sample(self, step: int, record: Mapping[str, Any]) -> None:
        """Append one object to samples.jsonl: {"step": ..., "prompt": ..., "response": ..., ...}."""
        if self._may_write():
            _append(self.path / "samples.jsonl", {"step": step, **record})

    def trace(self, step: int, trace: Trace) -> None:
        """Append one object to digests.jsonl."""
        if self._may_write():
            _append(self.path / FILE, {"step": step, **trace.record()})

    def advance(self, step: int, total: int) -> None:
        """Tell status.json that `step` of `total` is done. Cheap: it writes at most twice a second."""
        if not self.is_main:
            return
        now = time.monotonic()
        self._pace = self._pace or (now, step)
        done, elapsed = step - self._pace[1], now - self._pace[0]
        eta = elapsed / done * (total - step) if done > 0 else None
        self._status = replace(self._status, step=step, total=total, eta_seconds=eta)
        if now - self._written >= _STATUS_EVERY and self._may_write():
            self._write_status()
        if self._remote and now - self._flushed >= _FLUSH_EVERY and not self._uploading.locked():
            self._flush_or_warn()

    def flush(self) -> None:
        """Bring object storage, where the run lives on one, up to date: after a save, and at the end. Raises where it
        cannot be reached, or a newer attempt has the run. Any thread may call it."""
        if self._remote and self.is_main and self.attempt:
            with self._uploading:
                self._remote.flush(self._taken)
                self._flushed = time.monotonic()

    def cut_back(self, step: int) -> None:
        """Forget what was logged after `step`; -1, where nothing was restored, forgets all."""
        if not self._may_write():
            return
        for name in ("metrics.jsonl", "samples.jsonl", FILE):
            path = self.path / name
            if path.exists():
                kept = [line for line in _whole_lines(path) if 0 <= _step_of(line) <= step]
                replace_text(path, "".join(kept))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json: `summary` (with "figures") and where it came from. From here on the run is finished."""
        if not self._may_write():
            return
        identity = {
            "digest": self.identity.digest,
            "lengths": self.identity.lengths,
            "parents": self.identity.parents,
            "seed": self.recipe.get("seed"),
            "world": int(os.environ.get("WORLD_SIZE", 1)),
            "seconds": round(self._seconds(), 3),
            "attempts": self.attempt,
        }
        replace_json(self.path / "summary.json", {**provenance(), **identity, **summary})
        self._status = replace(self._status, state="finished", eta_seconds=0.0, last_error=None)
        self._write_status()
        figures = {name: _number(value) for name, value in dict(summary.get("figures", {})).items()}
        self._tracker.finish({name: value for name, value in figures.items() if value is not None})
        self.flush()

    def fail(self, error: BaseException, state: str = "failed") -> None:
        """Say in status.json why the run stopped. Does nothing where a newer attempt has taken the folder over."""
        if self.is_main and self.attempt and self._marker.exists():
            sentence = str(error) or type(error).__name__
            self._status = replace(self._status, state=state, last_error=sentence, eta_seconds=None)
            self._write_status()
            with contextlib.suppress(FrameworkError):  # the error that ends the run is the one to tell
                self.flush()

    def withdraw(self) -> bool:
        """Take back what opening wrote, so that a corrected recipe finds no other run here. False, and nothing done,
        where there was a run before or this one has logged or saved something."""
        kept = any((self.path / name).exists() for name in ("metrics.jsonl", "checkpoints", "summary.json"))
        if not self._new or kept:
            return False
        self.close()
        for path in (self.path / "config.yaml", self.path / "status.json", self._marker):
            path.unlink(missing_ok=True)
        for path in self._made:
            with contextlib.suppress(OSError):  # not empty: others have put something there
                path.rmdir()
        return True

    def log_file(self, role: str, rank: int = 0) -> Path:
        """Where a role's rank logs: logs/ROLE-RANK.log."""
        path = self.path / "logs" / f"{role}-{rank}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def close(self) -> None:
        """Let the tracker send what it holds."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    # --- one writer at a time ----------------------------------------------------------------------------------

    @property
    def _marker(self) -> Path:
        return self.path / f".attempt-{self.attempt:06d}"

    def _begin(self) -> None:
        config = TrackingConfig(**self.recipe.get("tracking", {}))
        self._new = not (self.path / "config.yaml").exists()
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._taken = self._remote.take() if self._remote else 0
        self.attempt = _next_attempt(self.path)
        try:
            self._opened = open_tracker(self.path, config, self.recipe)
        except UsageError:
            self.withdraw()
            raise
        replace_text(self.path / "config.yaml", yaml.safe_dump(dict(self.recipe), sort_keys=False, allow_unicode=True))
        self._status = replace(
            self._status,
            state="running",
            stage=str(self.recipe.get("stage", "")),
            attempt=self.attempt,
            parents=self.identity.parents,
            eta_seconds=None,
        )
        self._write_status()

    def _flush_or_warn(self) -> None:
        """A storage that is away for a while stops no run; what was to be sent goes with the next flush."""
        try:
            self.flush()
        except Unreachable as error:
            self._flushed = time.monotonic()
            print(f"{error}; the run goes on, and sends it later", file=sys.stderr)

    def require_own(self) -> None:
        """Raise where another attempt has taken the folder over."""
        self._may_write()

    def _may_write(self) -> bool:
        """Whether this is the main rank; raises where another attempt has taken the folder over."""
        if not self.is_main:
            return False
        if not self.attempt:
            raise FrameworkError(f"{self.path} is finished; nothing more is written to it")
        if not self._marker.exists():
            raise FrameworkError(
                f"{self.path}: attempt {self.attempt} is over, a newer one has taken the run; this process must end"
            )
        return True

    @property
    def _tracker(self) -> Tracker:
        if self._opened is None:
            raise FrameworkError(f"{self.path} was closed")
        return self._opened

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def _write_status(self) -> None:
        self._written = time.monotonic()
        write_status(self.path, replace(self._status, seconds=round(self._seconds(), 3)))


def _compare(path: Path, identity: Identity, ignore: Iterable[str]) -> None:
    """Refuse a folder that holds another run."""
    try:
        recipe = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (yaml.YAMLError, UnicodeDecodeError):
        recipe = None
    if not isinstance(recipe, dict):
        raise UsageError(f"{path / 'config.yaml'} is not a recipe; choose another run.dir, or remove the folder")
    status = read_status(path)
    there = identify(recipe, identity.parents if status is None else status.parents, ignore)
    if conflicts := there.conflicts(identity):
        refuse(path, conflicts)


def _next_attempt(path: Path) -> int:
    """Take the folder: one marker file an attempt, made exclusively, so that of two that start at once one loses."""
    known = [int(marker.name.rpartition("-")[2]) for marker in path.glob(".attempt-[0-9]*[0-9]")]
    number = max(known, default=(read_status(path) or Status()).attempt) + 1
    while True:
        try:
            (path / f".attempt-{number:06d}").touch(exist_ok=False)
            break
        except FileExistsError:
            number += 1
    for marker in path.glob(".attempt-[0-9]*[0-9]"):
        if int(marker.name.rpartition("-")[2]) < number:
            marker.unlink(missing_ok=True)
    return number


def _append(path: Path, record: Mapping[str, Any]) -> None:
    """One write a line: a kill leaves at most a torn last one, and `cut_back` drops that."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def _number(value: Any) -> float | int | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def _whole_lines(path: Path) -> list[str]:
    return [line for line in path.read_text("utf-8", "replace").splitlines(keepends=True) if line.endswith("\n")]


def _step_of(line: str) -> int:
    """The step of a logged line; one that is no JSON object counts as never restored."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
