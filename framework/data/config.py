"""What to read and how to cut it into rows."""

from dataclasses import dataclass, field

from framework.core.config import require


@dataclass(frozen=True)
class DataConfig:
    """`train` and `valid` are files or folders; `valid_share` of train (0.02) is held out by content hash instead."""

    train: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    valid_share: float = 0.0
    weights: list[float] = field(default_factory=list)  # one a file or folder of train: its share of the rows drawn
    format: str = "auto"  # or a registered data_format
    max_tokens: int = 128  # of one row, prompt and response together
    packing: bool = True  # several documents a row, attention kept apart
    over_length: str = "refuse"  # or "skip": what to do with a sample longer than max_tokens (texts are cut into rows)
    cache: str = ""  # prepared shards; empty = beside the run folder

    def __post_init__(self) -> None:
        require(self.max_tokens >= 2, f"data.max_tokens={self.max_tokens} must be at least 2")
        require(0.0 <= self.valid_share < 1.0, f"data.valid_share={self.valid_share} must be in [0, 1)")
        require(self.over_length in ("refuse", "skip"), f"data.over_length={self.over_length}: choose refuse or skip")
        require(
            not self.weights or len(self.weights) == len(self.train),
            f"data.weights has {len(self.weights)} entries and data.train {len(self.train)}; give one a file or folder",
        )
        require(all(w > 0 for w in self.weights), f"data.weights={self.weights} must all be positive")


@dataclass(frozen=True)
class BatchConfig:
    """`size`: sequences (packed rows, or pairs) per optimizer step over all ranks. `micro_size`: per data rank per
    forward; 0 = as many as one forward takes, the whole share. Accumulation is derived."""

    size: int = 32
    micro_size: int = 0

    def __post_init__(self) -> None:
        require(self.size >= 1, f"batch.size={self.size} must be at least 1")
        require(self.micro_size >= 0, f"batch.micro_size={self.micro_size} must not be negative")

    def micro(self, data_size: int) -> int:
        """Rows per forward on one of `data_size` data ranks; refuses what does not divide."""
        require(
            self.size % data_size == 0,
            f"batch.size={self.size} is not divisible by {data_size} data ranks; choose a multiple of {data_size}",
        )
        share = self.size // data_size
        micro = self.micro_size or share
        choices = ", ".join(str(d) for d in range(1, share + 1) if share % d == 0)
        require(
            share % micro == 0,
            f"batch.micro_size={micro} does not divide the {share} sequences of a data rank "
            f"(batch.size={self.size} over {data_size}); choose {choices}",
        )
        return micro
