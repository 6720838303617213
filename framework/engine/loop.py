"""The training loop of pretraining, SFT and reward modelling: batch, gradient, update; log, validate, save.

The batch is a pure function of the step, so a checkpoint needs one integer to find the data again. Left out: what a row
is (`data`), what the loss is (the stage), how a step is computed (the engine), and PPO's loop (`stages/ppo`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from framework.checkpoint.manager import CheckpointManager
from framework.core.records import Metrics, Rows
from framework.core.runtime import StopRequest, agreed
from framework.engine.metrics import means, merge
from framework.engine.pace import Pace
from framework.engine.profiler import profiling
from framework.engine.protocol import Engine, LossFn, StepReport
from framework.tracking.config import DIGEST

Figures = dict[str, float]
PART = "trainer"  # of a checkpoint: the engine's shards


class Batches(Protocol):
    """This data rank's rows; `data.loader.Loader` is one."""

    def batch(self, step: int) -> Rows: ...  # a pure function of the step, from 0
    def evaluation_batches(self) -> Iterator[Rows]: ...  # every row once, equally many batches on every rank


class Journal(Protocol):
    """Where figures go; `tracking.folder.RunFolder` is one."""

    def log(self, step: int, figures: Mapping[str, float | str]) -> None: ...
    def advance(self, step: int, total: int) -> None: ...  # cheap, every step
    def cut_back(self, step: int) -> None: ...  # forget what came after the restored step


@dataclass(frozen=True)
class Outcome:
    """What training came to. Example: figures {"train/loss": 2.9, "valid/loss": 3.1}, before {"valid/loss": 8.3}."""

    figures: Figures  # the newest of each
    before: Figures  # validation at step 0


@dataclass
class Course:
    """All that the loop itself remembers; a checkpoint holds it."""

    step: int = 0  # steps done
    skipped: int = 0  # of them, passed over for a gradient that was not finite
    before: Figures = field(default_factory=dict)
    figures: Figures = field(default_factory=dict)


def train(
    engine: Engine,
    loader: Batches,
    loss_fn: LossFn,
    *,
    total_steps: int,
    manager: CheckpointManager,
    folder: Journal,
    progress: Callable[..., None],
    stop: StopRequest,
    valid: Batches | None = None,
    every: int = 10,
    validate_every: int = 0,
    checkpoint_every: int = 0,
    digest_every: int = 0,
    profile: Path | None = None,
    peak_flops: float | None = None,
) -> Outcome:
    """Go on from the newest checkpoint until `total_steps` are done. Collective.

    `every`, `validate_every` and `checkpoint_every` are in steps; 0 = at the end only. `digest_every` too; 0 = never,
    else from step 0 on. `profile` is a folder for a
    trace of steps 3 to 5; `peak_flops` are a second's, of all ranks together. Figures are logged before the checkpoint
    of their step, which remembers those of that step for `best`. Raises Interrupted, after saving, once any rank was
    asked to stop.
    """
    course = resume(engine, manager)
    folder.cut_back(course.step)
    if course.step == 0:
        course.before = _named("valid", evaluate(engine, valid, loss_fn)) if valid else {}
        _log(folder, 0, course.before, _digest(engine, 0, digest_every))
    pace = Pace(peak_flops)
    figures: Figures = {}  # of one step
    speed: Figures = {}  # beside them, and in no checkpoint: they are not the same twice
    with profiling(profile) as step_was_profiled:
        while course.step < total_steps:
            with pace:
                metrics = engine.forward_backward(loader.batch(course.step), loss_fn)
                report = engine.step()
                pace.add(report.work)
            step_was_profiled()
            course.step += 1
            course.skipped += report.skipped
            last = course.step == total_steps
            figures, speed = {}, {}
            if last or _due(course.step, every):
                figures = _named("train", describe(metrics, report) | {"skipped": course.skipped})
                speed = _named("train", pace.take())
            if valid and (last or _due(course.step, validate_every)):
                figures |= _named("valid", evaluate(engine, valid, loss_fn))
            course.figures |= figures
            _log(folder, course.step, figures | speed, _digest(engine, course.step, digest_every))
            folder.advance(course.step, total_steps)
            progress(course.step, **_shown(figures))
            stopping = agreed(stop.requested)
            if last or stopping or _due(course.step, checkpoint_every):
                manager.save(course.step, {PART: engine.shards()}, asdict(course), figures)
            if stopping:
                raise stop.error(f"after step {course.step} of {total_steps}")
    return Outcome(course.figures | speed, course.before)


def resume(engine: Engine, manager: CheckpointManager) -> Course:
    """Bring the engine to the newest checkpoint that verifies; a fresh course where there is none."""
    checkpoint = manager.latest()
    if checkpoint is None:
        return Course()
    engine.load_shards(checkpoint.reader(PART))
    return Course(**checkpoint.state)


def evaluate(engine: Engine, loader: Batches, loss_fn: LossFn) -> Figures:
    """The means of the loss's metrics over every row of `loader`, each weighed by what it counts. Collective."""
    total: Metrics = {}
    for rows in loader.evaluation_batches():
        total = merge(total, engine.measure(rows, loss_fn))
    return means(total)


def describe(metrics: Metrics, report: StepReport) -> Figures:
    """One step's figures."""
    return means(metrics) | {"grad_norm": report.grad_norm, "lr": report.lr}


def _named(prefix: str, figures: Figures) -> Figures:
    return {f"{prefix}/{name}": value for name, value in figures.items()}


def _log(folder: Journal, step: int, figures: Figures, digest: dict[str, str]) -> None:
    """One line, where there is anything to say."""
    if figures or digest:
        folder.log(step, {**figures, **digest})


def _digest(engine: Engine, step: int, every: int) -> dict[str, str]:
    return {DIGEST: engine.digest()} if _due(step, every) else {}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _shown(figures: Figures) -> Figures:
    """What a progress bar has room for."""
    losses = {"loss": figures.get("train/loss"), "valid": figures.get("valid/loss")}
    return {name: value for name, value in losses.items() if value is not None}
