"""Which part of a model goes where, and what is said of a layout that it does not fit."""

from typing import Any

import pytest
import torch

from framework.core.errors import UsageError
from framework.engine.config import EngineConfig
from framework.engine.plan import check, plan, stages_of
from framework.models.config import ModelConfig, Norm, Position
from framework.models.scorer import Scorer
from framework.models.transformer import Transformer
from framework.parallel import tensor
from framework.parallel.config import ContextForm, ParallelConfig, Schedule

MODEL = ModelConfig(vocab_size=50, hidden_size=24, num_layers=6, num_heads=12, num_kv_heads=6, head_dim=4)


class Mesh:
    """Axis sizes and a place in them, without any process."""

    def __init__(self, rank: int = 0, **sizes: int):
        self.rank, self.sizes = rank, sizes

    def size(self, axis: str) -> int:
        return self.sizes.get(axis, 1)

    def place(self, axis: str) -> int:
        return self.rank if self.size(axis) > 1 else 0

    def ranks(self, axis: str) -> Any:
        class Ranks:
            size, rank, group = self.size(axis), self.place(axis), None

        return Ranks


@pytest.mark.parametrize(
    ("words", "world", "engine", "line"),
    [
        (
            {"tensor": 4},
            4,
            {},
            "model.num_kv_heads=6 is not divisible by parallel.tensor=4; choose 1, 2, 3, 6",
        ),
        ({"tensor": 0}, 5, {}, "model.num_heads=12 is not divisible by parallel.tensor=5; choose 1, 2, 3, 6"),
        (
            {"context": 5, "context_form": ContextForm.EXCHANGE},
            5,
            {},
            "12 heads with 6 key heads cannot be exchanged over parallel.context=5 ranks; choose 1, 2, 3, 6 or 12, or",
        ),
        (
            {"pipeline": 4, "schedule": Schedule.INTERLEAVED},
            4,
            {},
            "model.num_layers=6 cannot be cut into 8 pipeline stages (parallel.pipeline=4, "
            "parallel.schedule=interleaved); choose at most parallel.pipeline=3",
        ),
        ({"tensor": 2}, 2, {"strict": True}, "engine.strict=true needs whole rows and matrices, parallel=some cuts"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_what_would(
    words: dict[str, Any], world: int, engine: dict[str, Any], line: str
) -> None:
    with pytest.raises(UsageError) as caught:
        check(MODEL, ParallelConfig("some", **words), EngineConfig(**engine), world)
    assert str(caught.value).startswith(line)


def test_heads_are_exchanged_among_those_of_one_tensor_rank() -> None:
    parallel = ParallelConfig("some", context=4, context_form=ContextForm.EXCHANGE, tensor=3)
    check(MODEL, parallel, EngineConfig(), 12)  # 4 heads with 2 key heads


def test_strict_mode_goes_with_data_ranks_and_with_one_process() -> None:
    for words, world in (({"shard": 0}, 4), ({"tensor": 0}, 1)):
        check(MODEL, ParallelConfig("some", **words), EngineConfig(strict=True), world)


def test_interleaved_ranks_hold_every_so_many_th_stage() -> None:
    parallel = ParallelConfig("pp", pipeline=2, schedule=Schedule.INTERLEAVED)
    held = [stages_of(MODEL, parallel, Mesh(rank, pipeline=2)) for rank in (0, 1)]  # type: ignore[arg-type]
    assert [[number for number, _ in stages] for stages in held] == [[0, 2], [1, 3]]
    layers = {number: list(span) for stages in held for number, span in stages}
    assert [layer for number in range(4) for layer in layers[number]] == list(range(6))


def test_a_heavy_head_leaves_its_stage_fewer_layers() -> None:
    wide = ModelConfig(vocab_size=2000, hidden_size=24, num_layers=6, num_heads=4)
    light = ModelConfig(vocab_size=10, hidden_size=24, num_layers=6, num_heads=4)
    parallel = ParallelConfig("pp", pipeline=2)
    spans = [stages_of(m, parallel, Mesh(1, pipeline=2))[0][1] for m in (light, wide)]  # type: ignore[arg-type]
    assert len(spans[0]) == 3
    assert len(spans[1]) == 1


def scorer(**changes: Any) -> Scorer:
    with torch.device("meta"):
        return Scorer(Transformer(ModelConfig(**{**vars(MODEL), **changes})))


def test_a_stage_drops_what_others_hold() -> None:
    parallel, mesh = ParallelConfig("pp", pipeline=3), Mesh(1, pipeline=3)
    middle = plan(scorer(tied=False), range(2, 4), parallel, mesh)  # type: ignore[arg-type]
    assert middle.blocks == ["model.layers.2", "model.layers.3"]
    kept = {"model.layers.2", "model.layers.3"}
    parts = {f"model.layers.{i}" for i in range(6)} - kept
    ends = {"model.embedding", "model.position_embedding", "model.embedding_norm", "model.norm", "model.head"}
    ends |= {"model.type_embedding", "model.relative", "model.head_transform", "model.head_bias"}
    ends |= {"value_head", "pooler", "class_head"}
    assert set(middle.dropped) == parts | ends


def test_every_matrix_gets_a_style_and_nothing_is_named_that_is_not_there() -> None:
    mesh, parallel = Mesh(tensor=2), ParallelConfig("tp", tensor=2)
    for changes in ({}, {"tied": False}, {"position": Position.LEARNED, "norm": Norm.LAYER, "mlp_bias": True}):
        whole = scorer(**changes)
        styles = plan(whole, range(6), parallel, mesh).styles  # type: ignore[arg-type]
        modules = dict(whole.named_modules())
        assert styles.keys() <= modules.keys()
        with_weights = {name for name, part in modules.items() if part._parameters}
        assert with_weights <= styles.keys()
        assert styles["model"] is tensor.ends_whole


def test_heads_of_a_critic_are_whole_on_every_tensor_rank() -> None:
    with torch.device("meta"):
        critic = Scorer(Transformer(MODEL), value_head=True)
    found = plan(critic, range(6), ParallelConfig("tp", tensor=2), Mesh(tensor=2))  # type: ignore[arg-type]
    assert found.styles["model"] is tensor.ends_whole_for_all
    assert "log_probs" not in found.exchanged
    assert "value_head" not in found.styles
