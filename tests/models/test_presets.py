"""Presets against what was published: exact parameter counts, transformers' defaults, config.json there and back."""

from math import prod

import pytest
import torch
import transformers

from framework.core.errors import UsageError
from framework.core.registry import lookup
from framework.models.init import parameter_shapes
from framework.models.presets import preset, presets
from framework.planning.parameters import active_parameters, num_parameters
from tests.models.families.test_settings import PUBLISHED

OURS = {"tiny", "124m", "350m", "1b"}  # sizes of nobody's model
COUNTS = {name: number for name, (_, _, number) in PUBLISHED.items() if name != "tinyllama"} | {
    "llama-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "glm-4-0414-9b": 9_400_279_040,
    "bloom-7b": 7_069_016_064,
    "smollm2-135m": 134_515_008,
    "bert-base-uncased": 109_514_298,  # with the head for hidden tokens
    "bert-large-uncased": 335_174_458,
    "bert-base-chinese": 102_290_312,
    "t5-small": 60_506_624,
    "chatglm-6b": 6_173_286_400,
    "t5-base": 222_903_552,
    "t5-v1_1-small": 76_961_152,
}


def test_every_preset_is_held_against_a_published_number() -> None:
    assert set(presets()) - OURS == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    assert sum(map(prod, parameter_shapes(preset(name)).values())) == COUNTS[name]
    assert num_parameters(preset(name)) == COUNTS[name]


def test_what_a_token_meets_of_a_mixture() -> None:
    """Published as 30.5B and 3.3B; transformers' own model has as many. 120 of 128 experts stand idle in 48 layers."""
    model = preset("qwen3-30b-a3b")
    config = transformers.Qwen3MoeConfig(**lookup("family", model.family).config_to(model))
    with torch.device("meta"):
        theirs = transformers.Qwen3MoeForCausalLM(config)
    assert sum(p.numel() for p in theirs.parameters()) == COUNTS["qwen3-30b-a3b"]
    assert active_parameters(model) == COUNTS["qwen3-30b-a3b"] - 48 * 120 * 3 * 2048 * 768 == 3_353_032_704
    assert active_parameters(preset("qwen3-8b")) == COUNTS["qwen3-8b"]


@pytest.mark.parametrize("name", sorted(set(COUNTS) | OURS))
def test_a_preset_survives_its_family_s_config_json(name: str) -> None:
    model = preset(name)
    family = lookup("family", model.family)
    assert family.config_from(family.config_to(model)).explicit() == model.explicit()


@pytest.mark.parametrize(
    ("name", "kind"), [("gpt", "OpenAIGPT"), ("gpt2", "GPT2"), ("llama-7b", "Llama"), ("bert-base-uncased", "Bert")]
)
def test_a_preset_is_the_model_that_transformers_defaults_to(name: str, kind: str) -> None:
    theirs = getattr(transformers, f"{kind}Config")().to_dict()
    assert lookup("family", preset(name).family).config_from(theirs).explicit() == preset(name).explicit()


def test_what_published_models_of_one_shape_differ_in() -> None:
    """Counts cannot see these: contexts, windows, rotary bases and scalings."""
    llama31, llama32, mistral = preset("llama-3.1-8b"), preset("llama-3.2-1b"), preset("mistral-7b")
    assert (llama31.rope_scaling.factor, llama32.rope_scaling.factor) == (8, 32)
    assert (mistral.window, mistral.max_positions) == (4096, 32768)
    contexts = {"llama-7b": 2048, "llama-2-7b": 4096, "llama-3-8b": 8192, "qwen3-8b": 40960, "smollm2-135m": 8192}
    assert {name: preset(name).max_positions for name in contexts} == contexts
    thetas = {"llama-2-13b": 1e4, "llama-3-8b": 5e5, "qwen2.5-7b": 1e6, "smollm2-135m": 1e5}
    assert {name: preset(name).rope_theta for name in thetas} == thetas


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown model 'lama-2-7b': did you mean 'llama-2-7b'\?"):
        preset("lama-2-7b")
