"""Llama and its descendants: rotary positions, RMS norms, SwiGLU. They differ in biases, windows, norms of q and k.

Llama 1 to 3 (Touvron et al. 2023, Dubey et al. 2024), Mistral (Jiang et al. 2023), Qwen2 and 2.5, Qwen3 (Yang et al.
2024, 2025), the latter two with experts in place of feed-forward blocks as well, GLM-4-9B and GLM-4-0414 (GLM team
2024). Left out: other mixtures (Mixtral, DeepSeek).
"""

from framework.core.registry import register
from framework.models.config import Activation, Bias, Norm, NormPlace, Position
from framework.models.families.family import Family
from framework.models.families.settings import SILU, Always, Experts, Key, Only, Rope, Setting, Window
from framework.models.families.tensors import Entry

_LAYER = "model.layers.{}."
_OUTER = (Entry("model.embed_tokens", ("embedding",)), Entry("model.norm", ("norm",)))
_ATTENTION = tuple(
    Entry(f"{_LAYER}self_attn.{theirs}", (f"layers.{{}}.attention.{ours}",))
    for ours, theirs in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}.items()
)
_QK_NORMS = tuple(Entry(f"{_LAYER}self_attn.{x}_norm", (f"layers.{{}}.attention.{x}_norm",)) for x in "qk")
_NORMS = (
    Entry(_LAYER + "input_layernorm", ("layers.{}.attention_norm",)),
    Entry(_LAYER + "post_attention_layernorm", ("layers.{}.mlp_norm",)),
)
_OUT_NORMS = (
    Entry(_LAYER + "post_self_attn_layernorm", ("layers.{}.attention_out_norm",)),
    Entry(_LAYER + "post_mlp_layernorm", ("layers.{}.mlp_out_norm",)),
)
_MLP = tuple(Entry(f"{_LAYER}mlp.{x}_proj", (f"layers.{{}}.mlp.{x}",)) for x in ("gate", "up", "down"))
_FUSED_MLP = (
    Entry(_LAYER + "mlp.gate_up_proj", ("layers.{}.mlp.gate", "layers.{}.mlp.up")),
    Entry(_LAYER + "mlp.down_proj", ("layers.{}.mlp.down",)),
)
_EXPERTS = (
    Entry(_LAYER + "mlp.gate", ("layers.{}.mlp.router",)),
    *(Entry(f"{_LAYER}mlp.experts.{{}}.{x}_proj", (f"layers.{{}}.mlp.experts.{x}",)) for x in ("gate", "up", "down")),
)
_SHARED = (
    Entry(_LAYER + "mlp.shared_expert_gate", ("layers.{}.mlp.shared_gate",)),
    *(Entry(f"{_LAYER}mlp.shared_expert.{x}_proj", (f"layers.{{}}.mlp.shared.{x}",)) for x in ("gate", "up", "down")),
)
_TABLE = (*_OUTER, *_ATTENTION, *_NORMS, *_MLP)


def _settings(eps: float, positions: int, kv: int, head_dim: int = 0, tied: bool = False) -> tuple[Setting, ...]:
    """What all of them say, with the defaults of one: 0 means the number of heads, and hidden / heads."""
    return (
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "hidden_size"),
        Key("num_layers", "num_hidden_layers"),
        Key("num_heads", "num_attention_heads"),
        Key("intermediate_size", "intermediate_size"),
        Key("num_kv_heads", "num_key_value_heads", kv),
        Key("head_dim", "head_dim", head_dim),
        Key("max_positions", "max_position_embeddings", positions),
        Key("norm_eps", "rms_norm_eps", eps),
        Key("tied", "tie_word_embeddings", tied),
        Key("init_std", "initializer_range", 0.02),
        SILU,
        Only("attention_dropout", 0.0),
    )


def _llama(**axes: object) -> Always:
    """The axes that none of them chooses, and those that one does not."""
    return Always(
        {"position": Position.ROTARY, "norm": Norm.RMS, "norm_place": NormPlace.PRE, "activation": Activation.SWIGLU}
        | axes
    )


_GLM = (
    *_settings(eps=1.5625e-07, positions=131072, kv=2, head_dim=128),
    Rope(fraction=0.5),
    Key("attention_bias", "attention_bias", Bias.QKV, {Bias.NONE: False, Bias.QKV: True}),
)

FAMILIES = (
    Family(
        "llama", "Llama", "model.", _TABLE,
        (
            *_settings(eps=1e-6, positions=2048, kv=0),
            Rope(),
            Key("attention_bias", "attention_bias", Bias.NONE, {Bias.NONE: False, Bias.ALL: True}),
            Key("mlp_bias", "mlp_bias", False),
            _llama(),
        ),
        derived=("rotary_emb.inv_freq",),
        covers="Llama 1 to 3.3, TinyLlama, SmolLM2",
    ),
    Family(
        "mistral", "Mistral", "model.", _TABLE,
        (*_settings(eps=1e-6, positions=131072, kv=8), Rope(), Window(), _llama()),
        derived=("rotary_emb.inv_freq",),
        covers="Mistral 7B",
    ),
    Family(
        "qwen2", "Qwen2", "model.", _TABLE,
        (
            *_settings(eps=1e-6, positions=32768, kv=32),
            Rope(),
            Window("use_sliding_window"),
            _llama(attention_bias=Bias.QKV),
        ),
        covers="Qwen1.5, Qwen2 and Qwen2.5, dense",
    ),
    Family(
        "qwen3", "Qwen3", "model.", (*_TABLE, *_QK_NORMS),
        (
            *_settings(eps=1e-6, positions=32768, kv=32, head_dim=128),
            Rope(),
            Window("use_sliding_window"),
            Key("attention_bias", "attention_bias", Bias.NONE, {Bias.NONE: False, Bias.ALL: True}),
            _llama(qk_norm=True),
        ),
        covers="Qwen3, dense",
    ),
    Family(
        "qwen2_moe", "Qwen2Moe", "model.", (*_TABLE, *_EXPERTS, *_SHARED),
        (
            *_settings(eps=1e-6, positions=32768, kv=16),
            Rope(),
            Only("use_sliding_window", False),
            Key("attention_bias", "qkv_bias", Bias.QKV, {Bias.NONE: False, Bias.QKV: True}),
            Experts(size=1408, experts=60, top_k=4, shared=5632),
            _llama(),
        ),
        covers="Qwen1.5-MoE, Qwen2-57B-A14B",
    ),
    Family(
        "qwen3_moe", "Qwen3Moe", "model.", (*_TABLE, *_QK_NORMS, *_EXPERTS),
        (
            *_settings(eps=1e-6, positions=32768, kv=4),
            Rope(),
            Only("use_sliding_window", False),
            Key("attention_bias", "attention_bias", Bias.NONE, {Bias.NONE: False, Bias.ALL: True}),
            Experts(size=768, experts=128, top_k=8),
            _llama(qk_norm=True),
        ),
        covers="Qwen3-30B-A3B, Qwen3-235B-A22B",
    ),
    Family(
        "glm", "Glm", "model.", (*_OUTER, *_ATTENTION, *_NORMS, *_FUSED_MLP),
        (*_GLM, _llama(rope_interleaved=True)),
        covers="GLM-4-9B, its folders for transformers (-hf)",
    ),
    Family(
        "glm4", "Glm4", "model.", (*_OUTER, *_ATTENTION, *_NORMS, *_OUT_NORMS, *_FUSED_MLP),
        (*_GLM, _llama(rope_interleaved=True, norm_place=NormPlace.SANDWICH)),
        covers="GLM-4-0414 and GLM-Z1-0414, 9B and 32B",
    ),
)  # fmt: skip
for _family in FAMILIES:
    register("family", _family.model_type)(_family)
