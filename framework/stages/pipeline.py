"""Several stages as one run: each in its own folder, in order, finished ones skipped; then the table and the report."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from framework.stages.config import PipelineRun, RunConfig
from framework.stages.job import Run, open_job
from framework.stages.launch import launch
from framework.stages.ops import check_ops
from framework.stages.plan import plain
from framework.tracking.console import console
from framework.tracking.report import write_report
from framework.tracking.status import duration


def run(config: PipelineRun, members: Sequence[RunConfig]) -> Run:
    """Run the members in order; a finished one (equal recipe, equal parents) is only looked at."""
    for member in members:
        check_ops(member)
    # Its stages are tracked, as runs of one group; it has no curve, and a tracker may know one run a process only.
    config = replace(config, tracking=replace(config.tracking, kind="none"))
    screen = console()
    identity = {"members": {member.stage: plain(member) for member in members}}
    with open_job(config, recipe=identity) as job:
        runs = []
        for number, member in enumerate(members, start=1):
            screen.print(f"[bold]{number}/{len(members)} {member.stage}[/bold] -> {member.run.dir}")
            runs.append(launch(member))
        report = write_report(config.folder / "report.html", [done.folder for done in runs])
        screen.print(_table(runs))
        screen.print(f"report: {report}", soft_wrap=True)
        if model := _last_model(runs):
            screen.print(f"talk to it: framework generate {model} {_example(runs)}".rstrip(), soft_wrap=True)
        return job.result() if job.finished else job.finish(_all_figures(runs))


def _last_model(runs: list[Run]) -> Path | None:
    return next((done.folder / "model" for done in reversed(runs) if (done.folder / "model").is_dir()), None)


def _table(runs: list[Run]) -> Table:
    table = Table("stage", "learned", "before", "after", "time")
    for done in runs:
        name, seconds = str(done.summary["stage"]), duration(float(done.summary["seconds"]))
        for row in done.summary.get("learned", [{"what": ""}]):
            table.add_row(name, row["what"], _cell(row.get("before")), _cell(row.get("after")), seconds)
            name = seconds = ""
    return table


def _cell(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _all_figures(runs: list[Run]) -> dict[str, Any]:
    return {f"{done.summary['stage']}/{name}": v for done in runs for name, v in done.summary["figures"].items()}


def _example(runs: list[Run]) -> str:
    """A prompt that the last stage itself was shown, so that the command printed at the end works as it stands."""
    prompts = [done.summary["example"] for done in runs if done.summary.get("example")]
    return f"'{prompts[-1]}'" if prompts else ""
