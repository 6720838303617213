"""Which tasks to run, on how much."""

from dataclasses import dataclass, field

from framework.core.config import require

_PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class EvaluationConfig:
    """Tasks are registered names; an extension may add its own."""

    tasks: list[str] = field(default_factory=list)  # registered tasks, or files that define one
    limit: int = 0  # examples a task; 0 = all
    part: str = "test"  # of a task's examples: train, valid or test
    samples: int = 1  # answers to a held-out prompt, ppo only
    baselines: bool = False  # also measure what bigrams (and lengths) alone achieve; for small data, in plain Python

    def __post_init__(self) -> None:
        require(self.limit >= 0, f"evaluation.limit={self.limit} must not be negative; 0 = all examples")
        require(self.part in _PARTS, f"evaluation.part={self.part}: choose {', '.join(_PARTS)}")
        require(self.samples >= 1, f"evaluation.samples={self.samples} must be at least 1")
