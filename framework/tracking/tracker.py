"""Where figures go besides metrics.jsonl: a tracker takes (step, figures). An extension may register its own.

Left out: everything that a tracker would have to be asked for. metrics.jsonl is the truth; trackers show it.
"""

import netrc
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from framework.core.errors import UsageError, foreign
from framework.core.registry import lookup, register
from framework.tracking.atomic import replace_text
from framework.tracking.config import TrackingConfig

Figures = Mapping[str, float]


class Tracker(Protocol):
    """Made as `TrackerClass(folder, config, recipe)` when a run begins or continues."""

    def log(self, step: int, figures: Figures) -> None:
        """Take the figures of a step. After a resume, steps that were logged before may come again."""

    def finish(self, figures: Figures) -> None:
        """Take the final figures."""

    def close(self) -> None:
        """Send what is still held."""


def open_tracker(folder: Path, config: TrackingConfig, recipe: Mapping[str, Any]) -> Tracker:
    """The tracker that `tracking.kind` names. UsageError for an unknown one or one whose package is missing."""
    made = lookup("tracker", config.kind)
    with foreign(f"tracking.kind={config.kind}", UsageError):
        tracker: Tracker = made(folder, config, recipe)
    return tracker


@register("tracker", "none")
class NoTracker:
    """metrics.jsonl alone."""

    def __init__(self, folder: Path, config: TrackingConfig, recipe: Mapping[str, Any]):
        pass

    def log(self, step: int, figures: Figures) -> None:
        pass

    def finish(self, figures: Figures) -> None:
        pass

    def close(self) -> None:
        pass


@register("tracker", "tensorboard")
class TensorBoardTracker:
    """Event files in tensorboard/ of the run folder: `tensorboard --logdir runs`."""

    def __init__(self, folder: Path, config: TrackingConfig, recipe: Mapping[str, Any]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard") from None
        self._open = lambda step: SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        self._writer: Any = None

    def log(self, step: int, figures: Figures) -> None:
        # The first step after a resume hides what an earlier attempt had written from there on.
        self._writer = self._writer or self._open(step)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, figures: Figures) -> None:
        pass

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@register("tracker", "wandb")
class WandbTracker:
    """Weights & Biases; offline where there is no account (WANDB_MODE decides where it is set). A run that is continued
    continues there too: its id is kept in the run folder. A sweep's agent chooses the id, and finds the run by it."""

    def __init__(self, folder: Path, config: TrackingConfig, recipe: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise _missing("wandb") from None
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_account() else "offline")
        if mode == "offline":
            print(f"wandb: offline; upload later with: wandb sync {folder}/wandb/offline-run-*", file=sys.stderr)
        # Quiet, and without a parser of our terminal: the progress bar and logs/ are ours.
        settings = wandb.Settings(silent=True, console="off")
        words: dict[str, Any] = {
            "project": config.project,
            "group": config.group or None,
            "name": str(recipe.get("name", folder.name)),
            "id": _run_id(folder, "wandb", os.environ.get("WANDB_RUN_ID")),
            "resume": "allow",
            "dir": str(folder),
            "config": dict(recipe),
            "mode": mode,
        }
        try:
            self._run = wandb.init(**words, settings=settings)
        except wandb.errors.Error as error:
            raise UsageError(
                f"tracking=wandb cannot start: {error}; WANDB_MODE=offline goes without a network"
            ) from None
        # Our own step axis: wandb's counts up only, and would drop the steps that a resumed run takes again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: Figures) -> None:
        self._run.log({"step": step, **figures})

    def finish(self, figures: Figures) -> None:
        self._run.summary.update({f"final/{name}": value for name, value in figures.items()})

    def close(self) -> None:
        self._run.finish()


@register("tracker", "swanlab")
class SwanlabTracker:
    """SwanLab; offline where there is no key (its own settings decide the mode where they name one). A run that is
    continued keeps its id."""

    def __init__(self, folder: Path, config: TrackingConfig, recipe: Mapping[str, Any]):
        try:
            import swanlab
        except ImportError:
            raise _missing("swanlab") from None
        run_id = _run_id(folder, "swanlab", os.environ.get("SWANLAB_RUN_ID"))
        words: dict[str, Any] = {
            "project": config.project,
            "group": config.group or None,
            "name": str(recipe.get("name", folder.name)),
            "id": run_id,
            "resume": "allow",
            "log_dir": str(folder / "swanlab"),
            "config": dict(recipe),
        }
        try:
            # Without a proxy of our terminal and without questions: the progress bar and logs/ are ours.
            settings = swanlab.Settings(terminal={"proxy_type": "none"}, interactive=False)
            has_mode = "mode" in settings.model_fields_set
            words["mode"] = settings.mode if has_mode else "online" if settings.api_key else "offline"
            self._run = swanlab.init(**words, settings=settings)
        except Exception as error:  # it has no error of its own: pydantic's, requests', RuntimeError
            reason = " ".join(str(error).split())
            raise UsageError(
                f"tracking=swanlab cannot start: {reason}; SWANLAB_MODE=offline goes without a network"
            ) from None
        if words["mode"] == "offline":
            print(f"swanlab: offline; upload later with: swanlab sync --id {run_id} FOLDER, for each folder in turn "
                  f"of {folder}/swanlab/run-*", file=sys.stderr)  # fmt: skip
        self._last = 0

    def log(self, step: int, figures: Figures) -> None:
        self._last = step
        self._run.log(dict(figures), step=step)

    def finish(self, figures: Figures) -> None:
        # It keeps no summary beside the curves: the final figures are curves of one point.
        self._run.log({f"final/{name}": value for name, value in figures.items()}, step=self._last)

    def close(self) -> None:
        self._run.finish()


def _missing(extra: str) -> UsageError:
    return UsageError(f'tracking={extra} needs a package that is not installed: pip install "framework[{extra}]"')


def _run_id(folder: Path, kind: str, chosen: str | None) -> str:
    """The id that this run has at `kind`: kept in the folder, where it began as `chosen` or as a random one."""
    path = folder / f"{kind}_id"
    if not path.exists():
        replace_text(path, chosen or secrets.token_hex(4))
    return path.read_text()


def _has_account() -> bool:
    """As wandb looks for one: a key or token in the environment, or an entry in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
