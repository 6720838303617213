"""Two runs held against each other, from their folders alone: recipe, origin, figures, curves, digests of the weights.

Either may still be running: what a run has not written yet is simply not there. Left out: which keys of a recipe
change no answer (the stages know, and say so), and how it looks (`framework compare`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from framework.core.config import differences, flatten
from framework.core.errors import UsageError
from framework.tracking.chart import Chart, draw
from framework.tracking.config import DIGEST
from framework.tracking.divergence import Trace, by_bits, by_bound, read_traces, same_layout, torn
from framework.tracking.journal import read_lines, read_object
from framework.tracking.status import Status, read_status

Curve = dict[int, float | None]  # step -> value; None where it was not finite
Differences = dict[str, tuple[Any, Any]]

# What decides in which order numbers are added up. With another one equal runs drift apart by rounding.
LAYOUT = ("parallel", "cluster", "batch.micro_size", "device", "threads", "deterministic", "ops", "world")


@dataclass(frozen=True)
class Recorded:
    """A run as its folder tells it."""

    folder: Path
    status: Status
    recipe: dict[str, Any]  # dotted keys
    origin: dict[str, Any]  # parents.ROLE; and once it has finished: commit, machine, seed, world, versions.PACKAGE
    figures: dict[str, float]  # final ones; {} before it has finished
    curves: dict[str, Curve]
    digests: dict[int, str]  # step -> of the weights
    traces: dict[int, Trace]  # step -> of every tensor

    @property
    def finished(self) -> bool:
        """Whether it has said what it was made with."""
        return "commit" in self.origin


def read_run(folder: Path) -> Recorded:
    """Raises UsageError where `folder` holds no run."""
    status = read_status(folder)
    if status is None:
        raise UsageError(f"{folder} is not a run folder: it has no status.json")
    summary = read_object(folder / "summary.json") or {}
    lines = read_lines(folder / "metrics.jsonl")
    return Recorded(
        folder=folder,
        status=status,
        recipe=_recipe(folder / "config.yaml"),
        origin=_origin(summary) | flatten(status.parents, "parents."),
        figures=_numbers(summary.get("figures", {})),
        curves=_curves(lines),
        digests={int(line["step"]): str(line[DIGEST]) for line in lines if DIGEST in line},
        traces=read_traces(folder),
    )


@dataclass(frozen=True)
class Comparison:
    """A pair of runs."""

    left: Recorded
    right: Recorded

    @property
    def recipe(self) -> Differences:
        """Dotted keys that differ, less the paths of the runs themselves."""
        found = differences(self.left.recipe, self.right.recipe)
        return {key: pair for key, pair in found.items() if not key.startswith("run.")}

    @property
    def origin(self) -> Differences:
        """What the runs were made with and from, where both say it."""
        found = differences(self.left.origin, self.right.origin)
        return {k: pair for k, pair in found.items() if k.startswith("parents.") or self._both_finished}

    @property
    def layout(self) -> Differences:
        """Of both, what decides the order of additions."""
        found = self.recipe | self.origin
        return {key: pair for key, pair in found.items() if key in LAYOUT or key.partition(".")[0] in LAYOUT}

    @property
    def figures(self) -> Differences:
        """Final figures that both have."""
        return {name: (self.left.figures[name], self.right.figures[name]) for name in self._common("figures")}

    @property
    def curves(self) -> dict[str, tuple[Curve, Curve]]:
        """Curves that both have, whole."""
        return {name: (self.left.curves[name], self.right.curves[name]) for name in self._common("curves")}

    @property
    def weights(self) -> str:
        """One sentence: from which step on the weights differ, or that they never do."""
        left, right = self.left.digests, self.right.digests
        common = sorted(set(left) & set(right))
        if not common:
            silent = [str(run.folder) for run in (self.left, self.right) if not run.digests]
            who = f"none in {' and '.join(silent)}" if silent else "none at a common step"
            return f"no digests to compare ({who}); tracking.digest_every=1 logs them, and changes no answer"
        differing = next((step for step in common if left[step] != right[step]), None)
        if differing is None:
            return f"the same bits at all {len(common)} common steps, {common[0]} to {common[-1]}"
        before = max((step for step in common if step < differing), default=None)
        start = "different from the first digest on" if before is None else f"the same bits up to step {before}"
        return f"{start}, different at step {differing}{self._excuse()}"

    @property
    def tensors(self) -> list[str]:
        """Sentences: which tensors differ first, by the bits under one layout, else by the bound; [] without traces."""
        left, right = self.left.traces, self.right.traces
        found = []
        if left.keys() & right.keys():
            alike = same_layout(left, right) and not self.layout
            recipe = self.left.recipe
            precision, lr = str(recipe.get("engine.precision", "fp32")), float(recipe.get("optim.lr") or 0.0)
            found = [by_bits(left, right) if alike else by_bound(left, right, precision, lr)]
        sides = {"left": left, "right": right}
        return found + [f"{side}: {said}" for side, traces in sides.items() if (said := torn(traces))]

    def charts(self) -> list[Chart]:
        """Every common curve, both runs in one picture."""
        names = "left", "right"  # whole paths would push a title out of its picture
        drawn = [
            draw(title, {name: sorted(curve.items()) for name, curve in zip(names, pair) if curve})
            for title, pair in self.curves.items()
        ]
        return [chart for chart in drawn if chart is not None]

    @property
    def _both_finished(self) -> bool:
        return self.left.finished and self.right.finished

    def _common(self, what: str) -> list[str]:
        return [name for name in getattr(self.left, what) if name in getattr(self.right, what)]

    def _excuse(self) -> str:
        if not self.layout:
            return ""
        return f" (the layouts differ: {', '.join(self.layout)}; rounding alone explains that)"


def spread(steps: Iterable[int], most: int) -> list[int]:
    """At most `most` of `steps`, evenly, the first and the last among them. spread(range(9), 3) -> [0, 4, 8]"""
    known = sorted(steps)
    if len(known) <= most or most < 2:
        return known if len(known) <= most else known[-1:]
    return [known[i * (len(known) - 1) // (most - 1)] for i in range(most)]


def _recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path.parent} is not a run folder: it has no {path.name}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        recipe = None
    if not isinstance(recipe, dict):
        raise UsageError(f"{path} is not a recipe")
    return flatten(recipe)


def _origin(summary: Mapping[str, Any]) -> dict[str, Any]:
    facts = {name: summary[name] for name in ("commit", "machine", "seed", "world") if name in summary}
    versions = summary.get("versions")
    return facts | (flatten(versions, "versions.") if isinstance(versions, dict) else {})


def _curves(lines: list[dict[str, Any]]) -> dict[str, Curve]:
    """By name; of several lines of a step the last one counts."""
    curves: dict[str, Curve] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and (value is None or isinstance(value, int | float)):
                curves.setdefault(name, {})[int(line["step"])] = value
    return curves


def _numbers(figures: Any) -> dict[str, float]:
    there = figures if isinstance(figures, dict) else {}
    return {name: value for name, value in there.items() if isinstance(value, int | float)}
