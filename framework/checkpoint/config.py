"""When to save and what to keep."""

from dataclasses import dataclass

from framework.core.config import require


@dataclass(frozen=True)
class CheckpointConfig:
    """`every` steps a checkpoint; `keep` newest are kept, and the best one by `best` where validation measures it.
    `background`: training goes on while a checkpoint is written from a copy in host memory; PPO always waits for it."""

    every: int = 0  # 0 = only at the end and when interrupted
    keep: int = 2
    best: str = "valid/loss"  # lower is better; prefix with "-" where higher is better
    background: bool = True

    def __post_init__(self) -> None:
        require(self.every >= 0, f"checkpoint.every={self.every} must not be negative")
        require(self.keep >= 1, f"checkpoint.keep={self.keep} must be at least 1")
