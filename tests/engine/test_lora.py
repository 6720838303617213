"""Adapters under the engine: at first the base's bits, then one process's answer under every kind of layout."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from framework.core.errors import UsageError
from framework.core.runtime import Runtime
from framework.engine.build import build_engine
from framework.engine.config import EngineConfig, Precision
from framework.engine.plan import check
from framework.models.config import Base, LoraConfig
from framework.models.init import parameter_shapes, random_weights
from framework.models.lora import lora_shapes, merged, still, with_fresh
from framework.parallel.config import ParallelConfig, Recompute
from tests.distributed import run_ranks
from tests.engine.lattice import MICRO, MODEL, OPTIM, PRETRAINING, UPDATES, Course, Layout, bound, compare, train

UPDATE = UPDATES[PRETRAINING]
LORA = LoraConfig(rank=3, alpha=5.0)
SOME = LoraConfig(rank=2, rslora=True, dora=True, targets=["q", "o", "down"], also=["embedding", "layers.1.mlp_norm"])
CASES = {"all": LORA, "some with DoRA, and parts in full": SOME}
DROPPING = replace(LORA, dropout=0.3)


def engine_with(
    lora: LoraConfig, runtime: Runtime, parallel: ParallelConfig, precision: Precision, seed: int = 7
) -> Any:
    return build_engine(
        MODEL, runtime=runtime, parallel=parallel, config=EngineConfig(precision=precision), micro_size=MICRO,
        optim=OPTIM, total_steps=20, weights=with_fresh(random_weights(MODEL, seed=7), MODEL, lora, seed=7),
        frozen=still(MODEL, lora), lora=lora, seed=seed,
    )  # fmt: skip


def one(lora: LoraConfig, precision: Precision) -> Course:
    return train(engine_with(lora, Runtime(), ParallelConfig(), precision), UPDATE, STEPS)[0]


@pytest.mark.parametrize("lora", CASES.values(), ids=CASES.keys())
def test_a_fresh_adapter_is_the_base_and_only_what_learns_has_states(lora: LoraConfig) -> None:
    engine = engine_with(lora, Runtime(), ParallelConfig(), Precision.FP32)
    base = build_engine(
        MODEL, runtime=Runtime(), parallel=ParallelConfig(), config=EngineConfig(), micro_size=MICRO, optim=None,
        total_steps=1, weights=random_weights(MODEL, seed=7),
    )  # fmt: skip
    rows = UPDATE.rows(0)
    assert torch.equal(engine.infer(rows).log_probs, base.infer(rows).log_probs)
    learning = set(lora_shapes(MODEL, lora)) | (set(parameter_shapes(MODEL)) - still(MODEL, lora))
    moments = {name.removeprefix("optim/exp_avg/") for name, _, _ in engine.shards() if "/exp_avg/" in name}
    assert moments == learning
    before = {name: x.clone() for name, x in engine.weights()}
    for step in range(2):  # in the first, A has no gradient yet: B is zero
        engine.forward_backward(UPDATE.rows(step), UPDATE.loss_fn)
        engine.step()
    assert {name for name, x in engine.weights() if not torch.equal(x, before[name])} == learning


def test_a_classifier_of_an_untied_model_has_no_language_head_to_hold_still() -> None:
    model = replace(MODEL, tied=False)
    assert "head.weight" in still(model, LORA)
    engine = build_engine(
        model, runtime=Runtime(), parallel=ParallelConfig(), config=EngineConfig(), micro_size=MICRO, optim=OPTIM,
        total_steps=20, weights=with_fresh(random_weights(model, 7), model, LORA, 7), frozen=still(model, LORA),
        lora=LORA, num_classes=1,
    )  # fmt: skip
    assert "class_head.weight" in {name for name, _ in engine.weights()}


def test_what_a_recipe_s_words_give_an_adapter_to() -> None:
    assert len(lora_shapes(MODEL, LORA)) == 2 * 7 * MODEL.num_layers
    shapes = lora_shapes(MODEL, SOME)
    assert shapes["layers.0.attention.o.lora_a"] == (2, 32)
    assert shapes["layers.3.mlp.down.lora_b"] == (20, 2)
    assert shapes["layers.3.mlp.down.lora_m"] == (20,)
    assert {name.split(".")[-2] for name in shapes} == {"q", "o", "down"}


LAYOUTS = [
    Layout(2, ParallelConfig("shard 2", shard=2, recompute=Recompute.FULL)),
    Layout(2, ParallelConfig("tensor 2", tensor=2)),
    Layout(2, ParallelConfig("context 2", context=2)),
    Layout(4, ParallelConfig("tensor 2, pipeline 2", tensor=2, pipeline=2)),
]
DATA_LAYOUTS = [
    ParallelConfig("ddp"),
    ParallelConfig("shard 2", shard=2, recompute=Recompute.FULL),
]
STEPS = 3  # the first one moves B alone, for it starts at zero; the second one A too
ALL = CASES | {"dropout": DROPPING}
ZERO = [ParallelConfig(f"zero{stage}", zero=stage) for stage in (1, 2, 3)]


def visit(
    runtime: Runtime, layouts: list[ParallelConfig], answers: Mapping[str, Course], precision: Precision
) -> dict[tuple[str, str], Any]:
    def course(name: str, parallel: ParallelConfig) -> Course:
        return train(engine_with(ALL[name], runtime, parallel, precision), UPDATE, STEPS)[0]

    return {
        (parallel.name, name): compare(course(name, parallel), answer)
        for parallel in layouts
        for name, answer in answers.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name.replace(" ", "-"))
def test_every_layout_gives_one_process_s_answer(layout: Layout) -> None:
    answers = {name: one(lora, Precision.FP64) for name, lora in CASES.items()}
    for found in run_ranks(visit, layout.world, [layout.parallel], answers, Precision.FP64, timeout_s=280):
        for what, deviation in found.items():
            assert deviation.start, what
            assert max(deviation.loss, deviation.gradient, deviation.after) <= 1e-10, (what, deviation)


def test_ranks_that_share_out_rows_drop_what_one_process_drops() -> None:
    """Also where backward computes blocks again."""
    answers = {"dropout": one(DROPPING, Precision.FP64)}
    assert answers["dropout"].losses[1:] != one(LORA, Precision.FP64).losses[1:]
    for found in run_ranks(visit, 2, DATA_LAYOUTS, answers, Precision.FP64, timeout_s=280):
        for what, deviation in found.items():
            assert max(deviation.loss, deviation.gradient, deviation.after) <= 1e-10, (what, deviation)


@pytest.mark.parametrize("update", [PRETRAINING, "sft"])
@pytest.mark.parametrize("again", [Recompute.FULL, Recompute.SELECTIVE])
def test_blocks_computed_again_drop_the_same_to_the_bit(update: str, again: Recompute) -> None:
    found = []
    for recompute in (Recompute.NONE, again):
        parallel = ParallelConfig("single", recompute=recompute)
        engine = engine_with(DROPPING, Runtime(), parallel, Precision.FP32)
        engine.load_weights(with_drawn(engine))
        engine.forward_backward(UPDATES[update].rows(0), UPDATES[update].loss_fn)
        found.append(dict(engine.gradients()))
    for name in lora_shapes(MODEL, DROPPING):
        assert found[0][name].any()
        assert torch.equal(found[0][name], found[1][name]), name


def with_drawn(engine: Any) -> Any:
    """Weights whose B is drawn too, so that A has a gradient."""
    torch.manual_seed(0)
    drawn = {name: x + 0.1 * torch.randn_like(x) for name, x in engine.weights()}
    return lambda name, box: drawn[name][tuple(slice(start, start + length) for start, length in box)]


def test_a_continued_run_drops_the_same_and_another_seed_or_step_does_not() -> None:
    first, second, other = (
        engine_with(DROPPING, Runtime(), ParallelConfig(), Precision.FP32, seed) for seed in (7, 7, 8)
    )
    losses: list[list[float]] = []
    rows = UPDATE.rows(0)
    for engine in (first, other):
        engine.load_weights(with_drawn(engine))
        for _ in range(2):
            losses.append([float(engine.forward_backward(rows, UPDATE.loss_fn)["loss"][0])])
            engine.step()
    assert losses[0] != losses[2]
    saved = {name: tensor.clone() for name, _, tensor in first.shards()}
    second.load_shards(lambda name, box: saved[name])
    for engine in (first, second):
        engine.forward_backward(rows, UPDATE.loss_fn)
        engine.step()
    assert all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(first.shards(), second.shards(), strict=True))
    second.step_count = 4  # the same weights and rows at another step
    same = [float(engine.forward_backward(rows, UPDATE.loss_fn)["loss"][0]) for engine in (first, second)]
    assert same[0] != same[1]
    measured = [float(engine.measure(rows, UPDATE.loss_fn)["loss"][0]) for engine in (first, second)]
    assert measured[0] == measured[1]  # nothing is dropped there


def test_layouts_that_cut_the_model_have_no_dropout() -> None:
    for parallel in (ParallelConfig("tp", tensor=2), ParallelConfig("pp", pipeline=2), ParallelConfig("cp", context=2)):
        with pytest.raises(
            UsageError, match=rf"lora\.dropout=0\.3 needs whole rows and matrices, parallel={parallel.name}"
        ):
            check(MODEL, parallel, EngineConfig(), 2, DROPPING)


def test_deepspeed_gives_one_process_s_answer() -> None:
    pytest.importorskip("deepspeed")
    answers = {name: one(lora, Precision.FP32) for name, lora in ALL.items()}
    tolerance = bound(Precision.FP32)
    for found in run_ranks(visit, 2, ZERO, answers, Precision.FP32, timeout_s=280):
        for what, deviation in found.items():
            assert deviation.start, what
            assert max(deviation.loss, deviation.gradient) <= tolerance, (what, deviation)
            assert deviation.after <= 100 * tolerance, (what, deviation)


def test_alpha_scales_what_the_adapter_adds() -> None:
    """alpha / r, and alpha / sqrt(r) for rsLoRA: with r = 4 twice as much."""
    assert LoraConfig(rank=4, alpha=8.0).scale == 2.0
    assert replace(LoraConfig(rank=4, alpha=8.0), rslora=True).scale == 4.0


FOUR_BITS = replace(LORA, base=Base.NF4)


def bases(engine: Any) -> dict[str, Any]:
    return {name: x.clone() for name, x in engine.weights() if name.endswith(("attention.q.weight", "mlp.up.weight"))}


def test_a_base_in_four_bits_stands_still_and_is_in_no_checkpoint() -> None:
    """The adapter learns over what the four bits say; the merged model is what was trained."""
    engine = engine_with(FOUR_BITS, Runtime(), ParallelConfig(), Precision.FP32)
    full = engine_with(LORA, Runtime(), ParallelConfig(), Precision.FP32)
    before, exact = bases(engine), bases(full)
    assert all(0.01 < float((before[name] - x).norm() / x.norm()) < 0.15 for name, x in exact.items())
    for step in range(2):
        engine.forward_backward(UPDATE.rows(step), UPDATE.loss_fn)
        engine.step()
    assert all(torch.equal(x, before[name]) for name, x in bases(engine).items())
    assert not [name for name, _, _ in engine.shards() if name.endswith("attention.q.weight")]
    paths = [name.removesuffix(".lora_a") for name in lora_shapes(MODEL, LORA) if name.endswith("lora_a")]
    plain = dict(merged(((name, x.clone()) for name, x in engine.weights()), paths, FOUR_BITS, {}))
    alone = build_engine(
        MODEL, runtime=Runtime(), parallel=ParallelConfig(), config=EngineConfig(), micro_size=MICRO, optim=None,
        total_steps=1, weights=lambda name, box: plain[name][tuple(slice(a, a + n) for a, n in box)],
    )  # fmt: skip
    rows = UPDATE.rows(5)
    torch.testing.assert_close(alone.infer(rows).log_probs, engine.infer(rows).log_probs, rtol=0, atol=1e-4)


def test_a_base_in_four_bits_is_continued_to_the_same_bits() -> None:
    def trained(engine: Any, steps: range) -> Any:
        for step in steps:
            engine.forward_backward(UPDATE.rows(step), UPDATE.loss_fn)
            engine.step()
        return engine

    def fresh() -> Any:
        return engine_with(FOUR_BITS, Runtime(), ParallelConfig(), Precision.FP32)

    whole, half, again = trained(fresh(), range(4)), trained(fresh(), range(2)), fresh()
    saved = {name: x.clone() for name, _, x in half.shards()}
    again.load_shards(lambda name, box: saved[name])
    trained(again, range(2, 4))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole.weights(), again.weights(), strict=True))


def in_four_bits(runtime: Runtime, parallel: ParallelConfig) -> Course:
    layout = parallel if runtime.world_size > 1 else ParallelConfig()
    return train(engine_with(FOUR_BITS, runtime, layout, Precision.FP32), UPDATE)[0]


@pytest.mark.parametrize("parallel", [ParallelConfig("ddp"), ParallelConfig("shard 2", shard=2)], ids=["ddp", "fsdp"])
def test_a_base_in_four_bits_gives_one_process_s_answer(parallel: ParallelConfig) -> None:
    answer = in_four_bits(Runtime(), parallel)
    for found in run_ranks(in_four_bits, 2, parallel, timeout_s=120):
        deviation = compare(found, answer)
        assert deviation.start
        assert max(deviation.loss, deviation.gradient) <= bound(Precision.FP32), deviation


@pytest.mark.parametrize(
    ("parallel", "engine"),
    [
        (ParallelConfig("tp", tensor=2), EngineConfig()),
        (ParallelConfig("zero3", zero=3), EngineConfig()),
        (ParallelConfig("ddp"), EngineConfig(strict=True)),
    ],
)
def test_a_base_in_four_bits_that_ranks_would_cut_is_refused(parallel: ParallelConfig, engine: EngineConfig) -> None:
    with pytest.raises(UsageError, match=r"lora\.base=nf4 needs whole matrices on every rank"):
        check(MODEL, parallel, engine, 2, replace(FOUR_BITS, rank=8))


def test_four_bits_without_an_adapter_or_with_lengths_are_refused() -> None:
    for words in ({"rank": 0}, {"rank": 4, "dora": True}):
        with pytest.raises(UsageError, match=r"lora\.base=nf4 is for a base beside an adapter without lora\.dora"):
            LoraConfig(base=Base.NF4, **words)  # type: ignore[arg-type]
