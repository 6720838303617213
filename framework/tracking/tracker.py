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

from framework.core.errors import UsageError
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
    tracker: Tracker = lookup("tracker", config.kind)(folder, config, recipe)
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
    continues there too: its id is kept in the run folder."""

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
            "id": _run_id(folder),
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


def _missing(extra: str) -> UsageError:
    return UsageError(f'tracking={extra} needs a package that is not installed: pip install "framework[{extra}]"')


def _run_id(folder: Path) -> str:
    path = folder / "wandb_id"
    if not path.exists():
        replace_text(path, secrets.token_hex(4))
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
