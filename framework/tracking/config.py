"""Where figures go besides metrics.jsonl."""

from dataclasses import dataclass

from framework.core.config import require

DIGEST = "weights/digest"  # what metrics.jsonl calls the digest of the weights


@dataclass(frozen=True)
class TrackingConfig:
    """`kind` is a registered tracker: none, tensorboard, wandb, swanlab (both offline without an account)."""

    kind: str = "none"
    project: str = "framework"
    group: str = ""
    every: int = 10  # steps between logged ones
    digest_every: int = 0  # steps, or PPO's iterations, between digests and traces (docs/watching.md); 0 = none
    progress: bool = True  # bar with ETA on a terminal, a line now and then elsewhere

    def __post_init__(self) -> None:
        require(self.every >= 1, f"tracking.every={self.every} must be at least 1")
        require(self.digest_every >= 0, f"tracking.digest_every={self.digest_every} must not be negative; 0 = none")
