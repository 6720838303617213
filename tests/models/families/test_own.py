"""Our own layout: what no published family holds comes back from its folder with the same axes and bits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from framework.core.errors import CheckpointError, UsageError
from framework.models import hub
from framework.models.config import (
    Activation,
    Bias,
    ModelConfig,
    Norm,
    NormPlace,
    Position,
    RopeScaling,
    Scaling,
)
from tests.models.drawn import TINY, drawn, tokens

ODD = {
    "deep": replace(TINY, norm_place=NormPlace.DEEP, activation=Activation.GEGLU, position=Position.NONE, tied=False),
    "all others": replace(
        TINY, norm=Norm.LAYER, embedding_norm=True, qk_norm=True, window=3, window_from=1, attention_bias=Bias.QKV,
        mlp_bias=True, rope_fraction=0.5, rope_interleaved=True, rope_scaling=RopeScaling(Scaling.YARN, 4.0, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", ODD.values(), ids=ODD.keys())
def test_every_axis_comes_back(config: ModelConfig, tmp_path: Path) -> None:
    model, x = drawn(replace(config, family="framework")), tokens(2, 9)
    hub.save(model, tmp_path)
    loaded = hub.load(tmp_path)
    assert loaded.config == model.config
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["FrameworkForCausalLM"]
    with torch.no_grad():
        assert torch.equal(loaded.logits(loaded(x)), model.logits(model(x)))


def test_a_classifier_too(tmp_path: Path) -> None:
    model, score = drawn(replace(ODD["deep"], family="framework")), torch.randn(2, 32)
    weights = [(n, p) for n, p in model.named_parameters() if n != "head.weight"]
    hub.save_weights(model.config, [*weights, ("class_head.weight", score)], tmp_path, classes=2)
    _, read, shapes = hub.read_folder(tmp_path)
    assert shapes["class_head.weight"] == (2, 32)
    assert torch.equal(read("class_head.weight", ((1, 1), (0, 32))), score[1:])


def test_what_another_layout_cannot_hold_points_here() -> None:
    with pytest.raises(
        UsageError, match=r"Llama layout cannot hold model\.position=none.*model\.family=framework holds"
    ):
        hub.save(drawn(ODD["deep"]), "nowhere")


def test_an_axis_or_a_choice_that_is_none_is_named(tmp_path: Path) -> None:
    hub.save(drawn(replace(TINY, family="framework")), tmp_path)
    file = tmp_path / "config.json"
    theirs = json.loads(file.read_text())
    for change, message in (
        ({"norm_plase": "pre"}, "unknown axis 'norm_plase': did you mean 'norm_place'"),
        ({"norm_place": "deeep"}, "norm_place=deeep: did you mean 'deep'"),
        ({"rope_scaling": {"kind": "yarm"}}, "kind=yarm: did you mean 'yarn'"),
    ):
        file.write_text(json.dumps(theirs | {"axes": theirs["axes"] | change}))
        with pytest.raises(UsageError, match=message):
            hub.load(tmp_path)
    file.write_text(json.dumps(theirs | {"axes": theirs["axes"] | {"num_layers": 3}}))
    with pytest.raises(CheckpointError, match=r"missing tensor layers\.2\.attention_norm\.weight"):
        hub.load(tmp_path)
