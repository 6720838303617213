"""The Hugging Face Llama layout: tensor names and config.json, both ways. What is not supported is refused."""

import re
from collections.abc import Mapping
from typing import Any

from framework.core.errors import UsageError
from framework.core.registry import register
from framework.models.config import Activation, ModelConfig, Norm, NormPlace, Position

_OUTER = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "class_head.weight": "score.weight",
}
_INNER = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_OUTER_BACK = {theirs: ours for ours, theirs in _OUTER.items()}
_INNER_BACK = {theirs: ours for ours, theirs in _INNER.items()}
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# What the layout can say of our axes; the defaults of LlamaConfig stand in config_from.
_FIXED = {
    "position": Position.ROTARY,
    "norm": Norm.RMS,
    "norm_place": NormPlace.PRE,
    "activation": Activation.SWIGLU,
}


@register("family", "llama")
class Llama:
    """LlamaForCausalLM and LlamaForSequenceClassification."""

    model_type = "llama"

    @staticmethod
    def their_name(name: str) -> str:
        """layers.0.attention.q.weight -> model.layers.0.self_attn.q_proj.weight. An unknown name is a KeyError."""
        if name in _OUTER:
            return _OUTER[name]
        prefix, inner, leaf = _split(name, r"(layers\.\d+)\.")
        return f"model.{prefix}.{_INNER[inner]}.{leaf}"

    @staticmethod
    def our_name(name: str) -> str | None:
        """The inverse of `their_name`; None for a name that the layout does not have."""
        if name in _OUTER_BACK:
            return _OUTER_BACK[name]
        try:
            prefix, inner, leaf = _split(name, r"model\.(layers\.\d+)\.")
            return f"{prefix}.{_INNER_BACK[inner]}.{leaf}"
        except KeyError:
            return None

    @staticmethod
    def is_derived(name: str) -> bool:
        """Whether an old checkpoint stores under `name` what is computed here: rotary frequencies."""
        return name.endswith("rotary_emb.inv_freq")

    @staticmethod
    def config_from(theirs: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig, with LlamaConfig's defaults for absent keys; UsageError for what we lack."""
        missing = [key for key in _SIZES if key not in theirs]
        if missing:
            raise UsageError(f"config.json does not say {', '.join(missing)}")
        wrong = [f"{key}={theirs[key]!r}" for key in _SIZES if type(theirs[key]) is not int]
        if wrong:
            raise UsageError(f"config.json: {', '.join(wrong)}: sizes are whole numbers")
        _refuse_unsupported(theirs)
        return ModelConfig(
            family="llama",
            vocab_size=theirs["vocab_size"],
            hidden_size=theirs["hidden_size"],
            num_layers=theirs["num_hidden_layers"],
            num_heads=theirs["num_attention_heads"],
            num_kv_heads=theirs.get("num_key_value_heads") or 0,
            head_dim=theirs.get("head_dim") or 0,
            intermediate_size=theirs["intermediate_size"],
            max_positions=theirs.get("max_position_embeddings", 2048),
            rope_theta=float(_rope(theirs).get("rope_theta", theirs.get("rope_theta", 10000.0))),
            norm_eps=theirs.get("rms_norm_eps", 1e-6),
            attention_bias=theirs.get("attention_bias", False),
            mlp_bias=theirs.get("mlp_bias", False),
            tied=theirs.get("tie_word_embeddings", False),
            init_std=theirs.get("initializer_range", 0.02),
        )

    @staticmethod
    def config_to(config: ModelConfig, classes: int) -> dict[str, Any]:
        """ModelConfig -> config.json, of the causal model or, where `classes` > 0, of the classifier."""
        for axis, value in _FIXED.items():
            if getattr(config, axis) is not value:
                raise UsageError(
                    f"the Llama layout cannot hold model.{axis}={getattr(config, axis)}; it is always {value}"
                )
        theirs: dict[str, Any] = {
            "architectures": ["LlamaForSequenceClassification" if classes else "LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.feed_forward_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_size,
            "hidden_act": "silu",
            "max_position_embeddings": config.max_positions,
            "rope_theta": config.rope_theta,  # transformers 4
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5
            "rms_norm_eps": config.norm_eps,
            "attention_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
            "tie_word_embeddings": config.tied,
            "initializer_range": config.init_std,
        }
        if classes:
            theirs |= {"id2label": {str(i): f"LABEL_{i}" for i in range(classes)}}
            theirs |= {"label2id": {f"LABEL_{i}": i for i in range(classes)}}
        return theirs


def _split(name: str, prefix: str) -> tuple[str, str, str]:
    match = re.fullmatch(prefix + r"(.+)\.(weight|bias)", name)
    if match is None:
        raise KeyError(name)
    return match[1], match[2], match[3]


def _rope(theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    return theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}


def _refuse_unsupported(theirs: Mapping[str, Any]) -> None:
    rope = _rope(theirs)
    kind = rope.get("rope_type", rope.get("type", "default"))
    found = {
        f"rope scaling '{kind}'": kind != "default",
        f"partial_rotary_factor={rope.get('partial_rotary_factor')}": rope.get("partial_rotary_factor", 1.0) != 1.0,
        f"hidden_act={theirs.get('hidden_act')}": theirs.get("hidden_act", "silu") != "silu",
        f"attention_dropout={theirs.get('attention_dropout')}": bool(theirs.get("attention_dropout")),
        "quantization_config": bool(theirs.get("quantization_config")),
    }
    refused = [what for what, is_there in found.items() if is_there]
    if refused:
        raise UsageError(f"config.json asks for {', '.join(refused)}, which the llama family here does not compute")
