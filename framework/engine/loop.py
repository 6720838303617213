"""The training loop of pretraining, SFT and reward modelling: batch, gradient, update; log, validate, save.

The batch is a pure function of the step, so a checkpoint needs one integer to find the data again. Left out: what a row
is (`data`), what the loss is (the stage), how a step is computed (the engine), and PPO's loop (`stages/ppo`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from framework.checkpoint.manager import CheckpointManager
from framework.checkpoint.saver import Saver
from framework.core.deadline import deadline
from framework.core.errors import Interrupted
from framework.core.records import Metrics, Rows
from framework.core.runtime import agreed, heed
from framework.core.signals import StopRequest
from framework.engine.metrics import means, merge
from framework.engine.pace import Pace
from framework.engine.profiler import profiling
from framework.engine.protocol import Engine, LossFn, StepReport
from framework.engine.sketch import Tracer
from framework.tracking.config import DIGEST
from framework.tracking.divergence import Trace

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
    def trace(self, step: int, trace: Trace) -> None: ...  # what two runs are compared by
    def flush(self) -> None: ...  # after a checkpoint, beside the steps: what is elsewhere is brought up to date
    def cut_back(self, step: int) -> None: ...  # forget what came after `step`; all, where it is -1


@dataclass(frozen=True)
class Beside:
    """Rows of another kind, whose gradient is added to every step's under their own loss and count."""

    loader: Batches
    loss_fn: LossFn  # its metrics have names of their own


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
    owed: Figures | None = None  # the step's own, where a stop came before it was validated and logged

    @property
    def logged(self) -> int:
        """The last step whose figures the journal should hold; -1 = not even those of step 0."""
        return self.step - (self.owed is not None) if self.step else -1


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
    beside: Beside | None = None,
    every: int = 10,
    validate_every: int = 0,
    checkpoint_every: int = 0,
    digest_every: int = 0,
    profile: Path | None = None,
    peak_flops: float | None = None,
) -> Outcome:
    """Go on from the newest checkpoint until `total_steps` are done, `beside` learned with the rest. Collective.

    `every`, `validate_every` and `checkpoint_every` are in steps; 0 = at the end only. `digest_every` too; 0 = never,
    else from step 0 on. `profile` is a folder for a trace of steps 3 to 5; `peak_flops` are a second's, of all ranks
    together. Figures are logged before their step's checkpoint, which remembers those for `best` and is written beside
    the steps. Raises Interrupted, after saving, once any rank was asked to stop; a validation is broken off for it.
    """
    course, tracer = resume(engine, manager), Tracer(engine, folder.trace, digest_every)
    folder.cut_back(course.logged)
    if course.step == 0:
        course.before = _named("valid", evaluate(engine, valid, loss_fn, stop)) if valid else {}
        _log(folder, 0, course.before, _digest(engine, 0, digest_every))
        tracer.write(0)

    pace = Pace(peak_flops)
    figures: Figures = {}  # of one step
    speed: Figures = {}  # beside them, and in no checkpoint: they are not the same twice
    with Saver(manager, then=folder.flush) as saver, profiling(profile) as step_was_profiled:

        def save(figures: Figures) -> None:
            saver.save(course.step, {PART: engine.shards()}, asdict(course), figures)

        while course.step < total_steps or course.owed is not None:
            speed = {}
            if course.owed is None:
                done = update(engine, loader, loss_fn, course, pace, tracer, beside)
                step_was_profiled()
                course.owed = {}
                if course.step == total_steps or _due(course.step, every):
                    course.owed = _named("train", describe(*done) | {"skipped": course.skipped})
                    speed = _named("train", pace.take())
            folder.advance(course.step, total_steps)
            last, figures = course.step >= total_steps, course.owed
            if valid and (last or _due(course.step, validate_every)):
                try:
                    figures = figures | _named("valid", evaluate(engine, valid, loss_fn, stop))
                except Interrupted:
                    save({})
                    raise
            course.owed = None
            course.figures |= figures
            _log(folder, course.step, figures | speed, _digest(engine, course.step, digest_every))
            tracer.write(course.step)
            progress(course.step, **_shown(figures))
            asked = agreed(stop.exit_code)
            saver.look()
            if last or asked or _due(course.step, checkpoint_every):
                save(figures)
            if asked:
                raise stop.error(f"after step {course.step} of {total_steps}", asked)
    return Outcome(course.figures | speed, course.before)


def resume(engine: Engine, manager: CheckpointManager) -> Course:
    """Bring the engine to the newest checkpoint that verifies; a fresh course where there is none."""
    with deadline("loading the checkpoint", patient=True):
        checkpoint = manager.latest()
        if checkpoint is None:
            return Course()
        engine.load_shards(checkpoint.reader(PART))
    return Course(**checkpoint.state)


def update(
    engine: Engine,
    loader: Batches,
    loss_fn: LossFn,
    course: Course,
    pace: Pace,
    tracer: Tracer,
    beside: Beside | None = None,
) -> tuple[Metrics, StepReport]:
    """One optimizer step. Collective."""
    with pace:
        metrics = engine.forward_backward(loader.batch(course.step), loss_fn)
        if beside is not None:  # gradients add up until the step
            metrics = engine.forward_backward(beside.loader.batch(course.step), beside.loss_fn) | metrics
        tracer.look(course.step + 1)
        report = engine.step()
        pace.add(report.work)
        tracer.tokens = report.work.tokens
    course.step += 1
    course.skipped += report.skipped
    return metrics, report


def evaluate(engine: Engine, loader: Batches, loss_fn: LossFn, stop: StopRequest) -> Figures:
    """The means of the loss's metrics over every row of `loader`, each weighed by what it counts. Collective, with a
    safe point before every batch."""
    total: Metrics = {}
    for rows in loader.evaluation_batches():
        heed(stop, "during validation")
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
