"""ChatGLM-6B (GLM: Du et al. 2022): a prefix seen whole, two kinds of rotary positions, residuals behind the norms.

transformers has no such class: a folder is read and written by the names of its own code, and held against a model
worked out anew in the tests, not against theirs. Later ChatGLMs go by the same `model_type` and are another model; of
GLM-4 the folders made for transformers are read (family glm). Left out: generation, and its tokenizer.
"""

from dataclasses import dataclass
from typing import Any

from framework.core.errors import UsageError
from framework.core.registry import register
from framework.models.config import Activation, Architecture, Bias, ModelConfig, Norm, NormPlace, Position
from framework.models.families.family import Family
from framework.models.families.settings import Always, Key, Keys, Only
from framework.models.families.tensors import Entry

_LAYER = "transformer.layers.{}."
_TABLE = (
    Entry("transformer.word_embeddings", ("embedding",)),
    Entry(_LAYER + "input_layernorm", ("layers.{}.attention_norm",)),
    Entry(_LAYER + "attention.query_key_value", tuple(f"layers.{{}}.attention.{x}" for x in "qkv"), by_head=True),
    Entry(_LAYER + "attention.dense", ("layers.{}.attention.o",)),
    Entry(_LAYER + "post_attention_layernorm", ("layers.{}.mlp_norm",)),
    Entry(_LAYER + "mlp.dense_h_to_4h", ("layers.{}.mlp.up",)),
    Entry(_LAYER + "mlp.dense_4h_to_h", ("layers.{}.mlp.down",)),
    Entry("transformer.final_layernorm", ("norm",)),
)


@dataclass(frozen=True)
class FirstGeneration:
    """Nothing but a refusal of what came later under the same name."""

    def read(self, theirs: Keys) -> dict[str, Any]:
        """See `settings.Setting`."""
        if "multi_query_attention" in theirs or "ffn_hidden_size" in theirs:
            raise UsageError(
                "config.json is of ChatGLM2, ChatGLM3 or GLM-4, which are another model than ChatGLM-6B; of GLM-4 take "
                "the folder for transformers (-hf)"
            )
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See `settings.Setting`."""
        return {}


CHATGLM = Family(
    "chatglm",
    "ChatGLM",
    "transformer.",
    _TABLE,
    (
        FirstGeneration(),
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "hidden_size"),
        Key("num_layers", "num_layers"),
        Key("num_heads", "num_attention_heads"),
        Key("intermediate_size", "inner_hidden_size"),
        Key("max_positions", "max_sequence_length", 2048),
        Key("norm_eps", "layernorm_epsilon", 1e-5),
        Key("tied", "tie_word_embeddings", True),
        Only("position_encoding_2d", True),
        Only("quantization_bit", 0),
        Always(
            {
                "architecture": Architecture.PREFIX,
                "position": Position.ROTARY_2D,
                "norm": Norm.LAYER,
                "norm_place": NormPlace.SCALED,
                "activation": Activation.GELU_TANH,
                "attention_bias": Bias.ALL,
                "mlp_bias": True,
            }
        ),
    ),
    causal="{}Model",
    derived=("rotary_emb.inv_freq",),
    covers="ChatGLM-6B, its architecture and weights",
)
register("family", CHATGLM.model_type)(CHATGLM)
