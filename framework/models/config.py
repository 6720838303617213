"""The architecture as data: every axis on which the decoder families of the field differ, one field each."""

from dataclasses import dataclass

from framework.core.config import Choice, require


class Position(Choice):
    """How a token knows its place."""

    ROTARY = "rotary"  # Su et al. 2021; rotate-half layout
    LEARNED = "learned"  # GPT-2
    NONE = "none"


class Norm(Choice):
    """Which normalisation."""

    RMS = "rms"  # Zhang & Sennrich 2019
    LAYER = "layer"  # Ba et al. 2016


class NormPlace(Choice):
    """Where a block normalises: before its sublayers, or after their residual sum."""

    PRE = "pre"
    POST = "post"


class Activation(Choice):
    """The feed-forward nonlinearity."""

    SWIGLU = "swiglu"  # Shazeer 2020
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. `vocab_size` 0 means "the tokenizer's"; 0 for `num_kv_heads`, `head_dim`,
    `intermediate_size` means the usual value derived from the others."""

    family: str = "llama"
    vocab_size: int = 0
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 0  # = num_heads
    head_dim: int = 0  # = hidden_size / num_heads
    intermediate_size: int = 0  # = 8/3 hidden_size up to a multiple of 32 (gated), else 4 hidden_size
    max_positions: int = 2048
    position: Position = Position.ROTARY
    rope_theta: float = 10000.0
    norm: Norm = Norm.RMS
    norm_place: NormPlace = NormPlace.PRE
    norm_eps: float = 1e-5
    activation: Activation = Activation.SWIGLU
    attention_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True
    init_std: float = 0.02

    def __post_init__(self) -> None:
        heads, kv = self.num_heads, self.num_kv_heads or self.num_heads
        require(min(heads, kv, self.num_layers, self.hidden_size) >= 1, "model sizes must be at least 1")
        require(
            self.head_dim > 0 or self.hidden_size % heads == 0,
            f"model.hidden_size={self.hidden_size} is not divisible by model.num_heads={heads}; "
            f"choose {_divisors(self.hidden_size)} heads, or set model.head_dim",
        )
        require(
            heads % kv == 0,
            f"model.num_heads={heads} is not divisible by model.num_kv_heads={kv}; choose {_divisors(heads)}",
        )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def feed_forward_size(self) -> int:
        if self.intermediate_size:
            return self.intermediate_size
        if self.activation is Activation.SWIGLU:
            return -(-self.hidden_size * 8 // (3 * 32)) * 32
        return 4 * self.hidden_size


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
