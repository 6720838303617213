"""What to read and how to cut it into rows."""

import math
from dataclasses import dataclass, field

from framework.core.config import Choice, require


@dataclass(frozen=True)
class DataConfig:
    """`train` and `valid` name files, folders, datasets of a dataset_info.json (data/alpaca_zh) or of the hub
    (hub:OWNER/NAME); one number as `valid`, 0.02, holds that share of train out, by a hash of its content."""

    train: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # one a path of train: its share of the rows drawn
    temperature: float = 0.0  # shares by size^(1/temperature) instead: 1 = by size, more = flatter; 0 = not mixed
    max_epochs: list[float] = field(default_factory=list)  # one a path, or one for all: passes over it at most
    format: str = "auto"  # or a registered data_format
    max_tokens: int = 128  # of one row, prompt and response together
    packing: bool = True  # several documents a row, attention kept apart
    over_length: str = "refuse"  # or "skip": what to do with a sample longer than max_tokens (texts are cut into rows)
    cache: str = ""  # prepared shards; empty = beside the run folder

    def __post_init__(self) -> None:
        require(self.max_tokens >= 2, f"data.max_tokens={self.max_tokens} must be at least 2")
        shares = [share for share in map(_share, self.valid) if share is not None]
        require(
            not shares or len(self.valid) == 1,
            f"data.valid={','.join(self.valid)}: give files, or one share of data.train such as 0.02",
        )
        for share in shares:
            require(0.0 < share < 1.0, f"data.valid={share} must be between 0 and 1")
        require(self.over_length in ("refuse", "skip"), f"data.over_length={self.over_length}: choose refuse or skip")
        require(
            not self.weights or len(self.weights) == len(self.train),
            f"data.weights has {len(self.weights)} entries and data.train {len(self.train)}; give one a file or folder",
        )
        require(
            all(0 < w < math.inf for w in self.weights), f"data.weights={self.weights} must all be positive and finite"
        )
        require(
            self.temperature == 0 or (self.temperature > 0 and not self.weights),
            f"data.temperature={self.temperature} must be positive, and is instead of data.weights",
        )
        require(
            len(self.max_epochs) in (0, 1, len(self.train)) and all(most > 0 for most in self.max_epochs),
            f"data.max_epochs={self.max_epochs}: give one positive number a path of data.train, or one for all",
        )

    @property
    def valid_paths(self) -> list[str]:
        """What `valid` names; nothing where it is a share."""
        return [] if self.valid_share else self.valid

    @property
    def valid_share(self) -> float:
        """The share of train that is held out; 0.0 where `valid` names files or nothing."""
        return next(filter(None, map(_share, self.valid)), 0.0)


def _share(word: str) -> float | None:
    """A share is written as a number, and no file is: 0.02."""
    try:
        return float(word)
    except ValueError:
        return None


class Objective(Choice):
    """What of a text is hidden, and predicted."""

    AUTO = "auto"  # what suits the model: causal; prefix, or blanks with 2-D positions; masked; spans
    CAUSAL = "causal"  # each next token (Radford et al. 2018)
    PREFIX = "prefix"  # each next token behind a first part of random length (Raffel et al. 2020, section 3.2.3)
    MASKED = "masked"  # some tokens, from all others (Devlin et al. 2018)
    BLANKS = "blanks"  # spans of tokens, written behind the rest in any order (Du et al. 2022, GLM)
    SPANS = "spans"  # spans of tokens, written one after another from the rest (Raffel et al. 2020, section 3.1.4)


@dataclass(frozen=True)
class LanguageConfig:
    """What a language model learns from plain text."""

    objective: Objective = Objective.AUTO
    share: float = 0.15  # masked, spans, blanks: of the tokens, predicted
    span: float = 3.0  # spans, blanks: their mean length in tokens
    masked: float = 0.8  # masked: of those, read as the tokenizer's mask token
    random: float = 0.1  # masked: of those, read as any token; the rest are read as they are

    def __post_init__(self) -> None:
        require(self.span >= 1, f"language.span={self.span} must be at least 1: the mean length of a span in tokens")
        require(0 < self.share < 1, f"language.share={self.share} must be between 0 and 1")
        require(
            min(self.masked, self.random) >= 0 and self.masked + self.random <= 1,
            f"language.masked={self.masked} and language.random={self.random} are shares: at most 1 together",
        )


@dataclass(frozen=True)
class MixConfig:
    """Plain text learned beside conversations, so that less of it is forgotten (Ouyang et al. 2022, equation 2)."""

    train: list[str] = field(default_factory=list)  # files or folders of texts; none = nothing is mixed in
    coefficient: float = 0.1  # of the texts' loss, nats a token, beside the conversations'; 0 = as without
    size: int = 0  # rows of data.max_tokens a step; 0 = as many as batch.size

    def __post_init__(self) -> None:
        require(
            0 <= self.coefficient < math.inf,
            f"mix.coefficient={self.coefficient} must not be negative, and finite",
        )
        require(self.size >= 0, f"mix.size={self.size} must not be negative")


@dataclass(frozen=True)
class ClassifyConfig:
    """What the labels of texts are."""

    labels: list[str] = field(default_factory=list)  # the classes in their order; none = those of data.train, sorted
    regression: bool | None = None  # labels are numbers to predict; none = where any of them is a fraction

    def __post_init__(self) -> None:
        words = ",".join(self.labels)
        require(len(self.labels) != 1, f"classify.labels=[{words}]: one class leaves nothing to tell apart; name two")
        require(len({*self.labels}) == len(self.labels), f"classify.labels=[{words}] names a class twice")
        require(
            not (self.labels and self.regression),
            f"classify.labels=[{words}] does not go with classify.regression=true, which has numbers and no classes",
        )


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
