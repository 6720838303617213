"""The table of parameters against a model that is really built (on the meta device)."""

import itertools
from typing import Any

import pytest
import torch

from framework.models.config import Activation, Bias, ModelConfig, MoeConfig, Norm, NormPlace, Position
from framework.models.transformer import Transformer
from framework.planning.parameters import Entry, active_parameters, block, num_parameters, root

AXES = list(itertools.product([True, False], [Activation.SWIGLU, Activation.GELU], [Norm.RMS, Norm.LAYER], [1, 4]))


@pytest.mark.parametrize(("flag", "activation", "norm", "kv"), AXES)
def test_the_table_counts_every_parameter(flag: bool, activation: Activation, norm: Norm, kv: int) -> None:
    config = ModelConfig(
        vocab_size=37, hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=kv, head_dim=10, activation=activation,
        norm=norm, tied=flag, attention_bias=Bias.ALL if flag else Bias.NONE, mlp_bias=not flag, max_positions=19,
        norm_place=NormPlace.POST if flag and kv == 4 else NormPlace.PRE,
        position=Position.LEARNED if flag else Position.ROTARY,
    )  # fmt: skip
    with torch.device("meta"):
        model = Transformer(config)
    table = [entry.shape for entry in root(config) + 3 * block(config)]
    assert sorted(table) == sorted(tuple(p.shape) for p in model.parameters())
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "more",
    [
        {"qk_norm": True, "attention_bias": Bias.QKV, "norm_place": NormPlace.SANDWICH, "activation": Activation.GEGLU},
        {
            "norm_place": NormPlace.SANDWICH,
            "moe": MoeConfig(experts=5, top_k=2, intermediate_size=14, shared=10, shared_gate=True, every=2),
        },
        {"embedding_norm": True, "position": Position.ALIBI, "norm": Norm.LAYER, "norm_place": NormPlace.DEEP},
    ],
    ids=["sandwich", "moe", "deep"],
)
def test_norms_of_other_places_and_biases_of_some(more: dict[str, Any]) -> None:
    config = ModelConfig(vocab_size=37, hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=2, **more)
    with torch.device("meta"):
        model = Transformer(config)
    table = [entry.shape for entry in [*root(config), *(e for layer in range(3) for e in block(config, layer))]]
    assert sorted(table) == sorted(tuple(p.shape) for p in model.parameters())
    idle = (5 - 2) * 3 * 24 * 14 if config.moe.experts else 0  # of layer 1, the only one with experts
    assert num_parameters(config) - active_parameters(config) == idle


def test_llama_2_7b_has_its_published_size() -> None:
    config = ModelConfig(
        vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, intermediate_size=11008, tied=False
    )
    assert num_parameters(config) == 6_738_415_616


def test_tensor_ranks_share_out_37_rows() -> None:
    assert [Entry((37, 5), 0).on(place, 4) for place in range(4)] == [(9, 5), (9, 5), (9, 5), (10, 5)]
    assert Entry((37,)).on(1, 4) == (37,)


def test_a_stage_that_ends_a_tied_pipeline_has_the_matrix_too() -> None:
    config = ModelConfig(vocab_size=37, hidden_size=20, num_heads=2)
    assert [entry.shape for entry in root(config)] == [(37, 20), (20,)]
    assert [entry.shape for entry in root(config, first=True, last=False)] == [(37, 20)]
    assert [entry.shape for entry in root(config, first=False, last=True)] == [(20,), (37, 20)]
    assert [entry.shape for entry in root(config, first=False, last=True, classes=1)] == [(20,), (1, 20)]
    assert root(config, first=False, last=False) == []
