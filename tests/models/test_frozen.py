"""Which names stand still, by hand, and what is said of patterns that mean nothing."""

from dataclasses import replace

import pytest

from framework.core.errors import UsageError
from framework.models.frozen import frozen_names
from framework.models.init import parameter_shapes
from tests.models.drawn import TINY

NAMES = [
    "embedding.weight", "layers.0.attention.q.weight", "layers.0.mlp.up.weight", "layers.1.attention.q.weight",
    "layers.10.mlp.up.weight", "norm.weight", "head.weight",
]  # fmt: skip


@pytest.mark.parametrize(
    ("patterns", "last", "still"),
    [
        ([], 0, []),
        (["embedding"], 0, ["embedding.weight"]),
        (["layers.1"], 0, ["layers.1.attention.q.weight"]),
        (["layers.*.mlp"], 0, ["layers.0.mlp.up.weight", "layers.10.mlp.up.weight"]),
        (["*.weight", ], 11, NAMES),
        ([], 10, NAMES[:3]),
        (["head", "norm.weight"], 1, [*NAMES[:4], "norm.weight", "head.weight"]),
    ],
)  # fmt: skip
def test_names_by_hand(patterns: list[str], last: int, still: list[str]) -> None:
    if len(still) == len(NAMES):
        with pytest.raises(UsageError, match=r"train\.freeze=\['\*\.weight'\].*nothing is left to learn"):
            frozen_names(NAMES, patterns, last, 11)
    else:
        assert frozen_names(NAMES, patterns, last, 11) == set(still)


def test_a_tied_model_s_last_layer_and_norm_learn_and_its_embedding_does_not() -> None:
    names = parameter_shapes(replace(TINY, tied=True))
    learning = set(names) - frozen_names(names, [], 1, 2)
    assert learning == {name for name in names if name.startswith("layers.1.")} | {"norm.weight"}


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match=r"train\.freeze: 'layer\.0' is no part of this model: did you mean 'layers"):
        frozen_names(NAMES, ["layer.0"], 0, 11)
    with pytest.raises(UsageError, match=r"train\.last_layers=12, but the model has 11 layers; choose at most 11"):
        frozen_names(NAMES, [], 12, 11)
