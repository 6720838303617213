"""Adapters under the engine: at first the base's bits, then one process's answer under every kind of layout."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from framework.core.runtime import Runtime
from framework.engine.build import build_engine
from framework.engine.config import EngineConfig, Precision
from framework.models.config import LoraConfig
from framework.models.init import parameter_shapes, random_weights
from framework.models.lora import lora_shapes, still, with_fresh
from framework.parallel.config import ParallelConfig, Recompute
from tests.distributed import run_ranks
from tests.engine.lattice import MICRO, MODEL, OPTIM, PRETRAINING, UPDATES, Course, Layout, bound, compare, train

UPDATE = UPDATES[PRETRAINING]
LORA = LoraConfig(rank=3, alpha=5.0)
SOME = LoraConfig(rank=2, rslora=True, targets=["q", "o", "down"], also=["embedding", "layers.1.mlp_norm"])
CASES = {"all": LORA, "some, and parts in full": SOME}


def engine_with(lora: LoraConfig, runtime: Runtime, parallel: ParallelConfig, precision: Precision) -> Any:
    return build_engine(
        MODEL, runtime=runtime, parallel=parallel, config=EngineConfig(precision=precision), micro_size=MICRO,
        optim=OPTIM, total_steps=20, weights=with_fresh(random_weights(MODEL, seed=7), MODEL, lora, seed=7),
        frozen=still(MODEL, lora), lora=lora,
    )  # fmt: skip


def one(lora: LoraConfig, precision: Precision) -> Course:
    return train(engine_with(lora, Runtime(), ParallelConfig(), precision), UPDATE)[0]


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


def test_what_a_recipe_s_words_give_an_adapter_to() -> None:
    assert len(lora_shapes(MODEL, LORA)) == 2 * 7 * MODEL.num_layers
    shapes = lora_shapes(MODEL, SOME)
    assert shapes["layers.0.attention.o.lora_a"] == (2, 32)
    assert shapes["layers.3.mlp.down.lora_b"] == (20, 2)
    assert {name.split(".")[-2] for name in shapes} == {"q", "o", "down"}


LAYOUTS = [
    Layout(2, ParallelConfig("shard 2", shard=2, recompute=Recompute.FULL)),
    Layout(2, ParallelConfig("tensor 2", tensor=2)),
    Layout(2, ParallelConfig("context 2", context=2)),
    Layout(4, ParallelConfig("tensor 2, pipeline 2", tensor=2, pipeline=2)),
]
ZERO = [ParallelConfig(f"zero{stage}", zero=stage) for stage in (1, 2, 3)]


def visit(
    runtime: Runtime, layouts: list[ParallelConfig], answers: Mapping[str, Course], precision: Precision
) -> dict[tuple[str, str], Any]:
    return {
        (parallel.name, name): compare(train(engine_with(CASES[name], runtime, parallel, precision), UPDATE)[0], answer)
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


def test_deepspeed_gives_one_process_s_answer() -> None:
    pytest.importorskip("deepspeed")
    answers = {name: one(lora, Precision.FP32) for name, lora in CASES.items()}
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
