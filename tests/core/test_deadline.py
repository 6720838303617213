"""Ranks that wait in vain say where all stand, in every layout; one that hangs is ended by its thread."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # imported once, before the ranks are forked
from torch.distributed.device_mesh import init_device_mesh

from framework.core import deadline as deadlines
from framework.core import runtime
from framework.core.deadline import ask, deadline, ending
from framework.core.errors import DeadlineError
from framework.core.records import Counts, Metrics, Rows, Scores
from framework.core.runtime import Runtime
from framework.parallel.collectives import Ranks
from framework.parallel.config import ParallelConfig
from tests.distributed import run_ranks
from tests.engine.cases import FSDP, TIED, UNTIED, build, language_loss, packed


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "BEAT_S", 0.1)
    monkeypatch.setattr(deadlines, "LINGER_S", 0.3)
    monkeypatch.setattr(deadlines, "SILENCE_S", 20.0)  # no rank dies unheard of here, and a machine may be slow


def dawdle() -> str:
    """Alive, and elsewhere, until the others have given up."""
    with contextlib.suppress(RuntimeError):  # the store is gone with the rank that held it
        dist.distributed_c10d._get_default_store().wait(["given up"], timedelta(seconds=50))
    return "away"


def given_up(error: DeadlineError) -> str:
    dist.distributed_c10d._get_default_store().set("given up", "")
    return str(error)


def _in_a_group(runtime: Runtime) -> str:
    ranks = Ranks(init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_shard", "tensor")), ("tensor",))
    with deadline("step 3"):
        ranks.sum(torch.ones(1), "what all join")
    if runtime.rank != 2:
        return dawdle()
    with pytest.raises(DeadlineError) as caught, deadline("step 4"):
        ranks.sum(torch.ones(1), "what one does not join")
    return given_up(caught.value)


def test_a_group_within_the_world_has_the_deadline_too_and_all_ranks_are_named() -> None:
    answers = run_ranks(_in_a_group, 4, deadline_s=1.0)
    assert [answers[rank] for rank in (0, 1, 3)] == ["away"] * 3
    assert "ranks 0-1, 3 are past step 3, the sum of what all join (test_deadline.py:" in answers[2]
    assert answers[2].endswith(
        "rank 2 waits at step 4, the sum of what one does not join (waited in vain; cluster.deadline_s=1)"
    )


LAYOUTS = {
    "fsdp": (FSDP, TIED),
    "tp": (ParallelConfig("tp", tensor=2), UNTIED),
    "pp": (ParallelConfig("pp", pipeline=2), TIED),
}


def _in_a_layout(runtime: Runtime, name: str) -> str:
    parallel, model = LAYOUTS[name]
    engine = build(runtime, parallel, model=model)

    def loss(scores: Scores, rows: Rows, counts: Counts) -> tuple[torch.Tensor, Metrics]:
        if engine.step_count == 1 and runtime.rank == 1:
            dawdle()
        return language_loss(scores, rows, counts)

    try:
        for step in range(3):
            engine.forward_backward(packed(4, step), loss)
            engine.step()
    except DeadlineError as error:
        return given_up(error)
    return "away"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_that_stays_away_from_a_layout_s_own_collectives(name: str) -> None:
    said = run_ranks(_in_a_layout, 2, name, deadline_s=1.5)[0]
    print(said)
    assert "rank 1 is at step 1, " in said
    assert "(test_deadline.py:" in said
    assert "in dawdle) for " in said
    assert "rank 0 waits at step 1, " in said


def _own_mistake(runtime: Runtime) -> str:
    with pytest.raises(RuntimeError) as caught, deadline("a product"):
        torch.ones(2, 3) @ torch.ones(2, 3)
    return type(caught.value).__name__


def test_our_own_errors_keep_their_shape() -> None:
    assert run_ranks(_own_mistake, 2) == ["RuntimeError"] * 2


# --- ranks that no exception reaches -------------------------------------------------------------------------------


def _rank(rank: int, address: str, folder: Path, deed: Callable[[int], None]) -> None:
    runtime.start("cpu", 1, rank=rank, world_size=2, address=address, deadline_s=1.0)
    with ending(lambda error: (folder / f"{rank}.txt").write_text(str(error))), deadline(f"the work of {rank}"):
        dist.barrier()
        deed(rank)


def hang(rank: int) -> None:
    signal.pause()


def outlive(rank: int) -> None:
    """Rank 0, which holds the store, dies."""
    if rank == 0:
        time.sleep(0.5)  # until the other has heard of it
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def start(folder: Path, deed: Callable[[int], None]) -> list[int | None]:
    """The exit codes of two ranks that did `deed`."""
    fork, address = multiprocessing.get_context("fork"), f"127.0.0.1:{runtime.free_port()}"
    ranks = [fork.Process(target=_rank, args=(rank, address, folder, deed), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    return [process.exitcode for process in ranks]


def test_a_main_thread_that_hangs_is_ended_from_another_with_one_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "MARGIN_S", 0.5)
    assert start(tmp_path, hang) == [1, 1]
    said = {path.read_text() for path in tmp_path.iterdir()}
    assert len(said) == 1
    assert "rank 0 is at the work of 0 (test_deadline.py:" in said.pop()


def test_a_rank_that_outlives_the_store_tells_what_it_had_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "MARGIN_S", 0.5)
    assert start(tmp_path, outlive) == [-9, 1]
    said = (tmp_path / "1.txt").read_text()
    assert said.startswith("rank 0 has left or died; its last phase was the work of 0; rank 1 is at the work of 1 (")


def test_one_who_is_no_rank_may_ask() -> None:
    assert ask("127.0.0.1", runtime.free_port(), 2) == ""
