"""Law Layout under DeepSpeed: ZeRO-1, -2, -3 and -3 with offload give the torch engine's answer, to the fp32 bound.

Real gloo ranks. One launch a world size goes through all cases; the tests then only compare. DeepSpeed keeps to the
ranks: this process never initialises it.
"""

import gc
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # imported once, before the ranks are forked
from torch import Tensor

from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.integrity import MODULUS, tensor_hash
from framework.checkpoint.manager import Checkpoint, CheckpointManager
from framework.core.errors import NonFiniteError
from framework.core.records import Box, Counts, Experience, Metrics, Rows, Scores, whole
from framework.core.runtime import Runtime
from framework.engine.config import EngineConfig, NonFinite, Precision
from framework.engine.metrics import means
from framework.engine.protocol import Engine, LossFn, StepReport
from framework.models.config import ModelConfig
from framework.models.init import parameter_shapes, random_weights
from framework.optim.config import OptimConfig
from framework.parallel.config import ParallelConfig, Recompute
from framework.workers.actor import PolicyLoss
from framework.workers.config import PpoConfig
from tests.distributed import run_ranks
from tests.engine.cases import (
    DDP,
    FSDP,
    OPTIM,
    SINGLE,
    TIED,
    UNTIED,
    build,
    deviation,
    language_loss,
    packed,
    pairs,
    ranking_loss,
    rollout,
    value_loss,
    weights,
)
from tests.engine.lattice import MODEL
from tests.engine.test_layouts import bound, share

os.environ["DS_ACCELERATOR"] = "cpu"
pytest.importorskip("deepspeed")
pytest.importorskip("deepspeed.runtime.zero.muon.muon_optimizer")  # a second and more, that ranks would spend each

STEPS = 5
STAGES = {f"zero{stage}": ParallelConfig(f"zero{stage}", zero=stage) for stage in (1, 2, 3)}
ZERO = {**STAGES, "zero3_offload": ParallelConfig("zero3_offload", zero=3, offload=True)}
AGAIN = [("zero2", Recompute.SELECTIVE), ("zero3", Recompute.FULL)]
LAYOUTS = {**ZERO, "fsdp": FSDP, "ddp": DDP, "single": SINGLE}
Held = list[tuple[str, Box, Tensor]]


def experience(count: int, seed: int = 0) -> Experience:
    """A rollout whose old log-probs are those of a uniform policy, with made-up advantages."""
    drawn = rollout(count, seed)
    mask = drawn.response_mask
    wave = torch.sin(torch.arange(mask.numel()) + seed).reshape(mask.shape) * mask
    old = torch.full_like(wave, -3.6) * mask
    return Experience(drawn, old, old, wave, wave, wave, wave)


POLICY = PolicyLoss(PpoConfig(entropy_coefficient=0.01))


@dataclass(frozen=True)
class Case:
    """One thing to train, and how."""

    rows: Callable[[int, int], Rows] = packed
    loss_fn: LossFn = language_loss
    model: ModelConfig = TIED
    precision: Precision = Precision.FP32
    optim: OptimConfig = OPTIM
    heads: dict[str, Any] = field(default_factory=dict)


CASES = {
    "pretrain": Case(),
    "pairs": Case(rows=pairs, loss_fn=ranking_loss, heads={"num_classes": 1}),
    "critic": Case(rows=rollout, loss_fn=value_loss, heads={"value_head": True}),
    "policy": Case(
        rows=experience,
        loss_fn=PolicyLoss(PpoConfig(entropy_coefficient=0.01)),
        model=UNTIED,
        heads={"temperature": 0.7},
    ),
}
VARIANTS = {
    "plain": Case(optim=replace(OPTIM, clip=0.0, weight_decay=5.0)),
    "bf16": Case(precision=Precision.BF16),
    "fp64": Case(precision=Precision.FP64),
}


@dataclass(frozen=True)
class Course:
    """What a rank saw of a case."""

    figures: list[dict[str, float]]  # of every step, the loss among them
    reports: list[StepReport]
    first: Held  # what it held after one step
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    fingerprints: dict[str, int]
    scores: Scores  # of this rank's rows
    valid: dict[str, float]


def train(runtime: Runtime, parallel: ParallelConfig, case: Case) -> Course:
    config = EngineConfig(precision=case.precision)
    engine = build(runtime, parallel, config, case.model, optim=case.optim, **case.heads)
    before, figures, reports = weights(engine), [], []
    for step in range(STEPS):
        metrics = engine.forward_backward(share(case.rows(8, step), runtime), case.loss_fn)
        figures.append(means(metrics))
        reports.append(engine.step())
        if step == 0:
            first = copied(engine.shards())
        if step == 1:  # inference between two steps must not leave old weights behind
            scores = engine.infer(share(case.rows(8, 50), runtime))
            valid = means(engine.measure(share(case.rows(8, 60), runtime), case.loss_fn))
    return Course(figures, reports, first, before, weights(engine), engine.fingerprints(), scores, valid)


def copied(shards: Iterable[tuple[str, Box, Tensor]]) -> Held:
    return [(name, box, tensor.clone()) for name, box, tensor in shards]


def put_together(ranks: list[Held]) -> dict[str, Tensor]:
    """Whole tensors from what every rank held; a hole or an overlap fails."""
    boxes: dict[str, list[tuple[Box, Tensor]]] = {}
    for name, box, tensor in (entry for held in ranks for entry in held):
        boxes.setdefault(name, []).append((box, tensor))
    together = {}
    for name, parts in boxes.items():
        shape = [max(offset + length for offset, length in sides) for sides in zip(*(box for box, _ in parts))]
        result, seen = torch.zeros(shape, dtype=parts[0][1].dtype), torch.zeros(shape, dtype=torch.int64)
        for box, tensor in parts:
            place = tuple(slice(offset, offset + length) for offset, length in box)
            result[place] = tensor
            seen[place] += 1
        assert bool((seen == 1).all()), name
        together[name] = result
    return together


# --- what every rank goes through ----------------------------------------------------------------------------------


def everything(runtime: Runtime, folder: Path, cases: list[str], layouts: list[str]) -> dict[str, Any]:
    """The cases under the layouts, and, on two ranks, the rarer happenings."""
    gc.freeze()  # DeepSpeed collects garbage again and again, through all that this process was forked with
    results: dict[str, Any] = {
        f"{layout} {name}": train(runtime, LAYOUTS[layout], CASES[name]) for layout in layouts for name in cases
    }
    results["undisturbed"] = save_all(runtime, folder)
    results["resumed"] = resume_all(runtime, folder)
    if runtime.world_size == 2:
        for layout in STAGES:
            results |= {f"{layout} {name}": train(runtime, LAYOUTS[layout], case) for name, case in VARIANTS.items()}
            results[f"{layout} bf16 poison"] = poison_one_rank(runtime, LAYOUTS[layout], Precision.BF16)
            results[f"{layout} loss alone"] = poison_the_loss(runtime, LAYOUTS[layout])
            results[f"{layout} dtypes"] = dtypes_in_bf16(runtime, LAYOUTS[layout])
        results |= {f"{layout} poison": poison_one_rank(runtime, LAYOUTS[layout]) for layout in ZERO}
        results |= {f"{layout} reference": only_infer(runtime, LAYOUTS[layout]) for layout in [*ZERO, "ddp"]}
        results |= {f"{layout} ratios": first_ratios(runtime, LAYOUTS[layout]) for layout in ZERO}
        results |= {f"{layout} again": compute_again(runtime, ZERO[layout], how) for layout, how in AGAIN}
        results["stop"] = stop_on_nan(runtime)
        results["together"] = two_at_once(runtime)
        results["parts"] = largest_part(runtime)
        results["chain"] = [go_a_leg(runtime, layout, folder) for layout in CHAIN[:-1]]
        results["linear"] = torch.nn.functional.linear.__module__
    return results


def compute_again(runtime: Runtime, parallel: ParallelConfig, how: Recompute) -> tuple[int, int, bool]:
    """(numbers kept for backward, those kept without recomputation, the weights after a step have the same bits)."""
    kept, after = [], []
    for config in (replace(parallel, recompute=how), parallel):
        engine, sizes = build(runtime, config), list[int]()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            engine.forward_backward(share(packed(8, 0), runtime), language_loss)
        engine.step()
        kept.append(sum(sizes))
        after.append(engine.digest())
    return kept[0], kept[1], after[0] == after[1]


def poisoned(loss_fn: LossFn, runtime: Runtime, factor: float, term: float) -> LossFn:
    """`loss_fn` times `factor` plus `term` on the last rank alone."""

    def spoiled(scores: Scores, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
        loss, metrics = loss_fn(scores, rows, counts)
        return (loss * factor + term if runtime.rank == runtime.world_size - 1 else loss), metrics

    return spoiled


def skip_one(runtime: Runtime, parallel: ParallelConfig, precision: Precision, loss_fn: LossFn) -> tuple[bool, ...]:
    """(the spoiled step was skipped, it changed no bit, the next one was as if it had been the first)."""
    config = EngineConfig(non_finite=NonFinite.SKIP, precision=precision)
    spoiled, clean = build(runtime, parallel, config), build(runtime, parallel, config)
    before = copied(spoiled.shards())
    spoiled.forward_backward(share(packed(8), runtime), loss_fn)
    skipped = spoiled.step().skipped
    after = copied(spoiled.shards())
    same = all(torch.equal(a, b) for (name, _, a), (_, _, b) in zip(before, after) if name != "optim/steps")
    clean.step_count = 1  # the learning rate follows the steps, the bias correction the updates
    for engine in (spoiled, clean):
        engine.forward_backward(share(packed(8, 1), runtime), language_loss)
        assert not engine.step().skipped
    mine, its = copied(spoiled.shards()), copied(clean.shards())
    return skipped, same, all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(mine, its))


def poison_one_rank(runtime: Runtime, parallel: ParallelConfig, precision: Precision = Precision.FP32) -> Any:
    return skip_one(runtime, parallel, precision, poisoned(language_loss, runtime, float("nan"), 0.0))


def poison_the_loss(runtime: Runtime, parallel: ParallelConfig) -> Any:
    """An infinite loss whose gradient is finite."""
    return skip_one(runtime, parallel, Precision.FP32, poisoned(language_loss, runtime, 1.0, float("inf")))


def dtypes_in_bf16(runtime: Runtime, parallel: ParallelConfig) -> dict[str, torch.dtype]:
    engine: Any = build(runtime, parallel, EngineConfig(precision=Precision.BF16))
    computed, added_up = engine._zero.get_data_types()
    return {"compute": computed, "sum": added_up, "reduction": engine._zero.communication_data_type}


def stop_on_nan(runtime: Runtime) -> str:
    engine = build(runtime, ZERO["zero2"])
    engine.forward_backward(share(packed(8), runtime), poisoned(language_loss, runtime, float("nan"), 0.0))
    with pytest.raises(NonFiniteError) as error:
        engine.step()
    return str(error.value)


def only_infer(runtime: Runtime, parallel: ParallelConfig) -> Scores:
    """A reference model, no optimizer and no gradients, after it was given other weights: none of the old are left."""
    engine = build(runtime, parallel, optim=None)
    engine.infer(share(packed(8, 50), runtime))
    engine.load_weights(random_weights(TIED, seed=8))
    return engine.infer(share(packed(8, 50), runtime))


def first_ratios(runtime: Runtime, parallel: ParallelConfig) -> Tensor:
    """exp(log_probs - old_log_probs) of this rank's responses at the first update, rows in reversed order."""
    engine, rows, ratios = build(runtime, parallel), share(rollout(8), runtime), [torch.ones(1)]
    old = engine.infer(rows).log_probs.flip(0)

    def watching(scores: Scores, part: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
        mask, done = part.inputs().loss_mask, len(ratios) - 1
        before = old[2 * done : 2 * done + len(part)]
        if len(before):  # not the filler of a rank without rows
            ratios.append((scores.log_probs.detach() - before)[mask].exp())
        return language_loss(scores, part, counts)

    engine.forward_backward(rows.select(torch.arange(len(rows)).flip(0)), watching)
    return torch.cat(ratios)


def two_at_once(runtime: Runtime) -> dict[str, dict[str, Tensor]]:
    """Actor and critic of one process, taking turns, and a reference between them."""
    parallel, after = ZERO["zero3"], {}
    reference = build(runtime, parallel, optim=None)
    cases = {name: CASES[name] for name in ("policy", "critic")}
    engines = {name: build(runtime, parallel, model=case.model, **case.heads) for name, case in cases.items()}
    for step in range(STEPS):
        for name, case in cases.items():
            engines[name].forward_backward(share(case.rows(8, step), runtime), case.loss_fn)
            reference.infer(share(packed(8, step), runtime))
            engines[name].step()
    for name, engine in engines.items():
        after[name] = weights(engine)
    return after


def largest_part(runtime: Runtime) -> dict[str, float]:
    """Elements that this rank holds for good under ZeRO-3, as a share of the model: masters, moments, compute copy."""
    engine = build(runtime, ZERO["zero3"], model=UNTIED)
    held: dict[str, int] = {}
    for name, _, tensor in engine.shards():
        kind = name.split("/")[1] if name.startswith("optim") else "model"
        held[kind] = held.get(kind, 0) + tensor.numel()
    scorer: Any = engine.scorer
    held["copy"] = sum(p.ds_tensor.numel() for p in scorer.parameters())
    held["whole"] = sum(p.data.numel() for p in scorer.parameters())
    total = sum(p.ds_numel for p in scorer.parameters())
    return {kind: held[kind] / total for kind in ("model", "exp_avg", "copy", "whole")}


# Where a checkpoint goes on: saved under (layout, world) -> resumed under these layouts at every world launched later.
ROUTES: dict[tuple[str, int], dict[int, list[str]]] = {
    ("single", 1): {2: ["zero1", "zero2", "zero3_offload"]},
    ("zero1", 2): {2: ["zero1", "zero3", "fsdp"], 1: ["zero1", "single"]},
    ("zero2", 2): {2: ["zero2"], 1: ["zero2"], 4: ["zero2"]},
    ("zero3", 2): {2: ["zero3", "zero1", "ddp"], 1: ["zero3", "single"], 4: ["zero3"]},
    ("zero3_offload", 2): {2: ["zero3_offload", "zero3"]},
    ("fsdp", 2): {2: ["zero3"]},
    ("zero2", 1): {4: ["zero2"]},  # from 2 ranks to 1 to 4
}


def save_all(runtime: Runtime, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Save after 2 steps under every layout of this world that a route starts from, and take two more: the weights."""
    after, world = {}, runtime.world_size
    for layout in [layout for layout, saved_by in ROUTES if saved_by == world and layout != "single"]:
        engine = build(runtime, LAYOUTS[layout])
        if world == 1:  # what two ranks have begun
            engine.load_shards(newest(folder, layout, 2, runtime).reader("trainer"))
        else:
            steps(engine, runtime, 0, 1)
        manager(folder, layout, world, runtime).save(2, {"trainer": engine.shards()}, {})
        steps(engine, runtime, 2, 3)
        after[layout] = weights(engine)
    return after


def resume_all(runtime: Runtime, folder: Path) -> dict[tuple[str, int, str], tuple[Held, float, dict[str, Tensor]]]:
    """(saved under, its world, resumed under) -> (what was loaded, loss of the next step, weights after two more)."""
    return {
        (layout, saved_by, under): go_on(runtime, newest(folder, layout, saved_by, runtime), LAYOUTS[under])
        for (layout, saved_by), routes in ROUTES.items()
        for under in routes.get(runtime.world_size, [])
    }


def manager(folder: Path, layout: str, saved_by: int, runtime: Runtime) -> CheckpointManager:
    return CheckpointManager(folder / f"{layout}@{saved_by}", CheckpointConfig(), runtime.rank, runtime.world_size)


def newest(folder: Path, layout: str, saved_by: int, runtime: Runtime | None = None) -> Checkpoint:
    found = manager(folder, layout, saved_by, runtime or Runtime()).latest()
    assert found is not None
    return found


def go_on(runtime: Runtime, found: Checkpoint, under: ParallelConfig) -> tuple[Held, float, dict[str, Tensor]]:
    engine = build(runtime, under)
    engine.load_shards(found.reader("trainer"))
    loaded = copied(engine.shards())
    loss, _ = steps(engine, runtime, 2, 3)
    return loaded, loss, weights(engine)


def steps(engine: Engine, runtime: Runtime, *numbers: int) -> list[float]:
    """The losses of these steps."""
    losses = []
    for step in numbers:
        metrics = engine.forward_backward(share(packed(8, step), runtime), language_loss)
        losses.append(means(metrics)["loss"])
        engine.step()
    return losses


# From engine to engine: each layout takes one step from where the one before it has stopped.
CHAIN = [STAGES["zero3"], FSDP, ParallelConfig("tp", tensor=0), SINGLE]


@dataclass(frozen=True)
class Leg:
    """What a layout of the chain read, wrote at once again, and did next. Hashes are of every tensor, by name."""

    read: dict[str, str]
    written: dict[str, str]
    loss: float


def go_a_leg(runtime: Runtime, layout: ParallelConfig, folder: Path) -> Leg:
    at, ranks = CHAIN.index(layout), (runtime.rank, runtime.world_size)
    engine, hashes = build(runtime, layout, model=MODEL), [{}, {}]
    if at:
        found = CheckpointManager(folder / f"leg{at - 1}", CheckpointConfig(), *ranks).latest()
        assert found is not None
        engine.load_shards(found.reader("trainer"))
        again = CheckpointManager(folder / f"again{at}", CheckpointConfig(), *ranks)
        hashes = [c.hashes("trainer") for c in (found, again.save(at, {"trainer": engine.shards()}, {}))]
    rows = packed(8, at)
    mine = rows.select(torch.arange(8).tensor_split(engine.data_size)[engine.data_rank])
    loss = means(engine.forward_backward(mine, language_loss))["loss"]
    engine.step()
    CheckpointManager(folder / f"leg{at}", CheckpointConfig(), *ranks).save(at + 1, {"trainer": engine.shards()}, {})
    return Leg(*hashes, loss)


# --- the launches --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """One process of the torch engine: what all must equal."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    results: dict[str, Any] = {n: train(Runtime(), SINGLE, case) for n, case in {**CASES, **VARIANTS}.items()}
    engine = build()
    results["losses"] = steps(engine, Runtime(), 0, 1)
    manager(folder, "single", 1, Runtime()).save(2, {"trainer": engine.shards()}, {})
    results["losses"] += steps(engine, Runtime(), 2, 3)
    results["after"] = weights(engine)
    results["reference"] = only_infer(Runtime(), SINGLE)
    results["chain"] = steps(build(model=MODEL), Runtime(), *range(len(CHAIN)))
    torch.set_num_threads(before)
    return results


@pytest.fixture(scope="module")
def results(alone: dict[str, Any], folder: Path) -> dict[int, list[dict[str, Any]]]:
    """World size -> by rank -> case -> what it saw. In this order: the later ones read what the earlier have saved."""
    two = run_ranks(everything, 2, folder, list(CASES), list(ZERO), timeout_s=240)
    one = run_ranks(everything, 1, folder, ["pretrain"], list(ZERO), timeout_s=120)
    four = run_ranks(everything, 4, folder, ["pretrain"], ["zero2", "zero3"], timeout_s=240)
    return {1: one, 2: two, 4: four}


def launched(world: int) -> list[str]:
    """Layout and case, as everything() names them."""
    names = list(CASES) if world == 2 else ["pretrain"]
    return [f"{layout} {name}" for layout in (["zero2", "zero3"] if world == 4 else ZERO) for name in names]


EVERY = pytest.mark.parametrize(("world", "name"), [(world, name) for world in (1, 2, 4) for name in launched(world)])
EACH = pytest.mark.parametrize("layout", list(ZERO))
EACH_STAGE = pytest.mark.parametrize("layout", list(STAGES))


def losses(course: Course) -> list[float]:
    return [figures.get("loss", figures.get("policy_loss", 0.0)) for figures in course.figures]


def gradient(ranks: list[Held]) -> dict[str, Tensor]:
    """Of the first step, clipped: Adam's first moment is (1 - beta1) times it, rounded once."""
    states = put_together(ranks)
    return {name: state / (1 - OPTIM.beta1) for name, state in states.items() if name.startswith("optim/exp_avg/")}


@EVERY
def test_one_answer_to_the_fp32_bound(results: Any, alone: Any, world: int, name: str) -> None:
    one, tolerance = alone[name.split()[1]], bound(CASES[name.split()[1]].model, 8 * 13)
    courses = [r[name] for r in results[world]]
    measured = deviation(gradient([c.first for c in courses]), gradient([one.first]))
    print(f"world {world}, {name}: gradients {measured:.1e}, weights {deviation(courses[0].after, one.after):.1e}")
    assert measured < tolerance
    for course in courses:
        assert losses(course) == pytest.approx(losses(one), rel=tolerance, abs=tolerance)
        assert course.figures[0] == pytest.approx(one.figures[0], rel=tolerance, abs=tolerance)
        for figures, its_figures in zip(course.figures, one.figures, strict=True):
            assert figures == pytest.approx(its_figures, rel=100 * tolerance, abs=100 * tolerance)
        assert course.valid == pytest.approx(one.valid, rel=100 * tolerance, abs=100 * tolerance)
        # AdamW divides by |g| + 1e-5: where a gradient is nearly zero, its error is a hundredfold in the weight.
        assert deviation(course.after, one.after) < 100 * tolerance
        for mine, its in zip(course.reports, one.reports):
            assert mine.grad_norm == pytest.approx(its.grad_norm, rel=10 * tolerance)
            assert (mine.lr, mine.skipped, mine.work) == (its.lr, its.skipped, its.work)
    assert deviation(one.after, one.before) > 1e-2  # and it did learn


def test_the_cases_clip_and_do_not(alone: Any) -> None:
    norms = [report.grad_norm for report in alone["pretrain"].reports]
    assert min(norms) < OPTIM.clip < max(norms)


@EACH_STAGE
def test_the_optimizer_s_figures_are_ours(results: Any, alone: Any, layout: str) -> None:
    """Without a clip, and with a decay of 5 that a figure of DeepSpeed's own, or one on norms, would miss."""
    one, tolerance = alone["plain"], bound(TIED, 8 * 13)
    assert deviation(one.after, alone["pretrain"].after) > 1e-2
    for r in results[2]:
        assert deviation(r[f"{layout} plain"].after, one.after) < 100 * tolerance


@EACH_STAGE
def test_bf16_computes_beside_fp32_masters(results: Any, alone: Any, layout: str) -> None:
    one, pretrain = alone["bf16"], results[2][0][f"{layout} pretrain"]
    for course in (r[f"{layout} bf16"] for r in results[2]):
        assert losses(course) == pytest.approx(losses(one), rel=5e-3)
        assert losses(course) != pytest.approx(losses(pretrain), rel=1e-6)
        assert all(torch.equal(course.before[name], weight) for name, weight in one.before.items())
        assert {tensor.dtype for name, _, tensor in course.first if name != "optim/steps"} == {torch.float32}


@EACH_STAGE
def test_bf16_gradients_are_reduced_and_added_up_in_fp32(results: Any, layout: str) -> None:
    """As DeepSpeed itself understood what it was told; by itself it would stay in bf16."""
    expected = {"compute": torch.bfloat16, "sum": torch.float32, "reduction": torch.float32}
    assert [r[f"{layout} dtypes"] for r in results[2]] == [expected] * 2


@EACH_STAGE
def test_fp64_is_held_to_the_fp32_bound(results: Any, alone: Any, layout: str) -> None:
    """The compute is fp64, the masters are fp32."""
    one, tolerance = alone["fp64"], bound(TIED, 8 * 13)
    for course in (r[f"{layout} fp64"] for r in results[2]):
        assert losses(course) == pytest.approx(losses(one), rel=tolerance)
        assert deviation(course.after, one.after) < 100 * tolerance
        assert {tensor.dtype for name, _, tensor in course.first if name != "optim/steps"} == {torch.float32}


@EVERY
def test_every_layout_starts_from_the_same_bits(results: Any, world: int, name: str) -> None:
    """Law Init: against the values drawn whole."""
    model = CASES[name.split()[1]].model
    read = random_weights(model, seed=7)
    for course in (r[name] for r in results[world]):
        for parameter, shape in parameter_shapes(model).items():
            if parameter in course.before:  # an untied head is dropped where nothing asks for labels
                assert torch.equal(course.before[parameter], read(parameter, whole(shape)))


@EVERY
def test_fingerprints_are_of_the_weights_that_are_handed_out(results: Any, world: int, name: str) -> None:
    """Law Sync."""
    ranks = [r[name].fingerprints for r in results[world]]
    for parameter, weight in results[world][0][name].after.items():
        assert sum(rank.get(parameter, 0) for rank in ranks) % MODULUS == tensor_hash(weight)


@EVERY
def test_shards_cover_every_tensor_once(results: Any, alone: Any, world: int, name: str) -> None:
    together, one = put_together([r[name].first for r in results[world]]), alone[name.split()[1]].first
    assert {n: t.shape for n, t in together.items()} == {n: t.shape for n, _, t in one}


@EVERY
def test_inferred_scores_are_those_of_the_rank_s_own_rows(results: Any, alone: Any, world: int, name: str) -> None:
    one, parts = alone[name.split()[1]].scores, [r[name].scores for r in results[world]]
    for leaf in ("log_probs", "values", "classes"):
        if getattr(one, leaf) is not None:
            sides = len(one.log_probs) // 8
            mine = torch.cat([getattr(part, leaf).unflatten(0, (sides, -1)) for part in parts], dim=1).flatten(0, 1)
            torch.testing.assert_close(mine, getattr(one, leaf), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "what",
    [*(f"{layout} poison" for layout in ZERO), *(f"{s} {w}" for s in STAGES for w in ("bf16 poison", "loss alone"))],
)
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(results: Any, what: str) -> None:
    assert [r[what] for r in results[2]] == [(True, True, True)] * 2


def test_a_nan_stops_by_default(results: Any) -> None:
    assert all("engine.non_finite=skip" in r["stop"] for r in results[2])


@pytest.mark.parametrize("layout", [*ZERO, "ddp"])
def test_a_reference_infers(results: Any, alone: Any, layout: str) -> None:
    every = torch.cat([r[f"{layout} reference"].log_probs for r in results[2]])
    torch.testing.assert_close(every, alone["reference"].log_probs, rtol=1e-5, atol=1e-6)
    assert torch.equal(every, torch.cat([r["ddp reference"].log_probs for r in results[2]]))


@EACH
def test_the_first_ratio_is_one_on_every_rank(results: Any, layout: str) -> None:
    """Law On-policy."""
    assert all(bool((r[f"{layout} ratios"] == 1.0).all()) for r in results[2])
    assert sum(len(r[f"{layout} ratios"]) - 1 for r in results[2]) == int(rollout(8).response_mask.sum())


@pytest.mark.parametrize("name", ["policy", "critic"])
def test_two_engines_of_one_process_do_not_disturb_each_other(results: Any, name: str) -> None:
    for r in results[2]:
        apart = r[f"zero3 {name}"].after
        assert all(torch.equal(weight, apart[parameter]) for parameter, weight in r["together"][name].items())


def test_no_rank_holds_the_whole_model(results: Any) -> None:
    """ZeRO-3, before its first forward. Norms and biases, which stay whole, are a twentieth of this model."""
    for r in results[2]:
        parts = r["parts"]
        assert max(parts["model"], parts["exp_avg"], parts["copy"]) < 0.55, parts
        assert parts["whole"] < 0.1, parts


def test_torch_s_own_linear_is_left_in_place(results: Any) -> None:
    assert {r["linear"] for r in results[2]} == {torch.nn.functional.linear.__module__}


RESUMED = [
    (layout, saved_by, world, under)
    for (layout, saved_by), routes in ROUTES.items()
    for world, unders in routes.items()
    for under in unders
]


@pytest.mark.parametrize(("layout", "saved_by", "world", "under"), RESUMED)
def test_a_checkpoint_goes_on_anywhere(
    results: Any, alone: Any, folder: Path, layout: str, saved_by: int, world: int, under: str
) -> None:
    read = newest(folder, layout, saved_by).reader("trainer")
    courses = [r["resumed"][layout, saved_by, under] for r in results[world]]
    loaded, tolerance = put_together([held for held, _, _ in courses]), bound(TIED, 8 * 13)
    assert sorted(loaded) == read.names
    assert all(torch.equal(loaded[name], read(name, whole(read.shape(name)))) for name in loaded)
    for _, loss, after in courses:
        assert loss == pytest.approx(alone["losses"][2], rel=tolerance)
        assert deviation(after, alone["after"]) < 100 * tolerance


@pytest.mark.parametrize(("layout", "how"), AGAIN)
def test_blocks_computed_again_keep_less_and_give_the_same_bits(results: Any, layout: str, how: Recompute) -> None:
    for r in results[2]:
        kept, all_of_it, same = r[f"{layout} again"]
        assert kept < all_of_it / 2
        assert same


def test_from_deepspeed_over_fsdp_and_tp_to_one_process(results: Any, alone: Any, folder: Path) -> None:
    """Weights and optimizer states pass every hand-over to the bit; the steps are one process's."""
    (legs, its_legs), tolerance = [r["chain"] for r in results[2]], bound(MODEL, 8 * 13)
    last = go_a_leg(Runtime(), SINGLE, folder)
    for leg in [*legs[1:], *its_legs[1:], last]:
        assert {name.split("/")[0] for name in leg.read} == {"model", "optim"}
        assert leg.written == leg.read
    for taken in (legs, its_legs):
        assert [leg.loss for leg in [*taken, last]] == pytest.approx(alone["chain"], rel=tolerance)


@EACH
def test_a_layout_resumes_to_the_same_bits(results: Any, layout: str) -> None:
    """Law Resume, in the layout that saved."""
    for r in results[2]:
        _, _, after = r["resumed"][layout, 2, layout]
        assert all(torch.equal(weight, after[name]) for name, weight in r["undisturbed"][layout].items())
