"""Law Layout for the axes that the lattice's model lacks: linear biases, windows, norms in other places.

Two models that have them all between them, in fp64, under layouts that cut heads, places and layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from framework.core.errors import UsageError
from framework.core.runtime import Runtime
from framework.engine.config import EngineConfig, Precision
from framework.engine.metrics import means
from framework.engine.plan import check
from framework.models.config import (
    Activation,
    Bias,
    ModelConfig,
    MoeConfig,
    Norm,
    NormPlace,
    Position,
    RopeScaling,
    Scaling,
)
from framework.parallel.config import ContextForm, ParallelConfig
from tests.distributed import run_ranks
from tests.engine.lattice import (
    PRETRAINING,
    UPDATES,
    Course,
    Deviation,
    Layout,
    bound,
    compare,
    engine_of,
    share,
    train,
)

MODELS = {
    "bloom's kind": ModelConfig(
        vocab_size=37, hidden_size=24, num_layers=3, num_heads=6, position=Position.ALIBI, norm=Norm.LAYER,
        embedding_norm=True, activation=Activation.GELU_TANH, attention_bias=Bias.ALL, mlp_bias=True,
    ),
    "glm's and qwen's": ModelConfig(
        vocab_size=37, hidden_size=20, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=22,
        qk_norm=True, window=4, window_from=1, norm_place=NormPlace.SANDWICH, rope_fraction=0.5, rope_interleaved=True,
        rope_scaling=RopeScaling(Scaling.YARN, 4.0, 8), activation=Activation.GEGLU,
        attention_bias=Bias.QKV, tied=False,
    ),
    "deep and learned": ModelConfig(
        vocab_size=37, hidden_size=20, num_layers=3, num_heads=4, norm_place=NormPlace.DEEP, position=Position.LEARNED,
        max_positions=16, embedding_norm=True,
    ),
    "experts": ModelConfig(
        vocab_size=37, hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=22, qk_norm=True,
        moe=MoeConfig(
            experts=5, top_k=2, intermediate_size=7, shared=9, shared_gate=True, first=1, balance=0.3
        ),
    ),
}  # fmt: skip
LAYOUTS = [
    Layout(2, ParallelConfig("tensor 2", tensor=2)),
    Layout(4, ParallelConfig("shard 2, tensor 2", shard=2, tensor=2)),
    Layout(3, ParallelConfig("shard 3", shard=3)),
    Layout(4, ParallelConfig("tensor 2, pipeline 2", tensor=2, pipeline=2)),
]


def course(runtime: Runtime, layout: Layout, model: ModelConfig) -> Course:
    """With the balance of its experts, where it has some, after the losses."""
    update = UPDATES[PRETRAINING]
    engine = engine_of(layout, runtime, update, Precision.FP64, model)
    found, _ = train(engine, update)
    figures = means(engine.forward_backward(share(update.rows(0), engine), update.loss_fn))
    return replace(found, losses=[*found.losses, figures.get("balance", 1.0)])


@pytest.fixture(scope="module")
def one() -> dict[str, Course]:
    """One process's answers."""
    return {name: course(Runtime(), Layout(1, ParallelConfig()), model) for name, model in MODELS.items()}


def visit(runtime: Runtime, layout: Layout, answers: Mapping[str, Course]) -> dict[str, Deviation]:
    return {name: compare(course(runtime, layout, MODELS[name]), answer) for name, answer in answers.items()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name.replace(" ", "-"))
def test_every_axis_gives_one_process_s_answer(layout: Layout, one: dict[str, Course]) -> None:
    for found in run_ranks(visit, layout.world, layout, one, timeout_s=280):
        for name, deviation in found.items():
            tolerance = bound(Precision.FP64)
            assert deviation.start, name
            assert max(deviation.loss, deviation.gradient, deviation.after) <= tolerance, (name, deviation)


def of_experts(runtime: Runtime, parallel: ParallelConfig) -> Course:
    """Context ranks route their own places, without a balance; DeepSpeed keeps fp32 masters."""
    model, update = MODELS["experts"], UPDATES[PRETRAINING]
    if parallel.context > 1:
        model = replace(model, moe=replace(model.moe, balance=0.0))
    layout = Layout(runtime.world_size, parallel if runtime.world_size > 1 else ParallelConfig())
    return train(engine_of(layout, runtime, update, precision_of(parallel), model), update)[0]


def precision_of(parallel: ParallelConfig) -> Precision:
    return Precision.FP32 if parallel.zero else Precision.FP64


def visit_experts(runtime: Runtime, answers: Sequence[tuple[ParallelConfig, Course]]) -> list[Deviation]:
    return [compare(of_experts(runtime, parallel), answer) for parallel, answer in answers]


def test_experts_under_layouts_that_other_axes_lack() -> None:
    """In one run of two ranks, for DeepSpeed takes long to import. It averages over ranks: the balance too."""
    layouts = [ParallelConfig("cp", context=2), ParallelConfig("zero1", zero=1), ParallelConfig("zero3", zero=3)]
    answers = [(parallel, of_experts(Runtime(), parallel)) for parallel in layouts]
    for rank in run_ranks(visit_experts, 2, answers, timeout_s=280):
        for parallel, found in zip(layouts, rank, strict=True):
            assert found.start, parallel.name
            assert max(found.loss, found.gradient) <= bound(precision_of(parallel)), (parallel.name, found)


@pytest.mark.parametrize("form", list(ContextForm))
def test_what_context_ranks_cannot_attend_is_refused_by_name(form: ContextForm) -> None:
    parallel = ParallelConfig("cp", context=2, context_form=form)
    for model, line in zip(
        list(MODELS.values())[:2],
        (r"model\.position=alibi does not go with parallel\.context=2", r"model\.window does not go with parallel"),
        strict=True,
    ):
        with pytest.raises(UsageError, match=line):
            check(model, parallel, EngineConfig(), 2)
