"""The architecture as data: every axis on which the families of the field differ, one field each.

Left out: capped logits, dropout.
"""

from dataclasses import dataclass, field, replace

from framework.core.config import Choice, require


class Architecture(Choice):
    """Which tokens of its document a token sees."""

    CAUSAL = "causal"  # those before it, and itself (Radford et al. 2018)
    PREFIX = "prefix"  # likewise, and all of the document's first part, which sees itself whole (Dong et al. 2019)
    ENCODER = "encoder"  # all of them (Devlin et al. 2018)
    ENCODER_DECODER = "encoder_decoder"  # those before it, and all that an encoder has read (Vaswani et al. 2017; T5)


class Position(Choice):
    """How a token knows its place."""

    ROTARY = "rotary"  # q and k turned by angles that grow with the position (Su et al. 2021)
    ROTARY_2D = "rotary_2d"  # one half of each head by the place in the text, the other by that in a hidden span (GLM)
    SINUSOIDAL = "sinusoidal"  # sin and cos of position / 10000^(2i/D), added to the embedding (Vaswani et al. 2017)
    LEARNED = "learned"  # a vector a position, added to the embedding (Radford et al. 2018)
    ALIBI = "alibi"  # -slope of the head x distance, added to the scores (Press et al. 2022)
    RELATIVE = "relative"  # a learned number a head and bucket of distances, added to the scores (Raffel et al. 2020)
    NONE = "none"  # it does not, but for the mask (Haviv et al. 2022)

    @property
    def adds_to_scores(self) -> bool:
        """A mask then is numbers, and not bools."""
        return self in (Position.ALIBI, Position.RELATIVE)


class Scaling(Choice):
    """How rotary frequencies are stretched for a context `factor` times longer than the original one.

    `turns` of a frequency: how often it goes round in the original context.
    """

    NONE = "none"  # as they are
    LINEAR = "linear"  # all frequencies / factor (Chen et al. 2023)
    LLAMA3 = "llama3"  # / factor below `slow` turns, kept above `fast`, blended by turns between (Llama 3.1)
    YARN = "yarn"  # likewise, blended by index, and cos and sin times `sharpness` (Peng et al. 2023, section 3)
    DYNAMIC = "dynamic"  # theta (factor L / original - factor + 1)^(R/(R-2)), L a longer document's length (NTK)


@dataclass(frozen=True)
class RopeScaling:
    """See `Scaling`; what a kind does not read is left alone."""

    kind: Scaling = Scaling.NONE
    factor: float = 1.0  # the longer context / the original one
    original_positions: int = 0  # the context that the frequencies were made for; llama3, yarn and dynamic
    slow: float = 1.0  # turns; llama3 and yarn
    fast: float = 0.0  # turns; 0 = 4 (llama3), 32 (yarn)
    sharpness: float = 0.0  # yarn; 0 = 1 + ln(factor) / 10

    def __post_init__(self) -> None:
        require(self.factor >= 1, f"model.rope_scaling.factor={self.factor} must be at least 1")
        blends = self.kind in (Scaling.LLAMA3, Scaling.YARN)
        require(
            not (blends or self.kind is Scaling.DYNAMIC) or self.original_positions > 0,
            f"model.rope_scaling.kind={self.kind} needs model.rope_scaling.original_positions: the context before it",
        )
        require(
            not blends or 0 < self.slow < self.upper,
            f"model.rope_scaling.slow={self.slow} must be between 0 and rope_scaling.fast={self.upper}",
        )

    @property
    def upper(self) -> float:
        """`fast`, or what it stands for."""
        return self.fast or (4.0 if self.kind is Scaling.LLAMA3 else 32.0)


class Norm(Choice):
    """Which normalisation."""

    RMS = "rms"  # x / rms(x) w (Zhang & Sennrich 2019)
    LAYER = "layer"  # (x - mean) / std w + b (Ba et al. 2016)


class NormPlace(Choice):
    """Where a block normalises; f is its attention, then its feed-forward."""

    PRE = "pre"  # x + f(norm(x)), and once more behind the last block (Radford et al. 2019)
    POST = "post"  # norm(x + f(x)) (Vaswani et al. 2017)
    SANDWICH = "sandwich"  # x + norm(f(norm(x))), and behind the last block (Ding et al. 2021; GLM-4-0414)
    SCALED = "scaled"  # n = norm(x), then a n + f(n), a = sqrt(2 num_layers), and behind the last block (ChatGLM-6B)
    DEEP = "deep"  # norm(a x + f(x)), a = (2 num_layers)^(1/4) (Wang et al. 2022, DeepNorm of a decoder)


class Activation(Choice):
    """The feed-forward block: down(act(up(x))), or with a gate down(act(gate(x)) up(x)) (Shazeer 2020)."""

    SWIGLU = "swiglu"  # gated; act = silu
    GEGLU = "geglu"  # gated; act = gelu
    GEGLU_TANH = "geglu_tanh"  # gated; act = gelu_tanh
    GELU = "gelu"  # x Phi(x) (Hendrycks & Gimpel 2016)
    GELU_TANH = "gelu_tanh"  # its approximation by tanh
    RELU = "relu"  # max(x, 0)

    @property
    def is_gated(self) -> bool:
        return self in (Activation.SWIGLU, Activation.GEGLU, Activation.GEGLU_TANH)


class Bias(Choice):
    """Which projections of attention have one."""

    NONE = "none"  # Llama, Mistral
    QKV = "qkv"  # Qwen2, GLM
    ALL = "all"  # GPT-2, BLOOM


@dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts in place of the feed-forward block: sum of p_e expert_e(x) over the top_k experts of largest
    p = softmax(router x) (Shazeer et al. 2017). No token is dropped. See `models.moe`."""

    experts: int = 0  # E, feed-forward blocks of which each token takes some; 0 = one block for all tokens
    top_k: int = 2  # how many each token takes (Shazeer et al. 2017; 1: Fedus et al. 2021)
    intermediate_size: int = 0  # of one expert; 0 = model.intermediate_size
    shared: int = 0  # intermediate size of a block beside them that every token takes (Dai et al. 2024); 0 = none
    shared_gate: bool = False  # it counts sigmoid(w x) times (Qwen2-MoE), else once (DeepSeekMoE)
    normalise: bool = True  # the chosen p are divided by their sum (Mixtral, Qwen3); else as they are (Qwen2-MoE)
    first: int = 0  # layers before this one have a plain block (DeepSeekMoE: 1)
    every: int = 1  # from there on layer i has experts where every divides i + 1 (GShard, Lepikhin et al. 2020: 2)
    balance: float = 0.0  # times sum of f_e P_e, a row's load-balance loss (DeepSeek-V3 2024, equations 17 to 20)

    def __post_init__(self) -> None:
        require(self.experts >= 0, f"model.moe.experts={self.experts} must not be negative; 0 = no mixture")
        require(
            self.experts == 0 or 1 <= self.top_k <= self.experts,
            f"model.moe.top_k={self.top_k} must be between 1 and model.moe.experts={self.experts}",
        )
        require(self.every >= 1, f"model.moe.every={self.every} must be at least 1: experts in every layer")
        require(self.balance >= 0, f"model.moe.balance={self.balance} must not be negative; 0 = no such loss")
        sizes = (self.intermediate_size, self.shared, self.first)
        require(min(sizes) >= 0, "model.moe.intermediate_size, shared and first must not be negative")
        require(self.shared > 0 or not self.shared_gate, "model.moe.shared_gate=true needs model.moe.shared: its size")

    def at(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts > 0 and layer >= self.first and (layer + 1) % self.every == 0


@dataclass(frozen=True)
class ModelConfig:
    """One transformer. `vocab_size` 0 means "the tokenizer's"; 0 for `num_kv_heads`, `head_dim`,
    `intermediate_size` means the usual value derived from the others."""

    architecture: Architecture = Architecture.CAUSAL
    family: str = "llama"  # in whose Hugging Face layout it is saved; `framework models` lists them
    vocab_size: int = 0  # V, rows of the embedding and of the head; a tokenizer may have fewer tokens, not more
    hidden_size: int = 128  # D, the width of the residual stream
    num_layers: int = 4  # blocks of attention and feed-forward (Vaswani et al. 2017)
    encoder_layers: int = 0  # of the encoder beside a decoder; 0 = num_layers
    num_heads: int = 4  # N: softmax(q k / sqrt(H)) v in each, then o (Vaswani et al. 2017, section 3.2)
    num_kv_heads: int = 0  # 0 = num_heads; fewer: each serves a group (Ainslie et al. 2023), 1: all (Shazeer 2019)
    head_dim: int = 0  # H; 0 = hidden_size / num_heads
    intermediate_size: int = 0  # 0 = 8/3 hidden_size up to a multiple of 32 (gated), else 4 hidden_size
    max_positions: int = 2048  # the context: how many learned positions there are; generation stops there
    position: Position = Position.ROTARY
    relative_buckets: int = (
        32  # half of them one distance each, half wider and wider; an encoder has them for both sides
    )
    relative_distance: int = 128  # from here on all distances share a bucket
    rope_theta: float = 10000.0  # frequency i turns by theta^(-2i/H) a position
    rope_fraction: float = 1.0  # the first part of each head that turns (GLM: a half)
    rope_interleaved: bool = False  # turn numbers 2i and 2i+1 together (GLM), not i and i+H/2
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    window: int = 0  # a token sees so many, itself included (Beltagy et al. 2020; Mistral); 0 = all before it
    window_from: int = 0  # the first layer with the window
    scaled_scores: bool = True  # q k / sqrt(head_dim); false: q k (T5)
    score_cap: float = 0.0  # scores s of attention become cap tanh(s / cap) (Gemma 2); 0 = as they are
    qk_norm: bool = False  # RMS norm of each head's q and k before they turn (Henry et al. 2020; Qwen3)
    norm: Norm = Norm.RMS
    norm_place: NormPlace = NormPlace.PRE
    norm_eps: float = 1e-5  # added to the mean square, or to the variance, under the root
    embedding_norm: bool = False  # of the embedded tokens, places and types added (BLOOM, BERT)
    token_types: int = 0  # rows of a table added to the embedding: which part of a pair a token is of (BERT: 2)
    activation: Activation = Activation.SWIGLU
    attention_bias: Bias = Bias.NONE
    mlp_bias: bool = False  # of the feed-forward's projections
    head_transform: bool = False  # logits = W norm(act(A x + a)) + b in place of W x (BERT)
    moe: MoeConfig = field(default_factory=MoeConfig)
    scaled_head: bool = False  # the head reads hidden / sqrt(hidden_size) (T5)
    tied: bool = True  # the head's matrix is the embedding's (Press & Wolf 2017)
    init_std: float = 0.02  # of drawn weights; those back into the residual stream / sqrt(2 num_layers) (GPT-2)

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
        require(self.score_cap >= 0, f"model.score_cap={self.score_cap} must not be negative; 0 = scores as they are")
        require(
            self.position is not Position.ROTARY_2D
            or (self.rope_fraction == 1 and self.architecture is Architecture.PREFIX),
            "model.position=rotary_2d goes with model.architecture=prefix and model.rope_fraction=1, got "
            f"{self.architecture} and {self.rope_fraction}",
        )
        require(self.window >= 0, f"model.window={self.window} must be at least 1; 0 means that all is seen")
        self._check_sight()
        require(
            0 < self.rope_fraction <= 1 and (not self.rotary_parts or self.turned_size % 2 == 0),
            f"model.rope_fraction={self.rope_fraction} of model.head_dim={self.head_size} must be an even number"
            + (" in each half" if self.rotary_parts == 2 else ""),
        )
        self._check_experts()
        self._check_stacks()
        require(
            not self.scales_by_length
            or (self.rotary_parts == 1 and self.turned_size > 2 and self.architecture != Architecture.ENCODER_DECODER),
            "model.rope_scaling.kind=dynamic goes with model.position=rotary that turns more than 2 numbers of a head, "
            f"and not with encoder_decoder; got {self.position}, {self.turned_size} and {self.architecture}",
        )

    def _check_stacks(self) -> None:
        """An encoder beside a decoder, and what both take from each other."""
        both = self.architecture is Architecture.ENCODER_DECODER
        require(both or self.encoder_layers == 0, "model.encoder_layers goes with model.architecture=encoder_decoder")
        unknown = {
            f"norm_place={self.norm_place}": self.norm_place is not NormPlace.PRE,
            "position=learned": self.position is Position.LEARNED,
            "embedding_norm=true": self.embedding_norm,
            f"token_types={self.token_types}": self.token_types > 0,
        }
        for axis, is_set in unknown.items():
            require(not (both and is_set), f"model.{axis} does not go with model.architecture=encoder_decoder")
        require(
            self.relative_buckets >= 4 and self.relative_buckets % 4 == 0,
            f"model.relative_buckets={self.relative_buckets} must be a multiple of 4",
        )
        require(
            self.relative_distance > self.relative_buckets // 2,
            f"model.relative_distance={self.relative_distance} must be more than half of model.relative_buckets="
            f"{self.relative_buckets}: that many distances have a bucket of their own",
        )

    def _check_experts(self) -> None:
        moe = self.moe
        require(
            moe.experts == 0 or (self.activation.is_gated and not self.mlp_bias),
            f"model.moe.experts={moe.experts} needs a gated model.activation and model.mlp_bias=false: experts have a "
            "gate and no bias",
        )
        require(
            moe.experts == 0 or any(map(moe.at, range(self.num_layers))),
            f"model.moe.first={moe.first} and model.moe.every={moe.every} leave none of model.num_layers="
            f"{self.num_layers} layers with experts",
        )

    def _check_sight(self) -> None:
        """Windows and linear biases are defined for what looks back alone."""
        looks_back = self.architecture is Architecture.CAUSAL
        for axis, is_set in (("window", self.window > 0), ("position=alibi", self.position is Position.ALIBI)):
            require(
                looks_back or not is_set,
                f"model.{axis} goes with model.architecture=causal alone, got {self.architecture}: whose tokens see "
                "what comes after them",
            )
        require(
            not self.head_transform or (self.architecture is Architecture.ENCODER and not self.activation.is_gated),
            f"model.head_transform=true goes with model.architecture=encoder and an activation without a gate, got "
            f"{self.architecture} and {self.activation}",
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
        if self.activation.is_gated:
            return -(-self.hidden_size * 8 // (3 * 32)) * 32
        return 4 * self.hidden_size

    @property
    def expert_size(self) -> int:
        """The intermediate size of one expert."""
        return self.moe.intermediate_size or self.feed_forward_size

    @property
    def turned_size(self) -> int:
        """How many numbers of a head (of each half of it, where there are two kinds) rotary positions turn."""
        return int(self.head_size // max(self.rotary_parts, 1) * self.rope_fraction)

    @property
    def rotary_parts(self) -> int:
        """By how many kinds of rotary positions a head turns, each its own share of it."""
        return {Position.ROTARY: 1, Position.ROTARY_2D: 2}.get(self.position, 0)

    @property
    def scales_by_length(self) -> bool:
        """Whether how far rotary positions turn depends on the length of the document."""
        return self.rope_scaling.kind is Scaling.DYNAMIC and self.rotary_parts > 0

    @property
    def encoder(self) -> "ModelConfig | None":
        """The stack beside a decoder that reads: of its sizes, on its embedding, seeing all."""
        if self.architecture is not Architecture.ENCODER_DECODER:
            return None
        layers = self.encoder_layers or self.num_layers
        return replace(
            self,
            architecture=Architecture.ENCODER,
            num_layers=layers,
            encoder_layers=0,
            tied=True,
            scaled_head=False,
        )

    @property
    def ends_with_norm(self) -> bool:
        return self.norm_place in (NormPlace.PRE, NormPlace.SANDWICH, NormPlace.SCALED)

    @property
    def residual_scale(self) -> float:
        """What is multiplied by it where a block adds to it: DeepNorm's alpha, and ChatGLM's."""
        powers = {NormPlace.DEEP: 0.25, NormPlace.SCALED: 0.5}
        return (2 * self.num_layers) ** powers.get(self.norm_place, 0.0)

    def windowed(self, layer: int) -> bool:
        """Whether a layer sees through the window."""
        return self.window > 0 and layer >= self.window_from

    def explicit(self) -> "ModelConfig":
        """The same model with every derived size written out."""
        inner = self.feed_forward_size
        moe = replace(self.moe, intermediate_size=self.expert_size) if self.moe.experts else MoeConfig()
        return replace(
            self,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_size,
            intermediate_size=inner,
            moe=moe,
            encoder_layers=self.encoder.num_layers if self.encoder else 0,
        )


class Base(Choice):
    """How the frozen matrices beside an adapter are held."""

    FULL = "full"  # as engine.precision says
    NF4 = "nf4"  # in 4 bits (QLoRA, Dettmers et al. 2023; models.quantised): those with an adapter, by bitsandbytes


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter beside a frozen model (Hu et al. 2021)."""

    rank: int = 0  # 0 = no adapter: all of the model learns
    alpha: float = 16.0  # the adapter's product is scaled by alpha / rank
    rslora: bool = False  # by alpha / sqrt(rank) (Kalajdzievski 2023)
    targets: list[str] = field(default_factory=list)  # [q, k, v, o, gate, up, down]; empty = all of them
    also: list[str] = field(default_factory=list)  # parts that learn in full beside it: [embedding, head]
    dora: bool = False  # each row of a matrix has a length that learns beside its direction (Liu et al. 2024)
    base: Base = Base.FULL
    dropout: float = 0.0  # the share of the adapter's inputs that training leaves out; what is frozen sees all of them

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"lora.rank={self.rank} must not be negative; 0 = no adapter")
        require(self.alpha > 0, f"lora.alpha={self.alpha} must be positive")
        require(
            self.base is Base.FULL or (self.rank > 0 and not self.dora),
            f"lora.base={self.base} is for a base beside an adapter without lora.dora, whose lengths are those of the "
            f"whole numbers; got lora.rank={self.rank}, lora.dora={str(self.dora).lower()}",
        )
        require(0 <= self.dropout < 1, f"lora.dropout={self.dropout} must be in [0, 1)")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
