"""Law Layout: what one process computes, two and four ranks compute too: losses, gradients, weights, scores, states.

One launch a world size goes through all cases; the tests then only compare. fp64 to 1e-10; fp32 to a bound of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # imported once, before the ranks are forked
from torch import Tensor

from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.manager import CheckpointManager
from framework.core.records import Counts, Metrics, Rollout, Rows, Scores, whole
from framework.core.runtime import Runtime
from framework.engine.config import EngineConfig, NonFinite, Precision
from framework.engine.metrics import means
from framework.engine.protocol import LossFn, StepReport
from framework.models.config import ModelConfig
from framework.models.init import parameter_shapes, random_weights
from framework.parallel.config import ParallelConfig
from tests.distributed import run_ranks
from tests.engine.cases import (
    DDP,
    FSDP,
    SINGLE,
    TIED,
    UNTIED,
    build,
    deviation,
    gradients,
    language_loss,
    packed,
    pairs,
    ranking_loss,
    rollout,
    value_loss,
    weights,
)

STEPS = 4
SHARES = {1: (8,), 2: (5, 3), 4: (1, 4, 0, 3)}  # rows of each rank, of 8: uneven, and none at all


@dataclass(frozen=True)
class Case:
    """One thing to train, and how."""

    rows: Callable[[int, int], Rows] = packed
    loss_fn: LossFn = language_loss
    model: ModelConfig = TIED
    parallel: ParallelConfig = FSDP
    precision: Precision = Precision.FP64
    heads: dict[str, Any] = field(default_factory=dict)


CASES = {
    "pretrain": Case(),
    "untied": Case(model=UNTIED),
    "pairs": Case(rows=pairs, loss_fn=ranking_loss, heads={"num_classes": 1}),
    "critic": Case(rows=rollout, loss_fn=value_loss, heads={"value_head": True}),
    "replicated": Case(parallel=DDP),
    "fp32": Case(precision=Precision.FP32),
    "fp32 replicated": Case(precision=Precision.FP32, parallel=DDP),
    "bf16": Case(precision=Precision.BF16),
}


@dataclass(frozen=True)
class Course:
    """What a rank saw of a case."""

    losses: list[float]
    reports: list[StepReport]
    gradients: dict[str, Tensor]  # of the first step
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    scores: Scores  # of this rank's rows
    valid: dict[str, float]
    boxes: list[Any]


def share(rows: Rows, runtime: Runtime) -> Rows:
    """This rank's rows of 8."""
    shares = SHARES[runtime.world_size]
    start = sum(shares[: runtime.rank])
    return rows.select(slice(start, start + shares[runtime.rank]))


def train(runtime: Runtime, case: Case) -> Course:
    parallel = case.parallel if runtime.world_size > 1 else SINGLE
    engine = build(runtime, parallel, EngineConfig(precision=case.precision), case.model, **case.heads)
    before, losses, reports = weights(engine), [], []
    first: dict[str, Tensor] = {}
    for step in range(STEPS):
        metrics = engine.forward_backward(share(case.rows(8, step), runtime), case.loss_fn)
        losses.append(means(metrics)["loss"])
        first = first or gradients(engine)
        reports.append(engine.step())
        if step == 1:  # inference between two steps must not leave old weights behind
            scores = engine.infer(share(case.rows(8, 50), runtime))
            valid = means(engine.measure(share(case.rows(8, 60), runtime), case.loss_fn))
    boxes = [(name, box, tensor.numel()) for name, box, tensor in engine.shards()]
    return Course(losses, reports, first, before, weights(engine), scores, valid, boxes)


def everything(runtime: Runtime, folder: Path) -> dict[str, Any]:
    """All cases, and the rarer happenings."""
    results: dict[str, Any] = {name: train(runtime, case) for name, case in CASES.items()}
    results["poison"] = poison_one_rank(runtime)
    results["resumed"] = resume_all(runtime, folder)
    results["reference"] = only_infer(runtime)
    results["dtype"] = dtype_of_records(runtime)
    results["ratios"] = first_ratios(runtime)
    return results


def poison_one_rank(runtime: Runtime) -> tuple[bool, bool]:
    """(all ranks skipped, no bit changed) after a NaN on the last rank alone."""
    parallel = FSDP if runtime.world_size > 1 else SINGLE
    engine = build(runtime, parallel, EngineConfig(non_finite=NonFinite.SKIP))
    before = weights(engine)

    def poisoned(scores: Scores, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
        loss, metrics = language_loss(scores, rows, counts)
        return loss * (float("nan") if runtime.rank == runtime.world_size - 1 else 1.0), metrics

    engine.forward_backward(share(packed(8), runtime), poisoned)
    skipped = engine.step().skipped
    return skipped, all(torch.equal(before[name], weight) for name, weight in weights(engine).items())


def only_infer(runtime: Runtime) -> Scores:
    """A reference model, no optimizer and no gradients, after it was given other weights: none of the old are left."""
    parallel = FSDP if runtime.world_size > 1 else SINGLE
    engine = build(runtime, parallel, EngineConfig(precision=Precision.FP64), optim=None)
    engine.infer(share(packed(8, 50), runtime))
    engine.load_weights(random_weights(TIED, seed=8))
    return engine.infer(share(packed(8, 50), runtime))


def dtype_of_records(runtime: Runtime) -> torch.dtype:
    """Of a record's numbers inside the Scorer's forward, in bf16."""
    parallel = FSDP if runtime.world_size > 1 else SINGLE
    engine = build(runtime, parallel, EngineConfig(precision=Precision.BF16))
    seen: list[torch.dtype] = []

    def watching(log_probs: Tensor, entropy: Tensor | None, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
        assert isinstance(rows, Rollout)
        seen.append(rows.log_probs.dtype)
        return log_probs.sum() / counts.tokens, {}

    watching.pointwise = True  # type: ignore[attr-defined]
    engine.forward_backward(rollout(2), watching)  # type: ignore[arg-type]
    return seen[0]


def first_ratios(runtime: Runtime) -> Tensor:
    """exp(log_probs - old_log_probs) of this rank's responses at the first update, rows in reversed order, in fp32."""
    engine = build(runtime, FSDP if runtime.world_size > 1 else SINGLE)
    rows, ratios = share(rollout(8), runtime), [torch.ones(1)]
    old = engine.infer(rows).log_probs.flip(0)

    def watching(scores: Scores, part: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
        mask, done = part.inputs().loss_mask, len(ratios) - 1
        before = old[2 * done : 2 * done + len(part)]
        if len(before):  # not the filler of a rank without rows
            ratios.append((scores.log_probs.detach() - before)[mask].exp())
        return language_loss(scores, part, counts)

    engine.forward_backward(rows.select(torch.arange(len(rows)).flip(0)), watching)
    return torch.cat(ratios)


def resume_all(runtime: Runtime, folder: Path) -> dict[int, dict[str, Tensor]]:
    """Save after 2 steps; from what every world size before this one has saved, take 2 more steps."""
    parallel = FSDP if runtime.world_size > 1 else SINGLE
    config = EngineConfig(precision=Precision.FP64)

    def steps(engine: Any, *numbers: int) -> None:
        for step in numbers:
            engine.forward_backward(share(packed(8, step), runtime), language_loss)
            engine.step()

    def manager(world: int) -> CheckpointManager:
        return CheckpointManager(folder / str(world), CheckpointConfig(), runtime.rank, runtime.world_size)

    first = build(runtime, parallel, config)
    steps(first, 0, 1)
    manager(runtime.world_size).save(2, {"trainer": first.shards()}, {})
    after = {}
    for world in sorted(int(path.name) for path in folder.iterdir()):
        found = manager(world).latest()
        assert found is not None
        engine = build(runtime, parallel, config)
        engine.load_shards(found.reader("trainer"))
        steps(engine, 2, 3)
        after[world] = weights(engine)
    return after


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """World size -> by rank -> case -> what it saw."""
    folder = tmp_path_factory.mktemp("checkpoints")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [everything(Runtime(), folder)]
    torch.set_num_threads(before)
    return {1: alone, 2: run_ranks(everything, 2, folder), 4: run_ranks(everything, 4, folder, timeout_s=120)}


WORLDS = pytest.mark.parametrize("world", [2, 4])


@WORLDS
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.precision is Precision.FP64])
def test_fp64_to_ten_digits(results: Any, world: int, name: str) -> None:
    one = results[1][0][name]
    for rank, course in enumerate(r[name] for r in results[world]):
        assert course.losses == pytest.approx(one.losses, rel=1e-10), rank
        assert course.valid == pytest.approx(one.valid, rel=1e-10), rank
        assert deviation(course.gradients, one.gradients) < 1e-10
        assert deviation(course.after, one.after) < 1e-10
        for mine, its in zip(course.reports, one.reports):
            assert mine.grad_norm == pytest.approx(its.grad_norm, rel=1e-10)
            assert (mine.lr, mine.skipped, mine.work) == (its.lr, its.skipped, its.work)
    assert deviation(one.after, one.before) > 1e-2  # and it did learn


def bound(model: ModelConfig, tokens: int) -> float:
    """The error model of fp32: a gradient is a sum over `tokens` products whose order the layout changes, and each of
    the roundings before it (a few dozen a layer) shows up once; errors add like a random walk."""
    return 2.0**-24 * 4 * (tokens + 32 * model.num_layers) ** 0.5


@WORLDS
@pytest.mark.parametrize("name", ["fp32", "fp32 replicated"])
def test_fp32_to_its_bound(results: Any, world: int, name: str) -> None:
    one, tolerance = results[1][0][name], bound(TIED, 8 * 13)
    for course in (r[name] for r in results[world]):
        measured = deviation(course.gradients, one.gradients)
        print(f"world {world}, {name}: gradients {measured:.1e}, weights {deviation(course.after, one.after):.1e}")
        assert measured < tolerance
        assert course.losses == pytest.approx(one.losses, rel=tolerance)
        # AdamW divides by |g| + 1e-5: where a gradient is nearly zero, its error is a hundredfold in the weight.
        assert deviation(course.after, one.after) < 100 * tolerance


@WORLDS
def test_bf16_stays_near(results: Any, world: int) -> None:
    one = results[1][0]["bf16"]
    for course in (r["bf16"] for r in results[world]):
        assert course.losses == pytest.approx(one.losses, rel=5e-3)
        assert {weight.dtype for weight in course.after.values()} == {torch.float32}


@WORLDS
@pytest.mark.parametrize("name", ["pretrain", "untied", "fp32", "replicated"])
def test_every_layout_starts_from_the_same_bits(results: Any, world: int, name: str) -> None:
    """Law Init: against the values drawn whole."""
    model = CASES[name].model
    read = random_weights(model, seed=7)
    for course in (r[name] for r in results[world]):
        for parameter, shape in parameter_shapes(model).items():
            assert torch.equal(course.before[parameter], read(parameter, whole(shape)).to(course.before[parameter]))


@WORLDS
@pytest.mark.parametrize("name", ["pretrain", "pairs", "critic", "replicated"])
def test_inferred_scores_are_those_of_the_rank_s_own_rows(results: Any, world: int, name: str) -> None:
    one, start = results[1][0][name].scores, 0
    sides = len(one.log_probs) // 8
    for rank, course in enumerate(r[name] for r in results[world]):
        rows = torch.arange(start, start + SHARES[world][rank])
        index = torch.cat([rows + 8 * side for side in range(sides)])
        torch.testing.assert_close(course.scores.log_probs, one.log_probs[index], rtol=1e-10, atol=1e-12)
        if one.classes is not None:
            torch.testing.assert_close(course.scores.classes, one.classes[index], rtol=1e-10, atol=1e-12)
        start += SHARES[world][rank]


@WORLDS
@pytest.mark.parametrize("name", ["pretrain", "replicated"])
def test_shards_cover_every_tensor_once(results: Any, world: int, name: str) -> None:
    sizes: dict[str, int] = {}
    boxes = [entry for r in results[world] for entry in r[name].boxes]
    assert len({(tensor, box) for tensor, box, _ in boxes}) == len(boxes)
    for tensor, _, count in boxes:
        sizes[tensor] = sizes.get(tensor, 0) + count
    expected = {tensor: count for tensor, _, count in results[1][0][name].boxes}
    assert sizes == expected


@WORLDS
def test_no_rank_holds_the_whole_model(results: Any, world: int) -> None:
    total = sum(count for _, _, count in results[1][0]["pretrain"].boxes)
    for r in results[world]:
        assert sum(count for _, _, count in r["pretrain"].boxes) < 1.3 * total / world


@WORLDS
def test_a_sharded_engine_without_optimizer_infers(results: Any, world: int) -> None:
    every = torch.cat([r["reference"].log_probs for r in results[world]])
    torch.testing.assert_close(every, results[1][0]["reference"].log_probs, rtol=1e-10, atol=1e-12)


@WORLDS
def test_records_are_never_cast(results: Any, world: int) -> None:
    """Advantages in bf16 would be a silent loss."""
    assert {r["dtype"] for r in [*results[1], *results[world]]} == {torch.float32}


@WORLDS
def test_the_first_ratio_is_one_on_every_rank(results: Any, world: int) -> None:
    """Law On-policy."""
    assert all(bool((r["ratios"] == 1.0).all()) for r in results[world])
    assert sum(len(r["ratios"]) - 1 for r in results[world]) == int(rollout(8).response_mask.sum())


@WORLDS
def test_a_nan_on_one_rank_is_skipped_by_all(results: Any, world: int) -> None:
    assert [r["poison"] for r in results[world]] == [(True, True)] * world


@pytest.mark.parametrize(("saved", "resumed"), [(1, 1), (1, 2), (2, 2), (1, 4), (2, 4), (4, 4)])
def test_a_checkpoint_goes_on_under_any_world_size(results: Any, saved: int, resumed: int) -> None:
    undisturbed = results[1][0]["pretrain"].after
    for r in results[resumed]:
        assert deviation(r["resumed"][saved], undisturbed) < 1e-10


def test_a_layout_resumes_to_the_same_bits(results: Any) -> None:
    """Law Resume, in the layout that saved."""
    for world in (1, 2, 4):
        for r in results[world]:
            assert all(torch.equal(r["resumed"][world][name], w) for name, w in r["pretrain"].after.items())


# --- compiled blocks --------------------------------------------------------------------------------------------------


EVEN = replace(TIED, num_heads=4, num_kv_heads=2)  # two ranks can share its heads
COMPILED = [
    ParallelConfig("tp", tensor=0),
    ParallelConfig("cp", context=0),
    ParallelConfig("pp", pipeline=0),
]


def compile_beside_eager(runtime: Runtime, layout: ParallelConfig) -> tuple[list[float], dict[str, int]]:
    """How far the gradients of two steps are apart, and how many frames were compiled."""
    engines = [build(runtime, layout, EngineConfig(compile=compiled), model=EVEN) for compiled in (True, False)]
    apart = []
    for step in range(2):
        for engine in engines:
            engine.forward_backward(packed(4, step), language_loss)
        apart.append(deviation(*map(gradients, engines)))
        for engine in engines:
            engine.step()
    return apart, dict(torch._dynamo.utils.counters["frames"])


@pytest.mark.nightly
@pytest.mark.parametrize("layout", COMPILED, ids=lambda layout: layout.name)
def test_compiled_blocks_compute_the_same_under_every_model_axis(layout: ParallelConfig) -> None:
    """Collectives stand outside of the graphs; what is between them compiles without a frame left out."""
    for (first, second), frames in run_ranks(compile_beside_eager, 2, layout, timeout_s=500.0, deadline_s=450.0):
        assert first < bound(EVEN, 4 * 13)
        assert second < 100 * bound(EVEN, 4 * 13)
        assert frames["ok"] == frames["total"] > 0
