"""`report.html`: what a chain of runs learned, on one page that needs no network and runs no code.

Everything is read from run folders, so the page can be made again at any time:
    summary.json    "stage", "seconds", "figures", and "learned": [{"what": ..., "before": ..., "after": ...}]
    metrics.jsonl   curves: train/X and valid/X share a picture
    samples.jsonl   {"step", "prompt", "response", "score"?}: the first and the last answer to a prompt, side by side
    rollout.json    one response token by token, see `rollout`
    checkpoints/    step, metrics and sha256 of each manifest
    config.yaml     `init_from: .../sft/model` tells whose result a run began with
Left out: everything that is not in those files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from framework.core.errors import UsageError
from framework.tracking.chart import Chart, Points, draw, number
from framework.tracking.journal import read_lines, read_object
from framework.tracking.lineage import Lineage, lay_out
from framework.tracking.page import write_page
from framework.tracking.rollout import Rollout, read_rollout
from framework.tracking.status import read_status

_SHOWN_CHARTS, _SHOWN_SAMPLES = 6, 6


@dataclass(frozen=True)
class Learned:
    """One row of the stage table."""

    what: str
    before: str
    after: str


@dataclass(frozen=True)
class Answers:
    """What the model said to one prompt: first, and last (None where it was asked once)."""

    prompt: str
    before: str
    after: str | None
    before_score: float | None
    after_score: float | None


@dataclass(frozen=True)
class Stage:
    """A run folder as the page shows it."""

    name: str
    stage: str
    state: str
    seconds: float
    learned: tuple[Learned, ...]
    charts: tuple[Chart, ...]
    more_charts: tuple[Chart, ...]
    answers: tuple[Answers, ...]
    rollout: Rollout | None
    digest: str
    parents: dict[str, tuple[str, str]]  # role -> (name of the run it came from, or its path; digest)
    checkpoints: tuple[dict[str, Any], ...]
    summary: dict[str, Any]


def write_report(path: Path, folders: Sequence[Path], title: str = "") -> Path:
    """Write the page on the runs in `folders`, in that order, to `path`. Folders that hold no run are left out."""
    found = [Path(folder) for folder in folders if read_status(Path(folder)) is not None]
    if not found:
        raise UsageError(f"no run folder among {', '.join(map(str, folders)) or '(none)'}: nothing to report")
    labels = _labels(found)
    stages = [read_stage(folder, labels) for folder in found]
    return write_page(
        Path(path),
        "report.html",
        title=title or Path(path).resolve().parent.name,
        stages=stages,
        lineage=_lineage(stages),
        seconds=sum(stage.seconds for stage in stages),
        facts=_facts(stages),
    )


def read_stage(folder: Path, labels: Mapping[Path, str]) -> Stage:
    """What the page shows of one run; `labels`: folder -> name of the runs among which its parents are looked for."""
    status, summary = read_status(folder), read_object(folder / "summary.json") or {}
    charts = _charts(read_lines(folder / "metrics.jsonl"))
    return Stage(
        name=labels[folder],
        stage=str(summary.get("stage") or (status.stage if status else "") or folder.name),
        state=status.state if status else "",
        seconds=float(summary.get("seconds") or (status.seconds if status else 0.0)),
        learned=_learned(summary),
        charts=charts[:_SHOWN_CHARTS],
        more_charts=charts[_SHOWN_CHARTS:],
        answers=_answers(read_lines(folder / "samples.jsonl"))[:_SHOWN_SAMPLES],
        rollout=read_rollout(folder / "rollout.json"),
        digest=str(summary.get("digest", "")),
        parents=_parents(folder, status.parents if status else {}, labels),
        checkpoints=_checkpoints(folder),
        summary=summary,
    )


def _labels(folders: Sequence[Path]) -> dict[Path, str]:
    """What each run is called: the folder's name, or its path where two have one name."""
    names = [folder.name for folder in folders]
    return {folder: folder.name if names.count(folder.name) == 1 else str(folder) for folder in folders}


def _learned(summary: dict[str, Any]) -> tuple[Learned, ...]:
    """The summary's own rows; without them every figure that has a NAME/before; without those all figures."""
    figures: dict[str, Any] = summary.get("figures", {})
    rows = summary.get("learned") or [
        {"what": name, "before": figures[f"{name}/before"], "after": value}
        for name, value in figures.items()
        if f"{name}/before" in figures
    ]
    rows = rows or [{"what": name, "after": value} for name, value in figures.items()]
    return tuple(Learned(str(row["what"]), _cell(row.get("before")), _cell(row.get("after"))) for row in rows)


def _cell(value: Any) -> str:
    return "" if value is None else number(value) if isinstance(value, int | float) else str(value)


def _charts(lines: list[dict[str, Any]]) -> tuple[Chart, ...]:
    """train/X and valid/X in one picture X, which comes first; then the rest in the order of the file."""
    series: dict[str, list[tuple[float, float | None]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and (value is None or isinstance(value, int | float)):
                series.setdefault(name, []).append((float(line["step"]), value))
    groups: dict[str, dict[str, Points]] = {}
    for name, points in series.items():
        part, _, rest = name.partition("/")
        title, label = (rest, part) if part in ("train", "valid") and rest else (name, "")
        groups.setdefault(title, {})[label] = points
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return tuple(chart for title, group in ordered if (chart := draw(title, group)) is not None)


def _answers(lines: list[dict[str, Any]]) -> tuple[Answers, ...]:
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: line["step"]):
        if "response" in line:
            by_prompt.setdefault(str(line.get("prompt", "")), []).append(line)

    def answers(prompt: str, said: list[dict[str, Any]]) -> Answers:
        first, last = said[0], said[-1] if said[-1]["step"] > said[0]["step"] else None
        after, score = (str(last["response"]), last.get("score")) if last else (None, None)
        return Answers(prompt, str(first["response"]), after, first.get("score"), score)

    return tuple(answers(prompt, said) for prompt, said in by_prompt.items())


def _parents(folder: Path, digests: dict[str, str], labels: Mapping[Path, str]) -> dict[str, tuple[str, str]]:
    """Role -> (run, digest): the recipe's path under that role, if it lies in one of the other runs."""
    try:
        recipe = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    except (FileNotFoundError, yaml.YAMLError):
        recipe = {}
    homes = {run.resolve(): label for run, label in labels.items()}
    found = {}
    for role, digest in digests.items():
        path = Path(str(recipe.get(role, role)))
        home = next((homes[place] for place in (path.resolve(), *path.resolve().parents) if place in homes), None)
        found[role] = (home or str(path), digest)
    return found


def _checkpoints(folder: Path) -> tuple[dict[str, Any], ...]:
    manifests = [read_object(path) for path in sorted((folder / "checkpoints").glob("step_*/manifest.json"))]
    return tuple(m for m in manifests if m is not None and {"step", "metrics", "sha256"} <= set(m))


def _lineage(stages: Sequence[Stage]) -> Lineage:
    names = [stage.name for stage in stages]
    parents = {stage.name: [run for run, _ in stage.parents.values() if run in names] for stage in stages}
    notes = {stage.name: stage.digest or stage.state for stage in stages}
    return lay_out(names, {name: sorted(set(p)) for name, p in parents.items()}, notes)


def _facts(stages: Sequence[Stage]) -> dict[str, str]:
    """What the runs were made with, as the last finished one says."""
    summary = next((stage.summary for stage in reversed(stages) if stage.summary), {})
    facts = {"commit": summary.get("commit"), "seed": summary.get("seed"), "machine": summary.get("machine")}
    facts |= summary.get("versions", {})
    return {name: str(value) for name, value in facts.items() if value is not None}
