"""The optimizer and its learning-rate schedule."""

import math
from dataclasses import dataclass

from framework.core.config import Choice, require


class Schedule(Choice):
    """Shapes of the learning rate over the steps."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"
    WSD = "wsd"  # warm-up, stable, decay (Hu et al. 2024, MiniCPM)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) with global-norm clipping. `warmup` and `decay` are shares of all steps when
    below 1, else numbers of steps. `final_lr` is a share of `lr`."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only; norms, biases and embeddings are left alone
    clip: float = 1.0  # global gradient norm; 0 = do not clip
    schedule: Schedule = Schedule.COSINE
    warmup: float = 0.02
    decay: float = 0.2  # wsd only
    final_lr: float = 0.1

    def __post_init__(self) -> None:
        require(0 <= self.lr < math.inf, f"optim.lr={self.lr} must be finite and not negative")
        require(self.clip >= 0, f"optim.clip={self.clip} must not be negative; 0 = do not clip")
        require(
            0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, f"optim betas {self.beta1}, {self.beta2} must be in [0, 1)"
        )
        require(self.eps > 0, f"optim.eps={self.eps} must be positive")
        for name in ("warmup", "decay"):
            require(getattr(self, name) >= 0, f"optim.{name}={getattr(self, name)} must not be negative")
