"""Frozen parameters: their bits stand, the others learn as in a plain loop, nothing goes back below what learns, under
every kind of layout; an optimizer keeps states of nothing else."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.manager import CheckpointManager
from framework.core.records import TokenBatch
from framework.core.runtime import Runtime
from framework.engine.build import build_engine
from framework.engine.config import EngineConfig, Precision
from framework.engine.flops import training_work
from framework.models.config import ModelConfig
from framework.models.frozen import frozen_names
from framework.models.init import parameter_shapes, random_weights
from framework.optim.schedule import learning_rate
from framework.parallel.config import ParallelConfig, Recompute
from tests.distributed import run_ranks
from tests.engine.cases import UNTIED, WIDTH, build, language_loss
from tests.engine.lattice import (
    MICRO,
    MODEL,
    OPTIM,
    PRETRAINING,
    UPDATES,
    Course,
    Layout,
    bound,
    compare,
    rewritten,
    train,
)

UPDATE = UPDATES[PRETRAINING]
STEPS = 3
LAST = frozen_names(parameter_shapes(MODEL), [], 1, MODEL.num_layers)
PARTS = frozen_names(parameter_shapes(MODEL), ["embedding", "layers.*.mlp", "layers.2", "norm"], 0, MODEL.num_layers)


def engine_with(
    frozen: frozenset[str], runtime: Runtime, parallel: ParallelConfig, precision: Precision = Precision.FP64
) -> Any:
    return build_engine(
        MODEL, runtime=runtime, parallel=parallel, config=EngineConfig(precision=precision),
        micro_size=MICRO, optim=OPTIM, total_steps=20, weights=random_weights(MODEL, seed=7), frozen=frozen,
    )  # fmt: skip


def one(frozen: frozenset[str]) -> tuple[Course, dict[str, Tensor], dict[str, Tensor]]:
    """(what one process saw, its weights before, and after some steps)."""
    engine = engine_with(frozen, Runtime(), ParallelConfig())
    before = {name: x.clone() for name, x in engine.weights()}
    course, _ = train(engine, UPDATE, STEPS)
    return course, before, dict(engine.weights())


@pytest.mark.parametrize("frozen", [LAST, PARTS], ids=["last layer", "parts"])
def test_what_is_frozen_keeps_its_bits_and_the_rest_learns_as_in_a_plain_loop(frozen: frozenset[str]) -> None:
    """The plain loop: torch's AdamW over all parameters, the frozen ones' gradients set to zero and their weights put
    back; clipping by the norm of the others."""
    _, before, after = one(frozen)
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    engine = engine_with(frozenset(), Runtime(), ParallelConfig())
    parameters = dict(engine.holdings.parameters)
    learning = {name: p for name, p in parameters.items() if name not in frozen}
    decayed = [p for name, p in learning.items() if p.dim() == 2 and "embedding" not in name]
    rest = [p for name, p in learning.items() if p.dim() != 2 or "embedding" in name]
    groups = [{"params": decayed, "weight_decay": OPTIM.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps)
    for step in range(STEPS):
        engine.forward_backward(UPDATE.rows(step), UPDATE.loss_fn)
        torch.nn.utils.clip_grad_norm_([*decayed, *rest], OPTIM.clip)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(OPTIM, step, 20)
        adamw.step()
        engine._forget_gradients()
    for name, parameter in parameters.items():
        torch.testing.assert_close(after[name], parameter.detach(), rtol=0, atol=1e-10)


def test_states_are_kept_of_what_learns_alone() -> None:
    engine = engine_with(LAST, Runtime(), ParallelConfig())
    moments = {name.split("/")[-1] for name, _, _ in engine.shards() if name.startswith("optim/exp_avg/")}
    assert moments == set(parameter_shapes(MODEL)) - LAST
    assert {name for name, _, _ in engine.shards() if name.startswith("model/")} == {
        f"model/{name}" for name in parameter_shapes(MODEL)
    }


def reached(engine: Any) -> list[str]:
    """The layers into whose outputs a gradient comes back."""
    found: list[str] = []
    for scorer in getattr(engine, "scorers", None) or [engine.scorer]:
        for name, layer in scorer.model.layers.items():

            def told(module: torch.nn.Module, inputs: Any, y: Tensor, name: str = name) -> None:
                if y.requires_grad:
                    y.register_hook(lambda gradient: found.append(name))

            layer.register_forward_hook(told)
    engine.forward_backward(UPDATE.rows(0).select(slice(0, 4)), UPDATE.loss_fn)
    return sorted(set(found))


@pytest.mark.parametrize("recompute", list(Recompute))
def test_nothing_goes_back_below_what_learns(recompute: Recompute) -> None:
    assert reached(engine_with(LAST, Runtime(), ParallelConfig("single", recompute=recompute))) == ["3"]
    assert reached(engine_with(frozenset(), Runtime(), ParallelConfig(recompute=recompute))) == ["0", "1", "2", "3"]


LAYOUTS = [
    Layout(2, ParallelConfig("shard 2", shard=2, recompute=Recompute.FULL)),
    Layout(2, ParallelConfig("tensor 2", tensor=2)),
    Layout(2, ParallelConfig("context 2", context=2)),
    Layout(4, ParallelConfig("replicate 2, pipeline 2", pipeline=2)),
]


def visit(runtime: Runtime, layout: Layout, answers: Mapping[frozenset[str], Course]) -> list[Any]:
    found: list[Any] = []
    for frozen, answer in answers.items():
        course, _ = train(engine_with(frozen, runtime, layout.parallel), UPDATE, STEPS)
        found.append(compare(course, answer))
    layers = reached(engine_with(LAST, runtime, layout.parallel))
    return [*found, layers]


@pytest.fixture(scope="module")
def answers() -> dict[frozenset[str], Course]:
    return {frozen: one(frozen)[0] for frozen in (LAST, PARTS)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name.replace(" ", "-"))
def test_every_layout_gives_one_process_s_answer(layout: Layout, answers: dict[frozenset[str], Course]) -> None:
    for *deviations, layers in run_ranks(visit, layout.world, layout, answers, timeout_s=280):
        for deviation in deviations:
            assert deviation.start
            assert max(deviation.loss, deviation.gradient, deviation.after) <= 1e-10, deviation
        assert layers in ([], ["3"])


def test_torch_counts_the_same_work() -> None:
    """As in test_flops: strict mode's products over all keys, less those that a causal query does not see."""
    ones = torch.ones(2, WIDTH, dtype=torch.long)
    rows = TokenBatch(ones, ones, ones > 0, torch.arange(WIDTH).repeat(2, 1), ones)
    model = ModelConfig(vocab_size=40, hidden_size=32, num_layers=3, num_heads=4, tied=False)
    frozen = frozen_names(parameter_shapes(model), [], 1, 3)
    engine = build_engine(
        model, runtime=Runtime(), parallel=ParallelConfig(), config=EngineConfig(strict=True), micro_size=2,
        optim=replace(OPTIM), total_steps=1, weights=random_weights(model, 1), frozen=frozen,
    )  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        engine.forward_backward(rows, language_loss)
    unseen = 2 * WIDTH * (WIDTH - 1) // 2
    attention = 4 * model.num_heads * model.head_size * (1 + 1 + 3)
    assert counter.get_total_flops() == training_work(model, rows, frozen=frozen).exact + attention * unseen


ZERO = [ParallelConfig(f"zero{stage}", zero=stage) for stage in (1, 2, 3)]


def saved(folder: Path) -> dict[str, str]:
    """A checkpoint of one process after three steps; the hash of each tensor."""
    engine = engine_with(LAST, Runtime(), ParallelConfig(), Precision.FP32)
    for step in range(3):
        engine.forward_backward(UPDATE.rows(step), UPDATE.loss_fn)
        engine.step()
    manager = CheckpointManager(folder / "one", CheckpointConfig(), 0, 1)
    return manager.save(3, {"trainer": engine.shards()}, {}).hashes("trainer")


def zero_visit(runtime: Runtime, answers: Mapping[frozenset[str], Course], folder: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for parallel in ZERO:
        engines = {frozen: engine_with(frozen, runtime, parallel, Precision.FP32) for frozen in answers}
        deviations = [compare(train(engines[frozen], UPDATE, STEPS)[0], answer) for frozen, answer in answers.items()]
        hashes = rewritten(engines[LAST], Layout(2, parallel), runtime, folder)
        found[parallel.name] = [*deviations, hashes, reached(engines[LAST])]
    return found


def test_deepspeed_gives_one_process_s_answer_and_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    hashes = saved(tmp_path)
    answers = {
        frozen: train(engine_with(frozen, Runtime(), ParallelConfig(), Precision.FP32), UPDATE, STEPS)[0]
        for frozen in (LAST, PARTS)
    }
    for rank in run_ranks(zero_visit, 2, answers, tmp_path, timeout_s=280):
        for name, (*deviations, rewritten_hashes, layers) in rank.items():
            for deviation in deviations:
                assert deviation.start, name
                assert max(deviation.loss, deviation.gradient) <= bound(Precision.FP32), (name, deviation)
                assert deviation.after <= 100 * bound(Precision.FP32), (name, deviation)
            assert rewritten_hashes == hashes, name
            assert layers == ["3"], name


def test_a_classifier_has_no_language_head_to_freeze() -> None:
    """All of an untied model stands still beside an adapter, its head too, which a classifier drops."""
    frozen = frozenset(parameter_shapes(UNTIED))
    assert "head.weight" in frozen
    engine = build(model=UNTIED, num_classes=2, frozen=frozen)
    assert set(engine.holdings.learning) == {"class_head.weight"}
