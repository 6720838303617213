"""Law Resume on several ranks, by real kills: one rank dies in the step, in the save, just before or after the
manifest, or at any instant; its launcher kills the others; the same command ends in the bits of an undisturbed run.

The ranks fork this process, which has imported everything already, and find each other as torchrun's do. What dies at
an exact place kills itself there (`tests/ask.py`).
"""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from framework.checkpoint.manifest import Checkpoint
from framework.core.runtime import free_port
from framework.main import main
from tests.test_faults import fingerprints
from tests.test_stopping import STEP, newest, words

LAYOUTS = {"fsdp": 2, "tp": 2}
MORE = {"ddp": 2, "fsdp": 2, "tp": 2, "pp": 2, "cp": 2, "fsdp_tp": 4}
COPY, WRITE = "framework.checkpoint.saver:copy_to_host", "framework.checkpoint.format:_write_safetensors"
INDEX, BEFORE = "framework.checkpoint.format:write_bytes", "framework.checkpoint.manager:describe"
BEHIND, KEPT = "framework.checkpoint.manager:_sync_folder", "framework.checkpoint.manager:CheckpointManager._retain"
ONLY_RANK_0 = {BEFORE, BEHIND, KEPT}


@dataclass(frozen=True)
class Kill:
    """Of `rank`: at the `nth` call of the function at `place`, or so many seconds after the start."""

    rank: int
    place: str = ""
    nth: int = 1
    seconds: float = 0.0


def start(argv: list[str], log: Path, world_size: int, kill: Kill | None) -> list[BaseProcess]:
    """`framework ARGV...` on so many ranks."""
    port = str(free_port())

    def run(rank: int) -> None:
        sys.stdout = sys.stderr = log.with_suffix(f".{rank}").open("w", buffering=1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.pop("ASK", None)
        if kill is not None and kill.place and kill.rank == rank:
            os.environ["ASK"] = f"SIGKILL {kill.place} {kill.nth}"
        os._exit(main(argv))

    ranks = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    return ranks


def finish(argv: list[str], log: Path, world_size: int) -> None:
    """Run to the end."""
    ranks = start(argv, log, world_size, None)
    for process in ranks:
        process.join(200)
    said = [log.with_suffix(f".{rank}").read_text() for rank in range(world_size)]
    assert [process.exitcode for process in ranks] == [0] * world_size, "\n".join(said)


def suffer(argv: list[str], log: Path, world_size: int, kill: Kill, grace: float) -> bool:
    """Run until the victim is dead, and the others `grace` seconds longer. Whether it was killed, not done before."""
    ranks = start(argv, log, world_size, kill)
    victim = ranks[kill.rank]
    if not kill.place:
        victim.join(kill.seconds)
        if victim.is_alive():
            victim.kill()
    until = time.monotonic() + 200
    while victim.is_alive() and all(process.exitcode in (None, 0) for process in ranks):
        assert time.monotonic() < until, "the victim lives on"
        time.sleep(0.005)
    victim.join(5)
    killed = victim.exitcode == -signal.SIGKILL
    end = time.monotonic() + grace if killed else until
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join()
    return killed


def check(folder: Path) -> None:
    """A checkpoint stands exactly when all of it verifies."""
    for path in (folder / "pretrain/checkpoints").glob("step_*"):
        assert Checkpoint(path).problems() == []


def pretrain(folder: Path, whole: Path, layout: str) -> list[str]:
    return words("pretrain", folder, whole, f"parallel={layout}", "model.num_layers=2")


def undisturbed(folder: Path, whole: Path, layout: str, world_size: int) -> dict[str, str]:
    folder.mkdir()
    finish(pretrain(folder, whole, layout), folder / "log", world_size)
    return fingerprints(folder)


# What dies, and the newest checkpoint afterwards; one after the other, saving at steps 2, 4, 6 and 8.
CASES: Sequence[tuple[Kill, int | None]] = [
    (Kill(1, STEP, 2), None),
    (Kill(0, BEFORE), None),  # both ranks' parts of step 2 are written, its manifest is not
    (Kill(0, BEHIND), None),  # its manifest is written; the folder is not in its place yet
    (Kill(1, WRITE, 2), 2),
    (Kill(0, KEPT), 4),  # the checkpoint is there, older ones are not cleared away yet
]


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS.items())
def test_killed_ranks_cost_nothing(tmp_path: Path, whole: Path, layout: str, world_size: int) -> None:
    expected = undisturbed(tmp_path / "plain", whole, layout, world_size)
    folder, draw = tmp_path / "killed", random.Random(layout)
    folder.mkdir()
    argv, log = pretrain(folder, whole, layout), folder / "log"
    for kill, saved in CASES:
        assert suffer(argv, log, world_size, kill, draw.uniform(0.0, 0.3)), kill
        assert newest(folder / "pretrain") == saved, kill
        check(folder)
    suffer(argv, log, world_size, Kill(draw.randrange(world_size), seconds=draw.uniform(0.5, 2.0)), 0.1)
    check(folder)
    finish(argv, log, world_size)
    assert fingerprints(folder) == expected


def drawn(draw: random.Random, world_size: int) -> Kill:
    """Half of them anywhere in time, half at one of the places."""
    rank = draw.randrange(world_size)
    if draw.random() < 0.5:
        return Kill(rank, seconds=draw.uniform(0.2, 4.0))
    place = draw.choice([STEP, COPY, WRITE, INDEX, BEFORE, BEHIND, KEPT])
    return Kill(0 if place in ONLY_RANK_0 else rank, place, draw.randint(1, 3))


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("layout", "world_size"), MORE.items())
def test_many_kills_of_ranks(tmp_path: Path, whole: Path, layout: str, world_size: int) -> None:
    """50 a layout; a run that comes to its end meanwhile is compared, and the next one begins."""
    expected = undisturbed(tmp_path / "plain", whole, layout, world_size)
    folder, seed = tmp_path / "killed", int.from_bytes(os.urandom(4), "little")
    argv, log, draw, kills = pretrain(folder, whole, layout), folder / "log", random.Random(seed), 0
    while kills < 50:
        folder.mkdir(exist_ok=True)
        kills += suffer(argv, log, world_size, drawn(draw, world_size), draw.uniform(0.0, 1.0))
        check(folder)
        if (folder / "pretrain/summary.json").exists():
            finish(argv, log, world_size)
            assert fingerprints(folder) == expected, f"seed {seed}, after {kills} kills"
            shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    finish(argv, log, world_size)
    assert fingerprints(folder) == expected, f"seed {seed}"
