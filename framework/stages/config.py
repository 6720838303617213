"""What a recipe may say: one frozen dataclass a stage, composed of the rooms' own configs, and the checks across them.

No torch here, so that help, `explain` and refusals are instant.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from framework.checkpoint.config import CheckpointConfig
from framework.cluster.config import ClusterConfig, ClusterKind, RanksConfig
from framework.core.config import Choice, require
from framework.core.places import local
from framework.data.config import BatchConfig, ClassifyConfig, DataConfig, LanguageConfig, MixConfig
from framework.engine.config import (
    AttentionFrom,
    EngineConfig,
    OpsConfig,
    Precision,
    TrainConfig,
    TrainingOpsConfig,
)
from framework.evaluation.config import EvaluationConfig
from framework.generation.config import GenerationConfig, SamplingConfig
from framework.models.config import Base, LoraConfig, ModelConfig
from framework.optim.config import OptimConfig
from framework.parallel.config import ParallelConfig
from framework.tokenization.config import TokenizerConfig
from framework.tracking.config import TrackingConfig
from framework.workers.config import MODEL, PpoConfig, RolloutConfig

# Keys that change how a run computes but not what: the recipe's hash leaves them out, a raised length continues.
NOT_IN_HASH = (
    "parallel",
    "cluster",
    "batch.micro_size",
    "tracking",
    "checkpoint",
    "run",
    "extensions",  # their names; their content counts
    "data.cache",
    "threads",
    "ops",
    "train.steps",
    "train.epochs",
    "train.profile",
    "ppo.iterations",
)


@dataclass(frozen=True)
class RunPaths:
    """`dir` is the run folder; stages of one pipeline stand side by side under `root`."""

    root: str = "runs"
    dir: str = "${run.root}/${name}"


@dataclass(frozen=True)
class RunConfig:
    """What every stage has."""

    stage: str = ""
    name: str = "${stage}"
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    threads: int | None = None  # torch threads of this process; none = torch's choice
    deterministic: bool | None = None  # none = true on a CPU, false on a GPU
    extensions: list[str] = field(default_factory=list)
    objective: str = ""  # the summary figure that a sweep minimises
    run: RunPaths = field(default_factory=RunPaths)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require(self.device in ("auto", "cpu", "cuda"), f"device={self.device}: choose auto, cpu or cuda")
        require(self.threads is None or 1 <= self.threads <= 1024, f"threads={self.threads} must be from 1 to 1024")
        require(self.name not in ("", ".", ".."), f"name={self.name!r} names no folder; choose a word")
        require(bool(self.run.dir), "run.dir is empty; name a folder, or leave it out")

    @property
    def folder(self) -> Path:
        return local(self.run.dir)

    @property
    def prepared(self) -> Path:
        """Where data are prepared where data.cache does not say: beside the run, for all runs there."""
        return self.folder.parent / "prepared"

    @property
    def names(self) -> list[tuple[str, str, str]]:
        """(key, kind, name) of what the recipe names and code must have registered."""
        return [("tracking.kind", "tracker", self.tracking.kind)]


@dataclass(frozen=True)
class TokenizerRun(RunConfig):
    """Train a tokenizer on text; tokenizer extend FOLDER ..., tokenizer compare FOLDER... --file FILE."""

    init_from: str = ""  # a tokenizer's or model's folder whose vocabulary is extended; none: train from nothing
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.data.train), "data.train is empty; name the files to learn from: data.train=[a.txt]")
        of_training = replace(self.tokenizer, new_tokens=1) != TokenizerConfig(new_tokens=1)
        require(
            not (self.init_from and of_training),
            "an extended tokenizer keeps its kind, special tokens and old ids; leave out all keys of tokenizer but "
            "tokenizer.new_tokens",
        )

    @property
    def names(self) -> list[tuple[str, str, str]]:
        return [*super().names, *_format(self.data)]


@dataclass(frozen=True)
class TrainingRun(RunConfig):
    """What pretrain, sft, classify, reward_model and preference share."""

    init_from: str = ""  # a Hugging Face folder or a stage's model/ folder: weights, architecture, tokenizer
    tokenizer: str = ""  # a tokenizer folder, when training from nothing
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ops: TrainingOpsConfig = field(default_factory=TrainingOpsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cluster: RanksConfig = field(default_factory=RanksConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.data.train), "data.train is empty; name files or folders: data.train=[a.jsonl]")
        self.batch.micro(1)
        _refuse_compiled(self.engine, self.parallel)
        self.ops.require_fit(self.engine, self.parallel)
        require(
            not (self.lora.rank and (self.train.freeze or self.train.last_layers)),
            "train.freeze and train.last_layers do not go with lora.rank: beside an adapter the model stands still but "
            "for lora.also",
        )
        require(not self.lora.rank or bool(self.init_from), "lora.rank needs a model to adapt: init_from=FOLDER")

    @property
    def names(self) -> list[tuple[str, str, str]]:
        return [*super().names, *_format(self.data), *_tasks(self.evaluation)]


@dataclass(frozen=True)
class PretrainRun(TrainingRun):
    """Learn to predict plain text: its next token, or what is hidden of it."""

    language: LanguageConfig = field(default_factory=LanguageConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.init_from) != bool(self.tokenizer),
            "pretraining needs exactly one of tokenizer=FOLDER (from nothing) and init_from=FOLDER (go on training); "
            f"got tokenizer={self.tokenizer or '(none)'} and init_from={self.init_from or '(none)'}",
        )


@dataclass(frozen=True)
class SftRun(TrainingRun):
    """Learn to answer, from conversations."""

    mix: MixConfig = field(default_factory=MixConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.init_from), "sft starts from a model: init_from=FOLDER")


@dataclass(frozen=True)
class ClassifyRun(TrainingRun):
    """Learn what texts are: classes, or numbers."""

    classify: ClassifyConfig = field(default_factory=ClassifyConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.init_from), "classify starts from a model: init_from=FOLDER")


@dataclass(frozen=True)
class RewardModelRun(TrainingRun):
    """Learn which of two answers is preferred."""

    center_coefficient: float = 0.0  # pulls the sum of a pair's scores to zero

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.init_from), "reward_model starts from a model: init_from=FOLDER")


class DpoKind(Choice):
    """What a pair costs; the formulas stand in `objectives.preference.dpo_loss`."""

    SIGMOID = "sigmoid"
    IPO = "ipo"
    HINGE = "hinge"


@dataclass(frozen=True)
class DpoConfig:
    """The loss of preference learning."""

    beta: float = 0.1  # how dearly leaving the reference is paid for
    kind: DpoKind = DpoKind.SIGMOID
    label_smoothing: float = 0.0  # the share of pairs thought to be labelled wrongly
    sft_coefficient: float = 0.0  # of the chosen answers' own loss, nats a token, beside it
    average: bool | None = None  # log-probs averaged over the answer instead of summed; none = for ipo alone

    def __post_init__(self) -> None:
        require(0 < self.beta < math.inf, f"dpo.beta={self.beta} must be positive and finite")
        require(
            0 <= self.label_smoothing < 0.5,
            f"dpo.label_smoothing={self.label_smoothing} must be in [0, 0.5): from a half on the answers change places",
        )
        require(
            not self.label_smoothing or self.kind is DpoKind.SIGMOID,
            f"dpo.label_smoothing={self.label_smoothing} has no meaning for dpo.kind={self.kind}; leave it out, or "
            "choose dpo.kind=sigmoid",
        )
        require(
            0 <= self.sft_coefficient < math.inf,
            f"dpo.sft_coefficient={self.sft_coefficient} must not be negative, and finite",
        )

    @property
    def averages(self) -> bool:
        return self.kind is DpoKind.IPO if self.average is None else self.average


@dataclass(frozen=True)
class PreferenceRun(TrainingRun):
    """Learn from pairs which answers to give, without a reward model."""

    dpo: DpoConfig = field(default_factory=DpoConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.init_from), "preference starts from a model, which is the reference too: init_from=FOLDER")


@dataclass(frozen=True)
class PpoRun(RunConfig):
    """Improve a policy against a reward model."""

    init_from: str = ""  # the policy and the reference: an SFT model
    reward_from: str = ""  # the reward model, from which the critic starts; without one it starts from the policy
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)  # of actor and critic
    optim: OptimConfig = field(default_factory=OptimConfig)  # of actor and critic; ppo.critic_lr is the critic's own
    engine: EngineConfig = field(default_factory=EngineConfig)
    ops: TrainingOpsConfig = field(default_factory=TrainingOpsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.init_from), "ppo starts from a policy: init_from=FOLDER")
        require(
            bool(self.reward_from) or self.ppo.reward != MODEL,
            "ppo needs a reward model: reward_from=FOLDER; or another reward: ppo.reward=NAME",
        )
        require(bool(self.data.train), "data.train is empty; name a file of prompts: data.train=[prompts.jsonl]")
        responses = self.rollout.prompts * self.rollout.samples
        divisors = ", ".join(str(d) for d in range(1, responses + 1) if responses % d == 0)
        require(
            responses % self.batch.size == 0,
            f"batch.size={self.batch.size} does not divide rollout.prompts x rollout.samples = {responses}; "
            f"choose {divisors}",
        )
        require(
            self.cluster.kind is ClusterKind.RAY or self.cluster.workers == 1,
            f"cluster.workers={self.cluster.workers} needs cluster=ray; in_process has one worker a role",
        )
        require(
            not (self.lora.rank and self.lora.dropout),
            f"lora.dropout={self.lora.dropout} does not go with ppo, whose first ratio must be 1; leave it out",
        )
        require(
            self.lora.base is Base.FULL,
            f"lora.base={self.lora.base} does not go with ppo, whose generator holds what the actor does; leave it out",
        )
        self.batch.micro(self.parallel.data_size(self.cluster.workers))
        _refuse_compiled(self.engine, self.parallel)
        require(
            self.engine.precision is not Precision.FP64,
            "engine.precision=fp64 does not go with ppo, whose generators hold the policy in fp32; choose fp32 or bf16",
        )
        require(
            not self.rollout.strict or (self.engine.precision is Precision.FP32 and not self.engine.compile),
            "rollout.strict=true needs engine.precision=fp32 and engine.compile=false; see law On-policy",
        )
        require(
            not (self.rollout.strict and self.parallel.cuts_the_model and self.cluster.workers > 1),
            f"rollout.strict=true needs whole rows and matrices, parallel={self.parallel.name} cuts them; choose "
            "rollout.strict=false, or parallel=ddp or fsdp",
        )
        self.ops.require_fit(self.engine, self.parallel, self.rollout.strict)

    @property
    def names(self) -> list[tuple[str, str, str]]:
        ppo, reward = self.ppo, [("ppo.reward", "reward", self.ppo.reward)] if self.ppo.reward != MODEL else []
        formulas = [("ppo.advantage", "advantage", ppo.advantage), ("ppo.policy_loss", "policy_loss", ppo.policy_loss)]
        return [*super().names, *formulas, *reward, *_format(self.data), *_tasks(self.evaluation)]

    @property
    def width(self) -> int:
        """Tokens a row, prompt and response: constant, and a multiple of 8, so that shapes never change."""
        return -(-(self.rollout.max_prompt_tokens + self.rollout.max_tokens) // 8) * 8


@dataclass(frozen=True)
class EvaluateRun(RunConfig):
    """Run tasks against a model."""

    init_from: str = ""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    ops: OpsConfig = field(default_factory=OpsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.init_from), "evaluate needs a model: init_from=FOLDER")
        require(
            self.ops.attention is not AttentionFrom.FLASH,
            "ops.attention=flash does not go with evaluate, which reads from caches; leave it out",
        )
        self.ops.require_strict(self.generation.strict, "generation.strict")
        require(bool(self.evaluation.tasks), "evaluation.tasks is empty; name tasks: evaluation.tasks=[verse_form]")

    @property
    def names(self) -> list[tuple[str, str, str]]:
        return [*super().names, *_tasks(self.evaluation)]


@dataclass(frozen=True)
class PipelineRun(RunConfig):
    """Several stages, one after another. Each entry is an experiment whose last word is its stage: `quickstart/sft`."""

    stages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.stages), "a pipeline names its stages; start from experiment=quickstart")


STAGES: dict[str, type[RunConfig]] = {
    "tokenizer": TokenizerRun,
    "pretrain": PretrainRun,
    "sft": SftRun,
    "classify": ClassifyRun,
    "reward_model": RewardModelRun,
    "preference": PreferenceRun,
    "ppo": PpoRun,
    "evaluate": EvaluateRun,
    "pipeline": PipelineRun,
}


def _refuse_compiled(engine: EngineConfig, parallel: ParallelConfig) -> None:
    require(
        not (engine.compile and parallel.zero == 3),
        f"engine.compile=true does not go with parallel={parallel.name}: DeepSpeed gathers the parameters of ZeRO-3 "
        "between a model's modules; choose parallel=zero2 or fsdp",
    )


def _format(data: DataConfig) -> list[tuple[str, str, str]]:
    return [] if data.format == "auto" else [("data.format", "data_format", data.format)]


def _tasks(evaluation: EvaluationConfig) -> list[tuple[str, str, str]]:
    return [("evaluation.tasks", "task", name) for name in evaluation.tasks]
