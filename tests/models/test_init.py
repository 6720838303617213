"""Law Init: any box of any tensor has the bits it has in the whole; the distribution is the one the docstring names."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.core import random
from framework.core.errors import UsageError
from framework.core.records import whole
from framework.models import init
from framework.models.config import Bias, ModelConfig, MoeConfig, Norm, Position
from framework.models.init import fill, parameter_shapes, random_weights
from framework.models.transformer import Transformer
from tests.models.drawn import TINY

CONFIG = replace(
    TINY, norm=Norm.LAYER, attention_bias=Bias.ALL, tied=False, position=Position.LEARNED, max_positions=9,
    moe=MoeConfig(experts=3, intermediate_size=8, first=1),
)  # fmt: skip
SHAPES = parameter_shapes(CONFIG) | {"value_head.weight": (1, 32), "class_head.weight": (3, 32)}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_box_of_any_tensor_has_the_bits_of_the_whole(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SHAPES)))
    read = random_weights(CONFIG, seed=3)
    tensor = read(name, whole(SHAPES[name]))
    box = []
    for size in SHAPES[name]:
        start = data.draw(st.integers(0, size))
        box.append((start, data.draw(st.integers(0, size - start))))
    part = read(name, tuple(box))
    assert torch.equal(part, tensor[tuple(slice(start, start + length) for start, length in box)])


def test_an_element_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Element (2, 5) of a matrix with 32 columns is number 69 of its name's stream; pieces change nothing."""
    read = random_weights(TINY, seed=3)
    name = "layers.1.attention.q.weight"
    expected = (random.normal(random.key(3, name), torch.tensor([69])) * 0.02).float()
    assert torch.equal(read(name, ((2, 1), (5, 1))).flatten(), expected)
    tensor = read(name, whole((32, 32)))
    monkeypatch.setattr(init, "_DRAWN_AT_ONCE", 100)
    assert torch.equal(read(name, whole((32, 32))), tensor)


def test_spreads_and_constants() -> None:
    config = ModelConfig(vocab_size=900, hidden_size=64, num_layers=8, num_heads=4, init_std=0.5, mlp_bias=True)
    read, shapes = random_weights(config, 0), parameter_shapes(config) | {"class_head.weight": (900, 64)}
    spread = {
        "embedding.weight": 0.5,
        "layers.3.attention.k.weight": 0.5,
        "layers.3.attention.o.weight": 0.5 / 4,  # 1/sqrt(2 * 8)
        "layers.7.mlp.down.weight": 0.5 / 4,
        "layers.7.mlp.up.weight": 0.5,
        "class_head.weight": 65**-0.5,
    }
    for name, deviation in spread.items():
        tensor = read(name, whole(shapes[name]))
        assert abs(float(tensor.std()) / deviation - 1) < 5 / (2 * tensor.numel()) ** 0.5 + 1e-3, name
        assert abs(float(tensor.mean())) < 5 * deviation / tensor.numel() ** 0.5, name
    assert (read("norm.weight", whole((64,))) == 1).all()
    assert (read("layers.0.mlp_norm.weight", whole((64,))) == 1).all()
    assert (read("layers.0.mlp.up.bias", whole((256,))) == 0).all()
    assert (read("value_head.weight", whole((1, 64))) == 0).all()


def test_experts_are_drawn_as_feed_forward_blocks() -> None:
    """By hand: element (1, 2, 5) of matrices [8, 32] is number 325 of its name's stream."""
    config = replace(TINY, init_std=0.5, moe=MoeConfig(experts=3, intermediate_size=8))
    read, shapes = random_weights(config, 3), parameter_shapes(config)
    name = "layers.1.mlp.experts.up.weight"
    expected = (random.normal(random.key(3, name), torch.tensor([325])) * 0.5).float()
    assert torch.equal(read(name, ((1, 1), (2, 1), (5, 1))).flatten(), expected)
    for leaf, deviation in (("experts.gate", 0.5), ("experts.down", 0.25), ("router", 0.5)):
        name = f"layers.0.mlp.{leaf}.weight"
        tensor = read(name, whole(shapes[name]))
        assert abs(float(tensor.std()) / deviation - 1) < 5 / (2 * tensor.numel()) ** 0.5, name


def test_names_and_seeds_are_streams_of_their_own() -> None:
    box = whole((32, 32))
    draws = [
        random_weights(TINY, seed)(f"layers.{i}.attention.{x}.weight", box)
        for seed in (0, 1)
        for i in (0, 1)
        for x in "qo"
    ]
    flat = torch.stack([draw.flatten() / draw.std() for draw in draws])
    correlation = flat @ flat.T / flat.shape[1] - torch.eye(len(draws))
    assert correlation.abs().max() < 5 / flat.shape[1] ** 0.5


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no parameter 'norm\.weigth': did you mean 'norm\.weight'"):
        random_weights(TINY, 0)("norm.weigth", ((0, 1),))


def test_fill_gives_a_meta_model_its_weights() -> None:
    with torch.device("meta"):
        model = Transformer(CONFIG)
    fill(model, random_weights(CONFIG, 5), torch.float64)
    assert [name for name, _ in model.named_parameters()] == list(parameter_shapes(CONFIG))
    for name, parameter in model.named_parameters():
        expected = random_weights(CONFIG, 5)(name, whole(parameter.shape))
        assert parameter.dtype == torch.float64
        assert parameter.requires_grad
        assert torch.equal(parameter.detach(), expected.double())
