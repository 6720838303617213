"""How an engine computes a step."""

from dataclasses import dataclass, field

from framework.core.config import Choice, require


class Precision(Choice):
    """Numbers that a step computes with."""

    FP32 = "fp32"
    BF16 = "bf16"  # bf16 compute, fp32 master weights, optimizer states and reductions
    FP64 = "fp64"  # for proofs


class NonFinite(Choice):
    """What a NaN or infinite gradient does."""

    SKIP = "skip"  # leave weights and optimizer alone, count it, go on
    STOP = "stop"


@dataclass(frozen=True)
class EngineConfig:
    """How forward, backward and update are computed."""

    precision: Precision = Precision.FP32
    strict: bool = False  # the explicit attention and padded linears of law On-policy
    compile: bool = False
    non_finite: NonFinite = NonFinite.STOP
    max_skips: int = 10  # consecutive skipped steps before the run stops all the same

    def __post_init__(self) -> None:
        require(
            not (self.strict and (self.compile or self.precision is Precision.BF16)),
            "engine.strict=true needs engine.compile=false and engine.precision=fp32: see law On-policy",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The length of a training run and its checks on the way."""

    steps: int = 0  # optimizer steps; 0 = derived from epochs
    epochs: float = 1.0
    validate_every: int = 0  # steps; 0 = at the end only
    freeze: list[str] = field(default_factory=list)  # parts of the model that do not learn: [embedding, layers.0]
    last_layers: int = 0  # only so many layers learn, and what stands behind them; 0 = all
    profile: bool = False  # a torch.profiler trace of steps 3 to 5 in the run folder

    def __post_init__(self) -> None:
        require(self.steps >= 0, f"train.steps={self.steps} must not be negative; 0 = as train.epochs says")
        require(self.epochs > 0, f"train.epochs={self.epochs} must be positive")
        require(self.validate_every >= 0, f"train.validate_every={self.validate_every} must not be negative")
        require(self.last_layers >= 0, f"train.last_layers={self.last_layers} must not be negative; 0 = all")

    def total_steps(self, rows: int, batch_size: int) -> int:
        """Optimizer steps for `rows` rows: `steps` where given, else epochs, the last partial batch left out."""
        return self.steps or max(1, int(self.epochs * rows) // batch_size)
