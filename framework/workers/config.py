"""The numbers of PPO (Schulman et al. 2017; Ouyang et al. 2022), shared by its workers and its loop."""

from dataclasses import dataclass, field

from framework.core.config import Choice, require
from framework.engine.config import EngineConfig
from framework.models.config import LoraConfig
from framework.optim.config import OptimConfig
from framework.parallel.config import ParallelConfig

MODEL = "model"  # the reward that needs no text: the reward model's score as it is


class KlKind(Choice):
    """Estimators of KL(policy, reference) from samples (Schulman 2020)."""

    K1 = "k1"
    K2 = "k2"
    K3 = "k3"


class KlControl(Choice):
    """Whether the KL coefficient moves."""

    FIXED = "fixed"
    ADAPTIVE = "adaptive"  # Ziegler et al. 2019


@dataclass(frozen=True)
class RolloutConfig:
    """How the policy is sampled in an iteration."""

    prompts: int = 32  # a PPO iteration
    samples: int = 1  # a prompt
    max_prompt_tokens: int = 32
    max_tokens: int = 32  # of a response
    temperature: float = 1.0
    slots: int = 64
    strict: bool = True

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"rollout.temperature={self.temperature} must be positive")
        for name in ("prompts", "samples", "max_tokens", "slots"):
            require(getattr(self, name) >= 1, f"rollout.{name}={getattr(self, name)} must be at least 1")
        require(self.max_prompt_tokens >= 2, f"rollout.max_prompt_tokens={self.max_prompt_tokens} must be at least 2")


@dataclass(frozen=True)
class PpoConfig:
    """The update. Coefficients are per token, `missing_eos_penalty` per response."""

    iterations: int = 10
    epochs: int = 1
    gamma: float = 1.0
    lam: float = 0.95
    clip_low: float = 0.2
    clip_high: float = 0.2
    value_clip: float = 0.2
    kl_coefficient: float = 0.05
    kl_kind: KlKind = KlKind.K1
    kl_control: KlControl = KlControl.FIXED
    kl_target: float = 6.0  # nats a response, adaptive only
    kl_horizon: float = 10000.0  # responses, adaptive only
    stop_kl: float = 0.0  # end an iteration's update early past this mean approximate KL a token; 0 = never
    whiten_advantages: bool = True
    critic_lr: float = 0.0  # 0 = optim.lr
    critic_warmup: int = 0  # iterations that train the critic alone
    entropy_coefficient: float = 0.0
    missing_eos_penalty: float = 1.0  # subtracted from the score of a response that did not stop
    score_clip: float = 0.0  # 0 = off
    reward: str = MODEL  # a registered reward, or a task, whose score it then is
    advantage: str = "gae"  # a registered advantage
    policy_loss: str = "clip"  # a registered policy_loss

    def __post_init__(self) -> None:
        for name in ("iterations", "epochs"):
            require(getattr(self, name) >= 1, f"ppo.{name}={getattr(self, name)} must be at least 1")
        for name in ("gamma", "lam"):
            require(0 <= getattr(self, name) <= 1, f"ppo.{name}={getattr(self, name)} must be in [0, 1]")
        require(self.critic_lr >= 0, f"ppo.critic_lr={self.critic_lr} must not be negative; 0 = optim.lr")


@dataclass(frozen=True)
class EngineSpec:
    """What a role's engine is built from. Not a group of a recipe: the stage fills it in."""

    folder: str  # a Hugging Face folder: architecture and first weights
    micro_size: int  # rows of one forward on one data rank, in updates and in inference alike
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    temperature: float = 1.0  # of the rollout: it divides the logits of every log-prob
    optim: OptimConfig | None = None  # none = a role that only infers
    total_steps: int = 1  # of the schedule
    lora: LoraConfig | None = None  # what learns in place of the model
    seed: int = 0  # of a fresh adapter
