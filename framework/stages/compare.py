"""`framework compare RUN RUN`: what differs between two runs, or between two pipelines stage by stage.

Only the folders are read, so runs in progress may be compared too, and nothing heavy is imported.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from framework.core.config import without
from framework.core.errors import UsageError
from framework.stages.config import NOT_IN_HASH
from framework.stages.watch import here, stages_of
from framework.stages.words import Words
from framework.tracking.comparison import Comparison, Curve, Recorded, read_run, spread
from framework.tracking.identity import LENGTHS
from framework.tracking.page import write_page

_ASIDE = [key for key in NOT_IN_HASH if key not in LENGTHS]  # keys that change no answer


def compare(words: list[str]) -> int:
    """Print the differences; with --html draw the curves too."""
    chosen = _parser().parse_args(words)
    if chosen.steps < 1:
        raise UsageError(f"--steps {chosen.steps} must be at least 1")
    pairs = [Comparison(read_run(left), read_run(right)) for left, right in pair(chosen.left, chosen.right)]
    for comparison in pairs:
        print("\n".join(describe(comparison, chosen.steps)), end="\n\n")
    for line in _alone(chosen.left, chosen.right):
        print(line)
    if chosen.html:
        values = {"pairs": [(c, facts(c)) for c in pairs], "left": chosen.left, "right": chosen.right}
        print(write_page(chosen.html, "comparison.html", **values))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Words("framework compare", description="what differs between two runs, or two pipelines stage by stage")
    parser.add_argument("left", metavar="RUN", type=here, help="a run folder, or a pipeline's")
    parser.add_argument("right", metavar="RUN", type=here)
    parser.add_argument("--steps", type=int, default=6, help="of how many common steps the figures are shown")
    parser.add_argument("--html", metavar="FILE", type=Path, help="draw the curves into a page that needs no network")
    return parser


def pair(left: Path, right: Path) -> list[tuple[Path, Path]]:
    """The runs to compare: the two themselves, or of pipelines the stages of one name."""
    ours, theirs = _stages(left), _stages(right)
    if not ours and not theirs:
        return [(left, right)]
    for folder, other in ((left, theirs), (right, ours)):
        if not _stages(folder):
            read_run(folder)
            raise UsageError(f"{folder} is one run, the other a pipeline; name its stage: {', '.join(map(str, other))}")
    if not ours.keys() & theirs.keys():
        raise UsageError(f"{left} and {right} have no stage in common: {', '.join(ours)} | {', '.join(theirs)}")
    return [(ours[name], theirs[name]) for name in ours if name in theirs]


def _stages(folder: Path) -> dict[str, Path]:
    return {run.name: run for run in stages_of(folder)}


def _alone(left: Path, right: Path) -> list[str]:
    """Stages that only one of two pipelines has (yet)."""
    ours, theirs = _stages(left), _stages(right)
    lonely = [ours[n] for n in ours if n not in theirs] + [theirs[n] for n in theirs if n not in ours]
    return [f"without a counterpart: {', '.join(map(str, lonely))}"] if lonely else []


def describe(comparison: Comparison, steps: int) -> list[str]:
    """All that there is to say of a pair, as lines for a terminal."""
    left, right = comparison.left, comparison.right
    lines = [f"{left.folder} | {right.folder}", f"  {_state(left)} | {_state(right)}"]
    for title, found in facts(comparison).items():
        lines += [f"{title}: the same"] if not found else [title, *_indented(f"{k}: {v}" for k, v in found.items())]
    if not (left.finished and right.finished):
        lines.append("  versions and commit are known once both have finished")
    lines.append(f"weights: {comparison.weights}")
    lines += [f"tensors: {said}" for said in comparison.tensors]
    lines += _figure_lines(comparison.figures)
    return lines + _curve_lines(comparison.curves, steps)


def facts(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Title -> key -> "left | right" of what the runs are, less what they measured."""
    ours, theirs = comparison.left.status.parents, comparison.right.status.parents
    copied = [role for role in ours if ours[role] == theirs.get(role)]  # another path, the same content
    recipe, matters = comparison.recipe, without(comparison.recipe, [*_ASIDE, *copied])
    aside = {key: values for key, values in recipe.items() if key not in matters}
    found = {"recipe": _shown(matters), "made with and from": _shown(comparison.origin)}
    return found | ({"recipe, keys that change no answer": _shown(aside)} if aside else {})


def _shown(pairs: Mapping[str, tuple[Any, Any]]) -> dict[str, str]:
    def word(value: Any) -> str:
        return "none" if value is None else str(value)

    return {key: f"{word(left)} | {word(right)}" for key, (left, right) in pairs.items()}


def _state(run: Recorded) -> str:
    status = run.status
    steps = f"step {status.step:,} of {status.total:,}, " if status.total else ""
    return f"{status.stage} {status.state}, {steps}attempt {status.attempt}"


def _figure_lines(figures: Mapping[str, tuple[float, float]]) -> list[str]:
    differing = {name: pair for name, pair in figures.items() if pair[0] != pair[1]}
    rows = [["final figures", "left", "right"], *([n, _figure(a), _figure(b)] for n, (a, b) in differing.items())]
    equal = [name for name in figures if name not in differing]
    return (_table(rows) if differing else []) + _equal_line("final figures", equal)


def _curve_lines(curves: Mapping[str, tuple[Curve, Curve]], most: int) -> list[str]:
    """A block a curve: both runs at common steps, and the last, lowest and highest of all that each has."""
    lines, equal = [], []
    for name, (left, right) in curves.items():
        common = left.keys() & right.keys()
        if common and all(left[step] == right[step] for step in common):
            equal.append(name)
            continue
        steps = spread(common, most)
        head = [name, *(f"step {step}" for step in steps), "last", "lowest", "highest"]
        lines += _table([head, ["  left", *_row(left, steps)], ["  right", *_row(right, steps)]])
    return lines + _equal_line("curves", equal)


def _row(curve: Curve, steps: Sequence[int]) -> list[str]:
    known = {step: value for step, value in curve.items() if value is not None}
    low, high = (best(known, key=known.__getitem__, default=None) for best in (min, max))
    at = ["" if step is None else f"{_figure(known[step])} at {step}" for step in (low, high)]
    return [*(_figure(curve[step]) for step in steps), _figure(known[max(known)]) if known else "", *at]


def _equal_line(what: str, names: list[str]) -> list[str]:
    where = " at every common step" if what == "curves" else ""
    return [f"{what} equal{where}: {', '.join(names)}"] if names else []


def _figure(value: float | None) -> str:
    """Six digits: two runs that look equal here differ by less than a millionth."""
    return "not finite" if value is None else f"{value:.6g}"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]) for row in rows
    ]


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]
