"""Configurations there and back, transformers' defaults for absent keys, published configurations and their sizes."""

from dataclasses import replace
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.core.errors import UsageError
from framework.core.registry import lookup
from framework.models.config import Bias, ModelConfig, RopeScaling, Scaling
from framework.models.families import gpt, llama
from framework.models.families.family import Family
from framework.models.families.settings import REQUIRED, Key
from framework.models.init import parameter_shapes
from tests.models.drawn import TINY

FAMILIES = (*llama.FAMILIES, *gpt.FAMILIES)
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
_LLAMA = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}
_SMALL = {"tie_word_embeddings": True}
# family -> (what its config.json says, parameters as published)
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama-2-7b": ("llama", _LLAMA | {"vocab_size": 32000, "intermediate_size": 11008}, 6_738_415_616),
    "llama-3-8b": (
        "llama", _LLAMA | {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}, 8_030_261_248
    ),
    "llama-3.2-1b": (
        "llama",
        {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
             "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64} | _SMALL,
        1_235_814_400,
    ),
    "tinyllama": (
        "llama",
        {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
             "num_attention_heads": 32, "num_key_value_heads": 4},
        1_100_048_384,
    ),
    "mistral-7b": ("mistral", _LLAMA | {"vocab_size": 32000, "intermediate_size": 14336}, 7_241_732_096),
    "qwen2-0.5b": (
        "qwen2",
        {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2} | _SMALL,
        494_032_768,
    ),
    "qwen2.5-7b": (
        "qwen2",
        {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
             "num_attention_heads": 28, "num_key_value_heads": 4},
        7_615_616_512,
    ),
    "qwen3-0.6b": (
        "qwen3",
        {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
             "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128} | _SMALL,
        596_049_920,
    ),
    "glm-4-9b": (
        "glm", {"vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40,
                    "num_attention_heads": 32}, 9_399_951_360,
    ),
    "gpt": ("openai-gpt", {"vocab_size": 40478, "n_embd": 768, "n_layer": 12, "n_head": 12}, 116_534_784),
    "gpt2": ("gpt2", {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}, 124_439_808),
    "gpt2-medium": ("gpt2", {"vocab_size": 50257, "n_embd": 1024, "n_layer": 24, "n_head": 16}, 354_823_168),
    "gpt2-large": ("gpt2", {"vocab_size": 50257, "n_embd": 1280, "n_layer": 36, "n_head": 20}, 774_030_080),
    "gpt2-xl": ("gpt2", {"vocab_size": 50257, "n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
    "bloom-560m": (
        "bloom", {"vocab_size": 250880, "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16}, 559_214_592
    ),
}  # fmt: skip


def settings_of(family: Family) -> dict[str, Any]:
    """The keys that a configuration must have, small."""
    sizes = {"vocab_size": 7, "hidden_size": 64, "num_layers": 2, "num_heads": 32, "intermediate_size": 5}
    required = [k for k in family.settings if isinstance(k, Key) and k.default is REQUIRED]
    return {key.theirs: sizes[key.ours] for key in required}


@families
def test_absent_keys_have_the_defaults_of_transformers(family: Family) -> None:
    theirs = getattr(transformers, f"{family.name}Config")(**settings_of(family), pad_token_id=None)
    said = {k: v for k, v in theirs.to_dict().items() if not k.endswith("_token_id")}
    assert family.config_from(settings_of(family)).explicit() == family.config_from(said).explicit()


@pytest.mark.parametrize(("name", "theirs", "number"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_sizes_are_exact(name: str, theirs: dict[str, Any], number: int) -> None:
    config = lookup("family", name).config_from(theirs)
    shapes = parameter_shapes(config).values()
    assert sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes) == number


@families
def test_a_size_that_is_missing_or_no_number_is_named(family: Family) -> None:
    theirs = settings_of(family)
    for key in theirs:
        with pytest.raises(UsageError, match=f"does not say {key}"):
            family.config_from({k: v for k, v in theirs.items() if k != key})
    for change, message in (
        ({"vocab_size": "7"}, "vocab_size='7': sizes are whole numbers"),
        ({"initializer_range": "wide"}, "initializer_range='wide' is not a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 is not true or false"),
    ):
        with pytest.raises(UsageError, match=message):
            family.config_from(theirs | change)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_llamas_there_and_back(data: st.DataObject) -> None:
    kv, groups, size = (data.draw(st.integers(1, 4)) for _ in range(3))
    scaling = data.draw(
        st.sampled_from([
            RopeScaling(),
            RopeScaling(Scaling.LINEAR, 2.5),
            RopeScaling(Scaling.LLAMA3, 8.0, 8192, 1.0, 4.0),
            RopeScaling(Scaling.YARN, 4.0, 32768, 1.0, 32.0),
            RopeScaling(Scaling.YARN, 4.0, 32768, 2.0, 16.0, 1.5),
            RopeScaling(Scaling.DYNAMIC, 3.0, 99),
        ])
    )  # fmt: skip
    config = ModelConfig(
        vocab_size=11, hidden_size=8 * kv * groups, num_heads=kv * groups, num_kv_heads=kv, head_dim=2 + 2 * size,
        intermediate_size=24, max_positions=99, init_std=0.01, tied=data.draw(st.booleans()),
        attention_bias=data.draw(st.sampled_from([Bias.NONE, Bias.ALL])), mlp_bias=data.draw(st.booleans()),
        rope_theta=data.draw(st.floats(1.5, 1e6)), norm_eps=data.draw(st.floats(1e-8, 1e-3)), rope_scaling=scaling,
    )  # fmt: skip
    family = lookup("family", "llama")
    theirs = family.config_to(config)
    assert family.config_from(theirs) == config
    older = {k: v for k, v in theirs.items() if k != "rope_parameters"}
    assert family.config_from(older) == config


def test_what_a_layout_cannot_say_is_named_with_what_would_be_read() -> None:
    for family, config, message in (
        ("llama", replace(TINY, window=8), r"Llama layout cannot hold model\.window=8; it would be read as 0"),
        ("mistral", replace(TINY, window=8, window_from=1), r"model\.window_from=1; it would be read as 0"),
        ("llama", replace(TINY, attention_bias=Bias.QKV), r"model\.attention_bias=qkv; it would be read as none"),
        ("gpt2", TINY, "GPT2 layout cannot hold model"),
        (
            "llama",
            replace(TINY, rope_scaling=RopeScaling(Scaling.DYNAMIC, 2.0, 64)),
            r"rope_scaling=\('dynamic', 2\.0, 64, .*; it would be read as \('dynamic', 2\.0, 2048, ",
        ),
        ("glm", replace(TINY, rope_interleaved=True, qk_norm=True), r"model\.qk_norm=True; it would be read as False"),
    ):
        with pytest.raises(UsageError, match=message):
            lookup("family", family).config_to(replace(config, family=family))


def test_layers_whose_kinds_alternate_are_refused() -> None:
    theirs = settings_of(lookup("family", "qwen3")) | {"sliding_window": 4}
    theirs |= {"use_sliding_window": True, "max_window_layers": 0}
    with pytest.raises(UsageError, match="layer_types"):
        lookup("family", "qwen3").config_from(theirs | {"layer_types": ["full_attention", "sliding_attention"]})
