"""How an engine computes a step."""

from dataclasses import dataclass, field

from framework.core.config import Choice, require
from framework.parallel.config import ParallelConfig


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


class AttentionFrom(Choice):
    """Whose attention runs."""

    AUTO = "auto"  # flash-attn where it is installed and takes the call, else torch's
    TORCH = "torch"  # scaled_dot_product_attention, and for packed rows varlen_attn
    FLASH = "flash"  # flash-attn 2, 3 or 4: the one that fits the card
    REFERENCE = "reference"  # matmul, softmax, matmul


class OpFrom(Choice):
    """Whose norm, or whose update, runs."""

    AUTO = "auto"  # the kernel of cuda_ext where one is built and fits, else torch's
    KERNEL = "kernel"
    TORCH = "torch"  # the definition, in torch's own operations
    APEX = "apex"  # NVIDIA apex


@dataclass(frozen=True)
class OpsConfig:
    """Whose operators a model computes with. What is named must be here; one call that it cannot take runs otherwise,
    and the log says so."""

    attention: AttentionFrom = AttentionFrom.AUTO
    norm: OpFrom = OpFrom.AUTO  # RMSNorm and LayerNorm

    def require_strict(self, strict: bool, named: str) -> None:
        """Where `strict`, which the keys `named` say, refuse what it cannot have."""
        require(
            not strict or self.attention in (AttentionFrom.AUTO, AttentionFrom.REFERENCE),
            f"ops.attention={self.attention} does not go with strict mode ({named}), which has the reference's; leave "
            "it out",
        )
        require(
            not strict or self.norm is not OpFrom.APEX,
            f"ops.norm=apex does not go with strict mode ({named}): its bits are not known to depend on the row alone; "
            "choose kernel or torch",
        )


@dataclass(frozen=True)
class TrainingOpsConfig(OpsConfig):
    """And whose update."""

    optimizer: OpFrom = OpFrom.AUTO  # AdamW

    def require_fit(self, engine: EngineConfig, parallel: ParallelConfig, strict: bool = False) -> None:
        """Refuse what an engine's numbers, its layout or strict mode (also a rollout's) cannot have."""
        flash, fused = self.attention is AttentionFrom.FLASH, (OpFrom.KERNEL, OpFrom.APEX)
        require(
            not flash or engine.precision is Precision.BF16,
            f"ops.attention=flash takes bf16, not engine.precision={engine.precision}; choose engine.precision=bf16, "
            "or ops.attention=torch",
        )
        self.require_strict(strict or engine.strict, "engine.strict, rollout.strict")
        require(
            not flash or parallel.context == 1,
            f"ops.attention=flash does not go with parallel.context={parallel.context}, whose ranks attend by a core "
            "of their own; leave it out",
        )
        for name in ("norm", "optimizer"):
            require(
                engine.precision is not Precision.FP64 or getattr(self, name) not in fused,
                f"ops.{name}={getattr(self, name)} does not go with engine.precision=fp64; choose torch",
            )
        require(
            not parallel.offload or self.optimizer not in fused,
            f"ops.optimizer={self.optimizer} runs on GPUs, parallel={parallel.name} updates in CPU memory; choose "
            "torch",
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
