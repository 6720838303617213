"""Where figures go besides metrics.jsonl."""

from dataclasses import dataclass

from framework.core.config import require


@dataclass(frozen=True)
class TrackingConfig:
    """`kind` is a registered tracker: none, tensorboard, wandb (offline where there is no account)."""

    kind: str = "none"
    project: str = "framework"
    group: str = ""
    every: int = 10  # steps between logged ones
    progress: bool = True  # bar with ETA on a terminal, a line now and then elsewhere

    def __post_init__(self) -> None:
        require(self.every >= 1, f"tracking.every={self.every} must be at least 1")
