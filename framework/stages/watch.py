"""`framework status RUN` and `framework report RUN`: what run folders tell, without touching the runs."""

from pathlib import Path

from framework.core.errors import UsageError
from framework.core.places import is_url, watched
from framework.tracking.remote import Remote
from framework.tracking.report import write_report
from framework.tracking.status import describe, read_status


def status(words: list[str]) -> int:
    """Where a run stands; a pipeline's folder is followed by its stages."""
    for folder in _runs(words, "status"):
        print(describe(folder))
    return 0


def report(words: list[str]) -> int:
    """Write report.html again from what lies in the folders."""
    folders = _runs(words, "report")
    print(write_report(here(words[0]) / "report.html", folders))
    return 0


def _runs(words: list[str], tool: str) -> list[Path]:
    """The named run folders; one that holds stages stands for them, in the order in which they ran."""
    if not words:
        raise UsageError(f"{tool} takes a run folder: framework {tool} runs/quickstart")
    folders = [here(word) for word in words]
    for folder in folders:
        if read_status(folder) is None and not stages_of(folder):
            raise UsageError(f"{folder} is not a run folder: it has no status.json")
    return [run for folder in folders for run in stages_of(folder) or [folder]]


def here(place: str) -> Path:
    """A run's folder; of one on object storage a copy that is brought up to date, models and checkpoints left there."""
    if not is_url(place):
        return Path(place)
    copy = watched(place)
    Remote(place, copy).look(heavy=False)
    return copy


def stages_of(folder: Path) -> list[Path]:
    """The run folders directly below `folder`, oldest work first."""
    found = [(status, path) for path in folder.glob("*/") if (status := read_status(path)) is not None]
    return [path for _, path in sorted(found, key=lambda entry: entry[0].updated)]
