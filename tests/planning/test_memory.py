"""The closed formula against a model that is really built (on the meta device), and hand-worked bytes."""

import itertools

import pytest
import torch

from framework.models.config import Activation, ModelConfig, Norm, Position
from framework.models.transformer import Transformer
from framework.planning.memory import num_parameters, state_memory

AXES = list(itertools.product([True, False], [Activation.SWIGLU, Activation.GELU], [Norm.RMS, Norm.LAYER], [1, 4]))


@pytest.mark.parametrize(("flag", "activation", "norm", "kv"), AXES)
def test_the_formula_counts_every_parameter(flag: bool, activation: Activation, norm: Norm, kv: int) -> None:
    config = ModelConfig(
        vocab_size=37, hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=kv, head_dim=10, activation=activation,
        norm=norm, tied=flag, attention_bias=flag, mlp_bias=not flag, max_positions=19,
        position=Position.LEARNED if flag else Position.ROTARY,
    )  # fmt: skip
    with torch.device("meta"):
        model = Transformer(config)
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())


def test_llama_2_7b_has_its_published_size() -> None:
    config = ModelConfig(
        vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, intermediate_size=11008, tied=False
    )
    assert num_parameters(config) == 6_738_415_616


def test_state_bytes_by_hand() -> None:
    memory = state_memory(1001, 4, num_shards=1)
    assert (memory.weights, memory.gradients, memory.optimizer, memory.total) == (4004, 4004, 8008, 16016)
    assert state_memory(1001, 4, num_shards=4).total == 251 * 16
