"""Committing and keeping, saves that fail, and several ranks. What is believed: `test_manifest`."""

import errno
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.checkpoint import format as files
from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.format import PartReader, Shards, write_part
from framework.checkpoint.integrity import tensor_hash
from framework.checkpoint.manager import CheckpointManager
from framework.checkpoint.manifest import MANIFEST
from framework.core.errors import CheckpointError, FrameworkError
from tests.checkpoint.cases import content, folders, holds, in_processes, saved


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    state = {"step": 7, "rows": 123456789012, "kl": 0.1 + 0.2, "list": [1, None, "唐"], "nested": {"a": 1e-300}}
    manager = CheckpointManager(tmp_path / "not" / "there" / "yet")
    manager.save(7, {"model": content(7)}, state, {"valid/loss": 2.5})
    found = manager.latest()
    assert holds(found, 7)
    assert found is not None
    assert found.state == state
    assert found.metrics == {"valid/loss": 2.5}
    assert found.folder.name == "step_00000007"
    assert found.hashes("model")["model/w"] == f"{tensor_hash(torch.arange(600.0).reshape(20, 30) + 7):016x}"
    assert folders(found.folder) == [MANIFEST, "model-00000.json", "model-00000.safetensors"]


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert CheckpointManager(tmp_path).latest() is None
    assert CheckpointManager(tmp_path / "absent").latest() is None


def test_nothing_of_it_is_pickle(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for best, survivors in [("valid/loss", [2, 5, 6]), ("-valid/loss", [3, 5, 6]), ("valid/other", [5, 6])]:
        manager = CheckpointManager(tmp_path / best, CheckpointConfig(keep=2, best=best))
        for step, loss in enumerate([4.0, 1.0, 9.0, float("nan"), 2.0, 3.0], start=1):
            manager.save(step, {"model": content(step)}, {}, {"valid/loss": loss})
        assert folders(tmp_path / best) == [f"step_{step:08d}" for step in survivors]
        found = manager.best()
        assert (found.step if found else None) == (survivors[0] if len(survivors) == 3 else None)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    manager = saved(tmp_path, 1, 2)
    manager.save(2, {"model": content(5)}, {"again": True})
    found = manager.latest()
    assert found is not None
    assert (found.step, found.state) == (2, {"again": True})
    assert found.reader("model")("optim/step", ()).item() == 5
    assert folders(tmp_path) == ["step_00000001", "step_00000002"]


def test_leftovers_of_killed_saves_are_cleared_and_a_half_replaced_one_comes_back(tmp_path: Path) -> None:
    manager = saved(tmp_path, 2, 3)
    partial = manager.stage(4)
    write_part(partial, "model", 0, content(4))
    (tmp_path / "step_00000003").rename(tmp_path / ".step_00000003.replaced")
    assert holds(manager.latest(), 3)
    assert folders(tmp_path) == ["step_00000002", "step_00000003"]


def test_strangers_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "step_7").mkdir()
    manager = saved(tmp_path, 1, 2, 3, keep=1)
    assert holds(manager.latest(), 3)
    assert folders(tmp_path) == ["step_00000003", "step_7", "step_notes"]


# --- saving that fails ---------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_clear_line_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = saved(tmp_path, 2, 3)
    before = folders(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("_write_safetensors", "write_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(files, name, full)
            with pytest.raises(CheckpointError, match=r"cannot save step 4 in .*: No space left on device") as caught:
                manager.save(4, {"model": content(4)}, {})
        assert "\n" not in str(caught.value)
        assert folders(tmp_path) == before
    assert holds(manager.latest(), 3)
    saved(tmp_path, 4)
    assert holds(manager.latest(), 4)


def save_under_a_limit(folder: Path) -> None:
    """In a process of its own: writes beyond 1 kB fail with EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        saved(folder, 4)
    except CheckpointError as error:
        (folder.parent / "error").write_text(str(error))


def test_a_file_size_limit_that_the_system_enforces(tmp_path: Path) -> None:
    manager = saved(tmp_path / "checkpoints", 2, 3)
    assert in_processes([(save_under_a_limit, (tmp_path / "checkpoints",))]) == [0]
    error = (tmp_path / "error").read_text()
    assert error.startswith("cannot save step 4 in ")
    assert "File too large" in error
    assert folders(tmp_path / "checkpoints") == ["step_00000002", "step_00000003"]
    assert holds(manager.latest(), 3)


def test_an_error_or_an_interrupt_while_tensors_are_gathered_leaves_nothing(tmp_path: Path) -> None:
    manager = saved(tmp_path, 2)

    def broken(error: BaseException) -> Iterator[Any]:
        yield from content(3)
        raise error

    for error in (KeyboardInterrupt(), RuntimeError("the engine broke")):
        with pytest.raises(type(error)):
            manager.save(3, {"model": broken(error)}, {})
        assert folders(tmp_path) == ["step_00000002"]


def test_who_no_longer_owns_the_folder_neither_saves_nor_clears_away_what_the_new_owner_stages(tmp_path: Path) -> None:
    owners = ["old"]

    def guard() -> None:
        if owners[-1] != "old":
            raise FrameworkError("attempt 1 is over")

    new, old = saved(tmp_path, 2), CheckpointManager(tmp_path, guard=guard)

    def overtaken() -> None:
        with old.saving(3, {}):
            owners.append("new")
            new.stage(3)

    with pytest.raises(FrameworkError, match="attempt 1 is over"):
        overtaken()
    with pytest.raises(FrameworkError, match="attempt 1 is over"):
        old.save(3, {"model": content(3)}, {})
    assert folders(tmp_path) == [".step_00000003.partial", "step_00000002"]


def test_several_parts_written_by_others(tmp_path: Path) -> None:
    """The way of PPO: the controller stages and commits, workers write their parts of the staging folder."""
    manager = CheckpointManager(tmp_path)
    with manager.saving(1, {"iteration": 1}) as staging:
        for part, rank in (("actor", 0), ("actor", 1), ("critic", 0)):
            box, rows = ((2 * rank, 2), (0, 3)), torch.full((2, 3), float(rank))
            write_part(staging, part, rank, [("model/w", box, rows)], world_size=2 if part == "actor" else 1)
    found = manager.latest()
    assert found is not None
    assert sorted(found.manifest["parts"]) == ["actor", "critic"]
    assert PartReader(found.folder, "actor")("model/w", ((0, 4), (1, 1))).flatten().tolist() == [0, 0, 1, 1]


def test_a_worker_that_wrote_nothing_is_named(tmp_path: Path) -> None:
    manager = saved(tmp_path, 1)
    with (
        pytest.raises(CheckpointError, match=r"cannot save step 2 .*actor-00001.json is missing"),
        manager.saving(2, {}) as staging,
    ):
        write_part(staging, "actor", 0, content(2), world_size=2)
    assert folders(tmp_path) == ["step_00000001"]


# --- several ranks -------------------------------------------------------------------------------------------------


class Ranks:
    """A gather between threads that play ranks."""

    def __init__(self, size: int):
        self.size, self.values, self.barrier = size, [None] * size, threading.Barrier(size, timeout=30)

    def gather_of(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait()
            everyone = list(self.values)
            self.barrier.wait()
            return everyone

        return gather

    def run(self, folder: Path, work: Callable[[CheckpointManager, int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size

        def play(rank: int) -> None:
            try:
                results[rank] = work(CheckpointManager(folder, None, rank, self.size, self.gather_of(rank)), rank)
            except CheckpointError as error:
                results[rank] = str(error)

        threads = [threading.Thread(target=play, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        return results


def quarter(step: int, rank: int) -> Shards:
    """Columns of the same matrix that `content` has whole."""
    (_, _, weight), count = content(step)
    columns = [(0, 7), (7, 8), (15, 1), (16, 14)][rank]
    part = ("model/w", ((0, 20), columns), weight[:, columns[0] : sum(columns)])
    return [part, count] if rank == 2 else [part]


def test_four_ranks_save_what_one_rank_reads_with_equal_hashes(tmp_path: Path) -> None:
    Ranks(4).run(tmp_path / "four", lambda manager, rank: manager.save(3, {"model": quarter(3, rank)}, {"a": 1}))
    saved(tmp_path / "one", 3)
    four, one = (CheckpointManager(tmp_path / name).latest() for name in ("four", "one"))
    assert holds(four, 3)
    assert four is not None
    assert one is not None
    assert four.hashes("model") == one.hashes("model")
    found = Ranks(4).run(tmp_path / "one", lambda manager, _: manager.latest())
    assert [checkpoint.step for checkpoint in found] == [3] * 4


def test_ranks_agree_on_the_fall_back_and_only_one_of_them_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Ranks(4).run(tmp_path, lambda manager, rank: manager.save(1, {"m": quarter(1, rank)}, {}))
    Ranks(4).run(tmp_path, lambda manager, rank: manager.save(2, {"m": quarter(2, rank)}, {}))
    (tmp_path / "step_00000002" / "m-00003.safetensors").write_bytes(b"")
    found = Ranks(4).run(tmp_path, lambda manager, _: manager.latest())
    assert [checkpoint.step for checkpoint in found] == [1] * 4
    assert capsys.readouterr().err.count("\n") == 1


def test_where_one_rank_fails_all_leave_and_nothing_is_left(tmp_path: Path) -> None:
    def full() -> Iterator[Any]:
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    answers = Ranks(4).run(tmp_path, lambda m, rank: m.save(1, {"m": full() if rank == 3 else quarter(1, rank)}, {}))
    assert all("cannot save step 1" in answer and "No space left on device" in answer for answer in answers)
    assert "rank 3: " in answers[0]
    assert folders(tmp_path) == []


def save_and_find(folder: Path, rank: int) -> None:
    """One rank of a real process group."""
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    manager = CheckpointManager(folder / "checkpoints", None, rank, 2)
    half = [("w", ((2 * rank, 2), (0, 3)), torch.full((2, 3), float(rank)))]
    manager.save(1, {"model": half}, {"a": 1})
    found = manager.latest()
    assert found is not None
    assert found.reader("model")("w", ((0, 4), (0, 1))).flatten().tolist() == [0, 0, 1, 1]
    torch.distributed.destroy_process_group()


def test_two_processes_of_a_real_process_group(tmp_path: Path) -> None:
    assert in_processes([(save_and_find, (tmp_path, rank)) for rank in range(2)]) == [0, 0]
    assert folders(tmp_path / "checkpoints") == ["step_00000001"]
