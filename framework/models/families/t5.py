"""T5 (Raffel et al. 2020) and its version 1.1 (Shazeer 2020): an encoder and a decoder on one embedding, RMS norms,
relative positions, no biases, scores without a scale.

In version 1.0 the head is the embedding and reads hidden / sqrt(D), in 1.1 it stands apart and reads hidden. Their rate
of dropout is a training's, and is not taken over.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from framework.core.registry import register
from framework.models.config import Activation, Architecture, Bias, ModelConfig, Norm, NormPlace, Position
from framework.models.families.family import Family
from framework.models.families.settings import Always, Key, Keys
from framework.models.families.tensors import Entry, Place, Shape, pieces


def _attention(theirs: str, ours: str) -> tuple[Entry, ...]:
    return tuple(Entry(f"{theirs}.{x}", (f"{ours}.{x}",)) for x in "qkvo")


def _stack(theirs: str, ours: str, last: int, feed_forward: Mapping[str, str]) -> tuple[Entry, ...]:
    """One of the two: its blocks end in the feed-forward part, their part `last`."""
    block = f"{theirs}.block.{{}}.layer."
    layer = f"{ours}layers.{{}}."
    return (
        Entry(f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias", (f"{ours}relative",)),
        Entry(f"{block}0.layer_norm", (f"{layer}attention_norm",)),
        *_attention(f"{block}0.SelfAttention", f"{layer}attention"),
        Entry(f"{block}{last}.layer_norm", (f"{layer}mlp_norm",)),
        *(Entry(f"{block}{last}.DenseReluDense.{x}", (f"{layer}mlp.{y}",)) for x, y in feed_forward.items()),
        Entry(f"{theirs}.final_layer_norm", (f"{ours}norm",)),
    )


def _table(feed_forward: Mapping[str, str]) -> tuple[Entry, ...]:
    across = "decoder.block.{}.layer.1."
    return (
        Entry("shared", ("embedding",)),
        *_stack("encoder", "encoder.", 1, feed_forward),
        *_stack("decoder", "", 2, feed_forward),
        Entry(f"{across}layer_norm", ("layers.{}.cross_norm",)),
        *_attention(f"{across}EncDecAttention", "layers.{}.cross"),
    )


_PLAIN = _table({"wi": "up", "wo": "down"})
_GATED = _table({"wi_0": "gate", "wi_1": "up", "wo": "down"})


@dataclass(frozen=True)
class T5(Family):
    """Its second matrix has another name where there is a gate."""

    def pieces(self, shapes: Mapping[str, Shape], heads: int) -> dict[str, Place]:
        """See `Family`."""
        gated = any(name.endswith("mlp.gate.weight") for name in shapes)
        return pieces((*(_GATED if gated else _PLAIN), *self.heads), shapes, heads)


@dataclass(frozen=True)
class Stacks:
    """Their `num_layers` are the encoder's; a decoder that is not mentioned has as many."""

    def read(self, theirs: Keys) -> dict[str, Any]:
        """See `settings.Setting`."""
        number = Key("encoder_layers", "num_layers").read(theirs)
        return number | Key("num_layers", "num_decoder_layers", number["encoder_layers"]).read(theirs)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See `settings.Setting`."""
        return {"num_layers": config.explicit().encoder_layers, "num_decoder_layers": config.num_layers}


@dataclass(frozen=True)
class Head:
    """`scale_decoder_outputs`, which older files leave to `tie_word_embeddings`."""

    def read(self, theirs: Keys) -> dict[str, Any]:
        """See `settings.Setting`."""
        tied = Key("tied", "tie_word_embeddings", True).read(theirs)
        return tied | Key("scaled_head", "scale_decoder_outputs", tied["tied"]).read(theirs)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See `settings.Setting`."""
        return {"tie_word_embeddings": config.tied, "scale_decoder_outputs": config.scaled_head}


_SETTINGS = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "d_model"),
    Key("head_dim", "d_kv"),
    Key("intermediate_size", "d_ff"),
    Key("num_heads", "num_heads"),
    Stacks(),
    Key("max_positions", "n_positions", 512),
    Key("relative_buckets", "relative_attention_num_buckets", 32),
    Key("relative_distance", "relative_attention_max_distance", 128),
    Key("norm_eps", "layer_norm_epsilon", 1e-6),
    Key(
        "activation",
        "feed_forward_proj",
        Activation.RELU,
        {Activation.RELU: "relu", Activation.GEGLU_TANH: "gated-gelu", Activation.SWIGLU: "gated-silu"},
    ),
    Head(),
    Always(
        {
            "architecture": Architecture.ENCODER_DECODER,
            "position": Position.RELATIVE,
            "scaled_scores": False,
            "norm": Norm.RMS,
            "norm_place": NormPlace.PRE,
            "attention_bias": Bias.NONE,
            "mlp_bias": False,
        }
    ),
)

FAMILY = T5(
    "t5",
    "T5",
    "",
    _PLAIN,
    _SETTINGS,
    causal="{}ForConditionalGeneration",
    derived=("coder.embed_tokens.weight",),
    covers="T5, T5 1.1, LM-adapted T5, Flan-T5",
)
register("family", FAMILY.model_type)(FAMILY)
