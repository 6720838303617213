"""Which parameters are decayed: by the whole tensor's shape and by name, for every name our models have."""

import torch

from framework.models.config import Activation, Bias, ModelConfig, Norm, Position
from framework.models.init import parameter_shapes
from framework.optim.build import is_decayed


def test_matrices_are_decayed_and_nothing_else() -> None:
    config = ModelConfig(
        vocab_size=11, hidden_size=8, num_layers=1, num_heads=2, tied=False, attention_bias=Bias.ALL, mlp_bias=True,
        norm=Norm.LAYER, position=Position.LEARNED, activation=Activation.GELU,
    )  # fmt: skip
    decayed = {name for name, shape in parameter_shapes(config).items() if is_decayed(name, shape)}
    layer = {f"layers.0.attention.{part}.weight" for part in "qkvo"} | {
        f"layers.0.mlp.{p}.weight" for p in ("up", "down")
    }
    assert decayed == layer | {"head.weight"}


def test_a_tied_head_is_an_embedding() -> None:
    assert not is_decayed("embedding.weight", torch.Size([11, 8]))
    assert is_decayed("value_head.weight", torch.Size([1, 8]))
