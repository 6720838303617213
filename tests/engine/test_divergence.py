"""`framework compare` on real runs: a planted change is named by step, tensor and rank; rounding trips nothing."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MethodType

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # imported once, before the ranks are forked

from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.manager import CheckpointManager
from framework.core.records import Rows
from framework.core.runtime import Runtime
from framework.core.signals import StopRequest
from framework.engine.loop import train
from framework.engine.protocol import Piece, StepReport
from framework.engine.sketch import project
from framework.engine.torch_engine import TorchEngine
from framework.parallel.config import ParallelConfig
from framework.stages.compare import compare
from framework.tracking.folder import RunFolder
from tests.distributed import run_ranks
from tests.engine.cases import DDP, FSDP, OPTIM, SINGLE, TIED, build, language_loss, packed

MODEL = replace(TIED, num_heads=2, num_kv_heads=2)  # two tensor ranks share out its heads
TP = ParallelConfig("tp", tensor=2)
STEPS = 20
WHEN, CULPRIT = 3, "layers.1.mlp.up.weight"

Plant = Callable[[TorchEngine], None]


class Batches:
    def __init__(self, engine: TorchEngine):
        self.rank, self.size = engine.data_rank, engine.data_size

    def batch(self, step: int) -> Rows:
        return packed(4, seed=step).select(slice(self.rank * 4 // self.size, (self.rank + 1) * 4 // self.size))

    def evaluation_batches(self) -> Iterator[Rows]:
        return iter(())


class Planted(TorchEngine):
    """Something is done to the weights at the end of an update, on this rank alone."""

    plant: Plant

    def step(self) -> StepReport:
        report = super().step()
        if self.step_count == WHEN:
            self.plant()
        return report


def go(runtime: Runtime, path: Path, parallel: ParallelConfig, plant: Plant | None, steps: int) -> None:
    engine = build(runtime, parallel, model=MODEL)
    if plant is not None:
        engine.__class__, engine.plant = Planted, MethodType(plant, engine)  # type: ignore[attr-defined]
    recipe = {
        "stage": "sft",
        "parallel": {"name": parallel.name},
        "engine": {"precision": "fp32"},
        "optim": {"lr": OPTIM.lr},
    }
    folder = RunFolder.open(path, recipe, {}, ("parallel",), is_main=runtime.is_main)
    train(
        engine, Batches(engine), language_loss, total_steps=steps,
        manager=CheckpointManager(path / "checkpoints", CheckpointConfig(), runtime.rank, runtime.world_size),
        folder=folder, progress=lambda done, **figures: None, stop=StopRequest(), digest_every=1,
    )  # fmt: skip


def scaled(engine: TorchEngine) -> None:
    """A thousandth, in one matrix of the whole model."""
    engine.holdings.locals()[CULPRIT].mul_(1.001)


def one_bit(engine: TorchEngine) -> None:
    """One element of rank 1's part, by one unit in the last place."""
    if dist.get_rank() == 1:
        engine.holdings.locals()[CULPRIT].view(torch.int32).view(-1)[0] += 1


RUNS: dict[str, tuple[ParallelConfig, Plant | None, int]] = {
    "fsdp": (FSDP, None, STEPS), "fsdp again": (FSDP, None, 4), "fsdp bit": (FSDP, one_bit, 4),
    "ddp": (DDP, None, 4), "ddp bit": (DDP, one_bit, 4), "tp": (TP, None, STEPS), "tp scaled": (TP, scaled, 4),
}  # fmt: skip


def everything(runtime: Runtime, root: Path) -> None:
    for name, (parallel, plant, steps) in RUNS.items():
        go(runtime, root / name, parallel, plant, steps)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    go(Runtime(), root / "single", SINGLE, None, STEPS)
    torch.set_num_threads(threads)
    run_ranks(everything, 2, root, timeout_s=240, deadline_s=120)
    return root


def told(runs: Path, capsys: pytest.CaptureFixture[str], left: str, right: str) -> str:
    """What compare says of the tensors."""
    assert compare([str(runs / left), str(runs / right)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tensors: ")]
    print("\n".join(lines))
    return "\n".join(lines)


def test_equal_runs_of_one_layout_hold_the_same_bits(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = told(runs, capsys, "fsdp", "fsdp again")
    assert said == "tensors: the same bits in every tensor on every rank at all 5 common steps"


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_one_bit_of_one_rank_is_named(runs: Path, capsys: pytest.CaptureFixture[str], layout: str) -> None:
    said = told(runs, capsys, layout, f"{layout} bit").splitlines()
    assert said[0] == f"tensors: first differ at step 3 in the weights of {CULPRIT}, on rank 1"
    torn = [f"tensors: right: copies differ from step 3 on in the weights of {CULPRIT}, on rank 1"]
    assert said[1:] == (torn if layout == "ddp" else [])


@pytest.mark.parametrize(("left", "right"), [("single", "fsdp"), ("single", "tp"), ("fsdp", "tp")])
def test_rounding_between_layouts_stays_far_within_the_bound(
    runs: Path, capsys: pytest.CaptureFixture[str], left: str, right: str
) -> None:
    said = told(runs, capsys, left, right)
    start, found = (
        "tensors: equal within the bound over 21 common steps ",
        re.search(r"bound: (\S+) of (\S+) at step", said),
    )
    assert said.startswith(start)
    assert "; the bound is 4 x 2^-24 x sqrt(tokens + 32 x layers = 116) x 12 x sqrt(step), " in said
    assert found is not None, said
    assert float(found[1]) < 0.2 * float(found[2])


@pytest.mark.parametrize("left", ["single", "fsdp"])
def test_a_thousandth_in_one_layer_trips_it(runs: Path, capsys: pytest.CaptureFixture[str], left: str) -> None:
    said = told(runs, capsys, left, "tp scaled")
    assert said.startswith(f"tensors: differ by more than rounding, first at step 3 in the weights of {CULPRIT}: ")


def test_sums_and_signs_do_not_know_the_layout() -> None:
    """Two halves, cut either way, add up to the whole; other names and other rows of signs are independent."""
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    all_ = project(Piece("w", (6, 10), ((0, 6), (0, 10)), x, True))
    upper, lower = (
        Piece("w", (6, 10), ((0, 2), (0, 10)), x[:2], True),
        Piece("w", (6, 10), ((2, 4), (0, 10)), x[2:], True),
    )
    left, right = (
        Piece("w", (6, 10), ((0, 6), (0, 3)), x[:, :3], True),
        Piece("w", (6, 10), ((0, 6), (3, 7)), x[:, 3:], True),
    )
    for one, two in ((upper, lower), (left, right)):
        torch.testing.assert_close(project(one) + project(two), all_, rtol=1e-12, atol=1e-12)
    assert all_[0] == pytest.approx(float(x.double().square().sum()))
    assert not torch.allclose(project(Piece("v", (6, 10), ((0, 6), (0, 10)), x, True))[1:], all_[1:])
