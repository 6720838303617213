"""How tokens are sampled."""

from dataclasses import dataclass

from framework.core.config import require


@dataclass(frozen=True)
class SamplingConfig:
    """temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off. `max_tokens` counts the response alone."""

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        require(self.temperature >= 0, f"temperature={self.temperature} must not be negative")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]")
        require(0 <= self.min_p <= 1, f"min_p={self.min_p} must be in [0, 1]")
        require(self.top_k >= 0, f"top_k={self.top_k} must not be negative")
        require(self.max_tokens >= 1, f"max_tokens={self.max_tokens} must be at least 1")


@dataclass(frozen=True)
class GenerationConfig:
    """The native generator: `slots` rows decode together; a finished row's slot is refilled at once."""

    slots: int = 64
    strict: bool = False  # bit-equal to the trainer's log-probs (law On-policy)
    compile: bool = (
        False  # one token for all slots as one graph; costs a compiler's time at the first (docs/performance)
    )

    def __post_init__(self) -> None:
        require(
            not (self.strict and self.compile),
            "generation.compile=true rounds otherwise than a trainer, strict=true may not: choose one of them",
        )
