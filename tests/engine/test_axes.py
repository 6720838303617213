"""Law Layout for the axes that the lattice's model lacks: linear biases, windows, norms in other places.

Two models that have them all between them, in fp64, under layouts that cut heads, places and layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from framework.core.errors import UsageError
from framework.core.records import Rows, TokenBatch
from framework.core.runtime import Runtime
from framework.data.config import LanguageConfig
from framework.data.denoising import with_random_prefixes
from framework.data.spans import Marks, with_blanks
from framework.engine.config import EngineConfig, Precision
from framework.engine.metrics import means
from framework.engine.plan import check
from framework.models.config import (
    Activation,
    Architecture,
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
    "bert's kind": ModelConfig(
        Architecture.ENCODER, vocab_size=37, hidden_size=24, num_layers=3, num_heads=4, position=Position.LEARNED,
        max_positions=16, norm=Norm.LAYER, norm_place=NormPlace.POST, embedding_norm=True, token_types=2,
        activation=Activation.GELU, attention_bias=Bias.ALL, mlp_bias=True, head_transform=True,
    ),
    "bert's classes": ModelConfig(
        Architecture.ENCODER, vocab_size=37, hidden_size=24, num_layers=3, num_heads=4, head_transform=True,
        activation=Activation.GELU,
    ),
    "chatglm's kind": ModelConfig(
        Architecture.PREFIX, vocab_size=37, hidden_size=24, num_layers=3, num_heads=2, position=Position.ROTARY_2D,
        norm=Norm.LAYER, norm_place=NormPlace.SCALED, activation=Activation.GELU_TANH, attention_bias=Bias.ALL,
    ),
    "sinusoidal, capped scores": ModelConfig(
        vocab_size=37, hidden_size=20, num_layers=3, num_heads=4, head_dim=6, position=Position.SINUSOIDAL,
        score_cap=1.0,
    ),
    "t5's kind": ModelConfig(
        Architecture.ENCODER_DECODER, vocab_size=37, hidden_size=20, num_layers=2, encoder_layers=3, num_heads=4,
        head_dim=6, position=Position.RELATIVE, relative_buckets=8, relative_distance=12, scaled_scores=False,
        scaled_head=True, activation=Activation.GEGLU_TANH,
    ),
    "glm's kind of prefix, dynamic scaling": ModelConfig(
        Architecture.PREFIX, vocab_size=37, hidden_size=24, num_layers=3, num_heads=4,
        rope_scaling=RopeScaling(Scaling.DYNAMIC, 4.0, 3),
    ),
    "experts": ModelConfig(
        vocab_size=37, hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=22, qk_norm=True,
        moe=MoeConfig(
            experts=5, top_k=2, intermediate_size=7, shared=9, shared_gate=True, first=1, balance=0.3
        ),
    ),
}  # fmt: skip
_BLIND = (
    "bloom's kind",
    "glm's and qwen's",
    "bert's kind",
    "glm's kind of prefix, dynamic scaling",
    "t5's kind",
    "chatglm's kind",
    "sinusoidal, capped scores",
)
STEPS = 2  # the gradients, and what an AdamW step made of them; more of the same stands in test_lattice
LAYOUTS = [
    Layout(2, ParallelConfig("tensor 2", tensor=2)),
    Layout(4, ParallelConfig("shard 2, tensor 2", shard=2, tensor=2)),
    Layout(3, ParallelConfig("shard 3", shard=3)),
    Layout(4, ParallelConfig("tensor 2, pipeline 2", tensor=2, pipeline=2)),
]


def course(runtime: Runtime, layout: Layout, name: str) -> Course:
    """With the balance of its experts, where it has some, after the losses."""
    model, update = MODELS[name], UPDATES["reward model" if "classes" in name else PRETRAINING]
    if model.position is Position.ROTARY_2D:
        update = replace(update, rows=lambda step: blanked(UPDATES[PRETRAINING].rows(step), step))
    elif model.architecture is Architecture.PREFIX:
        update = replace(update, rows=lambda step: half_seen(UPDATES[PRETRAINING].rows(step)))
    if model.encoder:
        update = replace(update, rows=lambda step: reading(UPDATES[PRETRAINING].rows(step)))
    engine = engine_of(layout, runtime, update, Precision.FP64, model)
    found, _ = train(engine, update, STEPS)
    if not model.moe.experts:
        return found
    figures = means(engine.forward_backward(share(update.rows(0), engine), update.loss_fn))
    return replace(found, losses=[*found.losses, figures["balance"]])


@pytest.fixture(scope="module")
def one() -> dict[str, Course]:
    """One process's answers."""
    return {name: course(Runtime(), Layout(1, ParallelConfig()), name) for name in MODELS}


def reading(rows: Rows) -> Rows:
    """Each row is written from what another kind of rows reads; documents of the same number belong together."""
    assert isinstance(rows, TokenBatch)
    source = replace(rows, tokens=(rows.tokens + 5) % 37, loss_mask=torch.zeros_like(rows.loss_mask))
    return replace(rows, source=source)


def blanked(rows: Rows, step: int) -> Rows:
    """Spans are hidden, and written behind the text."""
    assert isinstance(rows, TokenBatch)
    draws = torch.rand(3, *rows.tokens.shape, generator=torch.Generator().manual_seed(step))
    return with_blanks(rows, draws, LanguageConfig(share=0.4, span=2.0), Marks(37, end_id=1, start_id=0, mask_id=36))


def half_seen(rows: Rows) -> Rows:
    """The first half of each document is its prefix."""
    assert isinstance(rows, TokenBatch)
    return with_random_prefixes(rows, torch.full(rows.tokens.shape, 0.5))


def visit(runtime: Runtime, layout: Layout, answers: Mapping[str, Course]) -> dict[str, Deviation]:
    if layout.parallel.pipeline > 1:
        answers = {name: answer for name, answer in answers.items() if not MODELS[name].encoder}
    return {name: compare(course(runtime, layout, name), answer) for name, answer in answers.items()}


@pytest.mark.parametrize(
    "layout",
    # those whose cuts the others have too run at night
    [pytest.param(x, marks=[pytest.mark.nightly] if x.world < 4 else [], id=x.name.replace(" ", "-")) for x in LAYOUTS],
)
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
    return train(engine_of(layout, runtime, update, precision_of(parallel), model), update, STEPS)[0]


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


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (MODELS["t5's kind"], r"model\.architecture=encoder_decoder does not go with parallel\.pipeline=2"),
        (
            ModelConfig(vocab_size=37, position=Position.RELATIVE),
            r"model\.position=relative does not go with parallel\.pipeline=2",
        ),
    ],
)
def test_what_every_stage_would_need_is_refused_by_name(model: ModelConfig, line: str) -> None:
    with pytest.raises(UsageError, match=line):
        check(model, ParallelConfig("pp", pipeline=2), EngineConfig(), 2)


def test_context_ranks_do_not_know_how_long_a_document_is() -> None:
    model = ModelConfig(vocab_size=37, rope_scaling=RopeScaling(Scaling.DYNAMIC, 4.0, 3))
    with pytest.raises(UsageError, match=r"kind=dynamic does not go with parallel\.context=2.* parts of documents"):
        check(model, ParallelConfig("cp", context=2), EngineConfig(), 2)


@pytest.mark.parametrize("form", list(ContextForm))
def test_what_context_ranks_cannot_attend_is_refused_by_name(form: ContextForm) -> None:
    parallel = ParallelConfig("cp", context=2, context_form=form)
    for model, line in zip(
        [MODELS[name] for name in _BLIND],
        (
            r"model\.position=alibi does not go with parallel\.context=2",
            r"model\.window does not go with parallel",
            r"model\.architecture=encoder does not go with parallel",
            r"model\.architecture=prefix does not go with parallel",
            r"model\.position=relative does not go with parallel",
            r"model\.position=rotary_2d does not go with parallel",
            r"model\.score_cap does not go with parallel",
        ),
        strict=True,
    ):
        with pytest.raises(UsageError, match=line):
            check(model, parallel, EngineConfig(), 2)
