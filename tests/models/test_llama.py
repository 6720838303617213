"""The Llama table of names is a bijection over every parameter; a configuration survives the way there and back."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.models.config import ModelConfig
from framework.models.families.llama import Llama
from framework.models.init import parameter_shapes
from tests.models.drawn import TINY


def test_names_there_and_back() -> None:
    ours = list(parameter_shapes(replace(TINY, tied=False, attention_bias=True, mlp_bias=True, num_layers=11)))
    theirs = [Llama.their_name(name) for name in ours]
    assert len(set(theirs)) == len(ours)
    assert [Llama.our_name(name) for name in theirs] == ours
    assert Llama.their_name("layers.10.mlp.down.bias") == "model.layers.10.mlp.down_proj.bias"
    assert Llama.our_name("model.layers.10.mlp.experts.0.weight") is None
    with pytest.raises(KeyError):
        Llama.their_name("layers.0.mlp.experts.weight")


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 8), st.booleans(), st.booleans(), st.booleans(),
    st.floats(1.0, 1e6), st.floats(1e-8, 1e-3),
)  # fmt: skip
def test_configurations_there_and_back(
    kv: int, groups: int, size: int, tied: bool, attention_bias: bool, mlp_bias: bool, theta: float, eps: float
) -> None:
    config = ModelConfig(
        vocab_size=11, hidden_size=8 * kv * groups, num_heads=kv * groups, num_kv_heads=kv, head_dim=2 * size,
        intermediate_size=24, tied=tied, attention_bias=attention_bias, mlp_bias=mlp_bias, rope_theta=theta,
        norm_eps=eps, max_positions=99, init_std=0.01,
    )  # fmt: skip
    assert Llama.config_from(Llama.config_to(config, 0)) == config


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {
        "vocab_size": 7,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 5,
    }
    config, theirs = Llama.config_from(sizes), LlamaConfig(**sizes)
    assert theirs.rope_parameters is not None
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.tied == theirs.tie_word_embeddings
    assert config.max_positions == theirs.max_position_embeddings
    assert config.init_std == theirs.initializer_range
    assert (config.attention_bias, config.mlp_bias) == (theirs.attention_bias, theirs.mlp_bias)
    assert (config.kv_heads, config.head_size) == (theirs.num_key_value_heads, theirs.head_dim)


def test_older_configurations_keep_theta_at_the_top() -> None:
    theirs = Llama.config_to(replace(TINY, rope_theta=123.0), 0)
    del theirs["rope_parameters"]
    assert Llama.config_from(theirs).rope_theta == 123.0
