"""What every stage does around its work: extensions, runtime, run folder, stop requests, and the closing summary."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cuda_ext.dispatch import preferring
from framework.cluster.config import RanksConfig
from framework.core.config import find_file
from framework.core.deadline import ending, unwatch
from framework.core.errors import DataError, Interrupted, UsageError, foreign
from framework.core.places import is_url
from framework.core.registry import lookup
from framework.core.runtime import Runtime, agreed, apart, heed, start
from framework.core.signals import StopRequest, stop_request
from framework.data.config import DataConfig
from framework.data.sources import described, open_sources
from framework.stages.config import NOT_IN_HASH, PpoRun, RunConfig, TrainingRun
from framework.stages.extensions import load_extensions
from framework.stages.ops import wanted_ops
from framework.stages.plan import plain
from framework.tasks.task import get as get_task
from framework.tracking.folder import RunFolder
from framework.tracking.identity import LENGTHS
from framework.tracking.progress import Progress
from framework.tracking.remote import Remote, brought
from framework.workers.rule import find_reward


@dataclass(frozen=True)
class Run:
    """A finished run. Example: Run(Path("runs/sft"), {"valid/loss": 3.1, "valid/loss/before": 5.0, ...})."""

    folder: Path
    summary: Mapping[str, Any]

    def figure(self, name: str) -> float:
        """A final figure by name; an unknown one is an error that lists what there is."""
        figures = self.summary["figures"]
        if name not in figures:
            raise UsageError(f"the run has no figure '{name}'; it has {', '.join(sorted(figures))}")
        return float(figures[name])


class Teller(Protocol):
    """Who is told what data are prepared: a Job, or a tool that has none."""

    def say(self, line: str) -> None: ...
    def preparing(self, part: str) -> AbstractContextManager[Callable[[int, int], None]]: ...


@dataclass
class Job:
    """One stage at work."""

    config: RunConfig
    folder: RunFolder
    runtime: Runtime
    stop: StopRequest
    facts: dict[str, Any]  # what else the summary should say (extensions, learned, example, ...)

    @property
    def finished(self) -> bool:
        return self.folder.is_finished

    def say(self, line: str) -> None:
        """A line for a person, from the main rank alone."""
        if self.runtime.is_main:
            print(line, flush=True)

    @contextlib.contextmanager
    def preparing(self, part: str) -> Iterator[Callable[[int, int], None]]:
        """What to tell the progress of data preparation to, in bytes done and bytes in all; a safe point each time."""
        enabled = self.config.tracking.progress
        with (
            apart(self.stop, "while preparing data") as point,
            Progress(f"preparing {part} data", unit="bytes", enabled=enabled) as progress,
        ):

            def told(done: int, total: int) -> None:
                if total:  # else it waits for another process that prepares the same
                    progress(done)
                point()

            yield told

    def learned(self, what: str, after: float, before: float | str | None = None) -> None:
        """A row of the closing table: what was learned, before -> after."""
        self.facts.setdefault("learned", []).append({"what": what, "before": before, "after": after})

    def result(self) -> Run:
        """The run as its summary tells it."""
        return Run(Path(self.folder.path), self.folder.summary)

    def finish(self, figures: Mapping[str, float]) -> Run:
        """Write the summary; from here on the same command finds the stage done."""
        self.folder.finish({"stage": self.config.stage, "figures": dict(figures), **self.facts})
        return self.result()


@contextlib.contextmanager
def open_job(
    config: RunConfig, parents: Mapping[str, str] | None = None, recipe: Mapping[str, Any] | None = None
) -> Iterator[Job]:
    """Open (or continue) the run folder of `config` and settle this process; on the way out leave a true status.

    `parents` are the folders that the result depends on: their content is part of the run's identity, and so is
    `recipe`, what else decides the result.
    """
    extensions = load_extensions(config.extensions)
    _find_names(config)
    digests = {role: folder_digest(str(brought(path))) for role, path in (parents or {}).items() if path}
    ranks = config.cluster if isinstance(config, TrainingRun) else RanksConfig()
    place = start(config.device, config.threads, config.deterministic, deadline_s=ranks.deadline_s)
    if isinstance(config, TrainingRun):
        config.parallel.check_world(place.world_size)
    if isinstance(config, PpoRun):
        config.parallel.check_world(config.cluster.workers)
    whole = plain(config) | dict(recipe or {}) | _named_code(config, extensions)
    members = whole.get("members", {})
    inner = [key for key in NOT_IN_HASH if key not in LENGTHS]  # a longer member makes another pipeline
    ignored = [*NOT_IN_HASH, *(f"members.{stage}.{key}" for stage in members for key in inner)]
    remote = _open_remote(config, place) if is_url(config.run.dir) else None
    folder = RunFolder.open(config.folder, whole, digests, ignored, is_main=place.is_main, remote=remote)
    try:
        with stop_request() as stop, ending(folder.fail), preferring(**wanted_ops(config)):
            heed(stop, "before it began")
            yield Job(config, folder, place, stop, {"extensions": extensions})
    except BaseException as error:
        state = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        if not (isinstance(error, UsageError) and folder.withdraw()):
            folder.fail(error, state=state)
        raise
    finally:
        unwatch()
        folder.close()


def _open_remote(config: RunConfig, place: Runtime) -> Remote:
    """The run's folder on object storage; its spool is there for all ranks when this returns. Collective."""
    if place.world_size > int(os.environ.get("LOCAL_WORLD_SIZE", place.world_size)):
        raise UsageError(
            f"run.dir={config.run.dir}: several machines share no spool; give them a folder that they share"
        )
    remote = Remote(config.run.dir, config.folder)
    if place.is_main:
        remote.fetch()
    agreed(0)
    return remote


def located(data: DataConfig, say: Callable[[str], None] | None = None, group: str = "data") -> DataConfig:
    """`data` with its paths as they are found, each said with its format; one that leads nowhere, or to no known
    format, is a DataError that names its key in the recipe's `group`."""
    train, valid = ([find_file(path) for path in paths] for paths in (data.train, data.valid_paths))
    for key, paths in ((f"{group}.train", train), (f"{group}.valid", valid)):
        try:
            found = [f"{path}: {described(open_sources([path], data.format))}" for path in paths]
        except DataError as error:
            raise DataError(f"{key}: {error}") from None
        if say is not None and found:
            say("\n".join(found))
    return replace(data, train=train, valid=valid or data.valid)


def folder_digest(path: str) -> str:
    """What a model or tokenizer folder contains, as 16 hex digits: sha256 over names and contents of its files."""
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"no such folder: {path}")
    total = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja")):
        with file.open("rb") as stream:
            total.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def _named_code(config: RunConfig, digests: Mapping[str, str]) -> dict[str, Any]:
    """The content of the extensions that the recipe names, which counts in place of their names. Installed ones are
    part of the environment, as a version of torch is."""
    named = {Path(name).name if name.endswith(".py") else name for name in config.extensions}
    return {"extension_digests": {name: digests[name][:16] for name in sorted(named)}} if named else {}


def _find_names(config: RunConfig) -> None:
    """Refuse names that no code has registered, before any work."""
    search = {"task": get_task, "reward": find_reward}
    for key, kind, name in config.names:
        try:
            with foreign(f"{kind} '{name}' cannot be made", UsageError):
                search.get(kind, partial(lookup, kind))(name)
        except UsageError as error:
            raise UsageError(f"{key}: {error}") from None
