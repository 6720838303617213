"""Steps go on while a save is written; what is written are the values of its step; nothing grows; no failure is lost.

A disk is slow here because a test holds the writer at a gate: order is what is asserted, never time.
"""

import errno
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # imported once, before the ranks are forked

from framework.checkpoint import format as files
from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.format import Shards
from framework.checkpoint.manager import CheckpointManager
from framework.checkpoint.saver import HostMemory, Saver
from framework.core.errors import CheckpointError, DeadlineError, FrameworkError, Interrupted, LeftAtOnce
from framework.core.records import whole
from framework.core.runtime import Runtime
from tests.checkpoint.cases import content, folders, holds
from tests.distributed import run_ranks
from tests.engine.test_loop import go

_LONG_S = 60.0  # for a gate that never opens


class Disk:
    """Stands before every part that is written; holds it while `gate` is closed."""

    def __init__(self) -> None:
        self.gate, self.reached = threading.Event(), threading.Event()
        self.busy = self.busiest = 0
        self.gate.set()

    def write(self, *arguments: Any) -> Any:
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        self.reached.set()
        assert self.gate.wait(_LONG_S), "the writer was waited for"
        try:
            return self.real(*arguments)
        finally:
            self.busy -= 1

    real = staticmethod(files._write_safetensors)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk()
    monkeypatch.setattr(files, "_write_safetensors", made.write)
    yield made
    made.gate.set()


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def look_for_ever(saver: Saver) -> None:
    while True:
        saver.look()


def manager(folder: Path, **config: Any) -> CheckpointManager:
    return CheckpointManager(folder, CheckpointConfig(**config))


def test_what_is_written_are_the_values_of_its_step(tmp_path: Path, disk: Disk) -> None:
    shards = list(content(3))
    state: dict[str, Any] = {"figures": {"loss": 1.0}}
    with Saver(manager(tmp_path)) as saver:
        disk.gate.clear()
        saver.save(3, {"model": shards}, state, {})
        for _, _, tensor in shards:
            tensor.add_(1)
        state["figures"]["loss"] = 0.5
        assert disk.reached.wait(_LONG_S)
        saver.look()
        assert folders(tmp_path) == [".step_00000003.partial"]
        disk.gate.set()
    found = manager(tmp_path).latest()
    assert holds(found, 3)
    assert found is not None
    assert found.state == {"figures": {"loss": 1.0}}


def test_training_goes_on_and_the_next_save_waits(tmp_path: Path, disk: Disk) -> None:
    """Step 3 is done while the save of step 2 stands at the gate. Were it waited for, the gate would never open."""
    there: list[list[str]] = []

    def progress(step: int, **_: Any) -> None:
        if step == 1:
            disk.gate.clear()
        if step == 3:
            assert disk.reached.is_set()
            there.append(folders(tmp_path / "checkpoints"))
            disk.gate.set()

    go(tmp_path, progress=progress)
    assert there == [[".step_00000002.partial"]]
    assert disk.busiest == 1
    assert folders(tmp_path / "checkpoints") == ["step_00000004", "step_00000006"]


def test_one_save_at_most_is_under_way_and_each_becomes_a_checkpoint(tmp_path: Path, disk: Disk) -> None:
    with Saver(manager(tmp_path, keep=20)) as saver:
        for step in range(1, 11):
            saver.save(step, {"model": content(step)}, {}, {})
            assert folders(tmp_path)[-1] == f"step_{step - 1:08d}" or step == 1
    assert disk.busiest == 1
    assert folders(tmp_path) == [f"step_{step:08d}" for step in range(1, 11)]


def test_without_background_it_is_there_at_once(tmp_path: Path) -> None:
    told = []
    with Saver(manager(tmp_path, background=False), then=lambda: told.append(1)) as saver:
        saver.save(1, {"model": content(1)}, {}, {})
        assert folders(tmp_path) == ["step_00000001"]
        assert told == [1]


def test_memory_does_not_grow_over_200_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is 2 MB: one that stayed behind each time would be 360 MB. Nobody waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    shape = (128, 1024)
    shards = [(f"model/{n}", whole(shape), torch.full(shape, float(n))) for n in range(4)]
    with Saver(manager(tmp_path, keep=1)) as saver:
        for step in range(1, 21):
            saver.save(step, {"model": shards}, {}, {})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for step in range(21, 201):
            saver.save(step, {"model": shards}, {}, {})
        assert threading.active_count() < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kB


def test_copies_use_the_memory_of_the_last_ones_where_shapes_fit() -> None:
    memory = HostMemory()
    first = memory.hold({"a": content(1), "b": content(2)})
    places = [tensor.data_ptr() for part in first.values() for _, _, tensor in part]
    second = memory.hold({"a": content(3), "b": content(4)})
    assert [tensor.data_ptr() for part in second.values() for _, _, tensor in part] == places
    assert torch.equal(second["b"][0][2], next(iter(content(4)))[2])
    ((_, _, wider),) = memory.hold({"a": [("model/w", whole((20, 30)), torch.ones(20, 30, dtype=torch.float64))]})["a"]
    assert wider.dtype == torch.float64


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_writer_that_failed_is_told_at_the_next_safe_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Saver(manager(tmp_path)) as saver:
        saver.save(2, {"model": content(2)}, {}, {})
        saver.finish()
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_bytes", full)
            saver.save(4, {"model": content(4)}, {}, {})
            with pytest.raises(CheckpointError, match=r"^cannot save step 4 in .*: No space left on device") as caught:
                look_for_ever(saver)
    assert "\n" not in str(caught.value)
    assert folders(tmp_path) == ["step_00000002"]


def test_a_writer_that_failed_fails_the_run_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(tmp_path, steps=3)
    monkeypatch.setattr(files, "_write_safetensors", full)
    with pytest.raises(CheckpointError, match="cannot save step 4 in"):
        go(tmp_path, steps=4)
    assert folders(tmp_path / "checkpoints") == ["step_00000002", "step_00000003"]


def test_an_error_waits_for_the_writer_and_hides_it_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(folder: Path) -> None:
        with Saver(manager(folder)) as saver:
            saver.save(3, {"model": content(3)}, {}, {})
            raise RuntimeError("the engine broke")

    with pytest.raises(RuntimeError, match="the engine broke"):
        broken(tmp_path / "a")
    assert holds(manager(tmp_path / "a").latest(), 3)
    monkeypatch.setattr(files, "_write_safetensors", full)
    with pytest.raises(RuntimeError, match="the engine broke"):
        broken(tmp_path / "b")
    assert folders(tmp_path / "b") == []
    said = capsys.readouterr().err
    assert said.startswith("warning: cannot save step 3 in ")
    assert "No space left on device" in said


def test_who_leaves_at_once_waits_for_nothing(tmp_path: Path, disk: Disk) -> None:
    def second_signal() -> None:
        with Saver(manager(tmp_path)) as saver:
            disk.gate.clear()
            saver.save(1, {"model": content(1)}, {}, {})
            assert disk.reached.wait(_LONG_S)
            raise LeftAtOnce(143)

    with pytest.raises(LeftAtOnce):
        second_signal()
    (writer,) = [thread for thread in threading.enumerate() if thread.name == "saver"]
    assert writer.daemon
    disk.gate.set()
    writer.join(_LONG_S)
    assert folders(tmp_path) == [".step_00000001.partial"]
    assert manager(tmp_path).latest() is None


def test_who_no_longer_owns_the_folder_is_told_so_and_leaves_the_new_owner_s_files(tmp_path: Path, disk: Disk) -> None:
    owners = ["old"]

    def guard() -> None:
        if owners[-1] != "old":
            raise FrameworkError("attempt 1 is over")

    with Saver(CheckpointManager(tmp_path, guard=guard)) as saver:
        disk.gate.clear()
        saver.save(3, {"model": content(3)}, {}, {})
        owners.append("new")
        manager(tmp_path).stage(3)
        disk.gate.set()
        with pytest.raises(FrameworkError, match="attempt 1 is over"):
            saver.finish()
    assert folders(tmp_path)[0] == ".step_00000003.partial"
    assert len(folders(tmp_path)) == 1


def test_what_comes_after_a_checkpoint_is_done_behind_it_and_its_failure_is_told(tmp_path: Path) -> None:
    def upload() -> None:
        assert folders(tmp_path) == ["step_00000001"]
        raise FrameworkError("the storage is away")

    with Saver(manager(tmp_path), then=upload) as saver:
        saver.save(1, {"model": content(1)}, {}, {})
        with pytest.raises(FrameworkError, match=r"^the storage is away$"):
            saver.finish()
    assert folders(tmp_path) == ["step_00000001"]


def test_a_stop_that_comes_while_a_save_is_under_way(tmp_path: Path, disk: Disk) -> None:
    """Both checkpoints are whole when it ends: that of step 2, and that of the stop."""

    def progress(step: int, **_: Any) -> None:
        if step == 1:
            disk.gate.clear()
        if step == 3:
            assert folders(tmp_path / "checkpoints") == [".step_00000002.partial"]
            os.kill(os.getpid(), signal.SIGTERM)
            disk.gate.set()

    with pytest.raises(Interrupted) as caught:
        go(tmp_path, progress=progress)
    assert caught.value.exit_code == 143
    assert folders(tmp_path / "checkpoints") == ["step_00000002", "step_00000003"]
    found = manager(tmp_path / "checkpoints").latest()
    assert found is not None
    assert found.step == 3


# --- several ranks -------------------------------------------------------------------------------------------------


def half(step: int, rank: int) -> Shards:
    """Rows of the matrix that `content` has whole, large enough to meet the limit below."""
    (_, _, weight), count = content(step)
    part = ("model/w", ((10 * rank, 10), (0, 30)), weight[10 * rank : 10 * rank + 10])
    return [part, count] if rank == 0 else [part]


def _both_save(here: Runtime, folder: Path, at_the_end: bool) -> str:
    """Rank 1 may write files of 1000 bytes at most, once a first checkpoint stands: the system enforces it."""
    saver = Saver(CheckpointManager(folder, None, here.rank, here.world_size))
    saver.save(1, {"model": half(1, here.rank)}, {}, {})
    saver.finish()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    saver.save(2, {"model": half(2, here.rank)}, {}, {})
    try:
        saver.finish() if at_the_end else look_for_ever(saver)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "saved"


@pytest.mark.parametrize("at_the_end", [False, True])
def test_where_one_rank_cannot_write_all_leave_and_the_older_checkpoint_stands(
    tmp_path: Path, at_the_end: bool
) -> None:
    answers = run_ranks(_both_save, 2, tmp_path, at_the_end)
    assert all(answer.startswith("cannot save step 2 in ") and "File too large" in answer for answer in answers)
    assert "rank 1: " in answers[0]
    assert holds(manager(tmp_path).latest(), 1)
    assert folders(tmp_path) == ["step_00000001"]


def _one_dies(here: Runtime, folder: Path) -> str:
    """Rank 1 is gone before it has written anything of step 2."""
    try:
        with Saver(CheckpointManager(folder, None, here.rank, here.world_size)) as saver:
            saver.save(1, {"model": half(1, here.rank)}, {}, {})
            saver.finish()
            if here.rank == 1:
                files._write_safetensors = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            saver.save(2, {"model": half(2, here.rank)}, {}, {})
            look_for_ever(saver)
    except DeadlineError:  # of the collective that it looks with
        (folder.parent / "left").touch()
        return "left"


def test_a_rank_that_is_killed_while_it_writes_costs_that_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framework.checkpoint.saver._GRACE_S", 0.2)
    with pytest.raises(AssertionError, match="rank 1 left with -9"):
        run_ranks(_one_dies, 2, tmp_path / "checkpoints")
    assert (tmp_path / "left").exists()
    assert folders(tmp_path / "checkpoints") == ["step_00000001"]
    assert holds(manager(tmp_path / "checkpoints").latest(), 1)
