"""GPT-1, GPT-2 and BLOOM: layer norms, biases everywhere, a plain feed-forward, q, k and v in one matrix.

GPT-1 (Radford et al. 2018) normalises behind its blocks, GPT-2 (Radford et al. 2019) in front of them; BLOOM
(BigScience 2022) has linear biases in place of learned positions. Their rates of dropout are a training's, and are not
taken over.
"""

from framework.core.registry import register
from framework.models.config import Activation, Bias, Norm, NormPlace, Position
from framework.models.families.family import Family
from framework.models.families.settings import GELU_NAMES, Always, Key, Only
from framework.models.families.tensors import Entry

_QKV = tuple(f"layers.{{}}.attention.{x}" for x in "qkv")
_GPT_LAYER = (
    Entry("transformer.h.{}.ln_1", ("layers.{}.attention_norm",)),
    Entry("transformer.h.{}.ln_2", ("layers.{}.mlp_norm",)),
    Entry("transformer.h.{}.attn.c_attn", _QKV, transposed=True),
    Entry("transformer.h.{}.attn.c_proj", ("layers.{}.attention.o",), transposed=True),
    Entry("transformer.h.{}.mlp.c_fc", ("layers.{}.mlp.up",), transposed=True),
    Entry("transformer.h.{}.mlp.c_proj", ("layers.{}.mlp.down",), transposed=True),
)
_BLOOM_LAYER = (
    Entry("transformer.h.{}.input_layernorm", ("layers.{}.attention_norm",)),
    Entry("transformer.h.{}.post_attention_layernorm", ("layers.{}.mlp_norm",)),
    Entry("transformer.h.{}.self_attention.query_key_value", _QKV, by_head=True),
    Entry("transformer.h.{}.self_attention.dense", ("layers.{}.attention.o",)),
    Entry("transformer.h.{}.mlp.dense_h_to_4h", ("layers.{}.mlp.up",)),
    Entry("transformer.h.{}.mlp.dense_4h_to_h", ("layers.{}.mlp.down",)),
)
_COMMON = {"norm": Norm.LAYER, "attention_bias": Bias.ALL, "mlp_bias": True}
_GPT = (
    Key("vocab_size", "vocab_size"),
    Key("num_layers", "n_layer", also="num_hidden_layers"),
    Key("num_heads", "n_head", also="num_attention_heads"),
    Key("norm_eps", "layer_norm_epsilon", 1e-5),
    Key("init_std", "initializer_range", 0.02),
    Key("tied", "tie_word_embeddings", True),
)

FAMILIES = (
    Family(
        "openai-gpt", "OpenAIGPT", "transformer.",
        (
            Entry("transformer.tokens_embed", ("embedding",)),
            Entry("transformer.positions_embed", ("position_embedding",)),
            *_GPT_LAYER,
        ),
        (
            *_GPT,
            Key("hidden_size", "n_embd", also="hidden_size"),
            Key("max_positions", "n_positions", 512),
            # their "gelu" is the approximation by tanh
            Key("activation", "afn", Activation.GELU_TANH, {Activation.GELU_TANH: "gelu", Activation.RELU: "relu"}),
            Always(_COMMON | {"position": Position.LEARNED, "norm_place": NormPlace.POST}),
        ),
        causal="{}LMHeadModel",
        derived=(".attn.bias", "position_ids"),
        covers="GPT-1",
    ),
    Family(
        "gpt2", "GPT2", "transformer.",
        (
            Entry("transformer.wte", ("embedding",)),
            Entry("transformer.wpe", ("position_embedding",)),
            Entry("transformer.ln_f", ("norm",)),
            *_GPT_LAYER,
        ),
        (
            *_GPT,
            Key("hidden_size", "n_embd", also="hidden_size"),
            Key("intermediate_size", "n_inner", 0),
            Key("max_positions", "n_positions", 1024),
            Key("activation", "activation_function", Activation.GELU_TANH, GELU_NAMES),
            Only("scale_attn_weights", True),
            Only("scale_attn_by_inverse_layer_idx", False),
            Only("add_cross_attention", False),
            Always(_COMMON | {"position": Position.LEARNED, "norm_place": NormPlace.PRE}),
        ),
        causal="{}LMHeadModel",
        derived=(".attn.bias", ".attn.masked_bias"),
        covers="GPT-2, small to XL",
    ),
    Family(
        "bloom", "Bloom", "transformer.",
        (
            Entry("transformer.word_embeddings", ("embedding",)),
            Entry("transformer.word_embeddings_layernorm", ("embedding_norm",)),
            Entry("transformer.ln_f", ("norm",)),
            *_BLOOM_LAYER,
        ),
        (
            *_GPT,
            Key("hidden_size", "hidden_size", also="n_embed"),
            Key("max_positions", "seq_length", 2048),
            Only("apply_residual_connection_post_layernorm", False),
            Always(
                _COMMON
                | {"position": Position.ALIBI, "norm_place": NormPlace.PRE, "activation": Activation.GELU_TANH}
                | {"embedding_norm": True}
            ),
        ),
        covers="BLOOM, 560M to 176B",
    ),
)  # fmt: skip
for _family in FAMILIES:
    register("family", _family.model_type)(_family)
