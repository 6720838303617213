"""A process that saves in a loop is killed at random instants: `latest` then verifies and is a state that was saved.

With `background` the next copy is made while the last one is written; what is killed is then a thread at work.
"""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.format import Shards
from framework.checkpoint.manager import CheckpointManager
from framework.checkpoint.saver import Saver
from framework.core.records import whole

SHAPE = (512, 257)


def content(step: int) -> Shards:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randint(0, 255, SHAPE, generator=generator, dtype=torch.uint8)
    return [("w", whole(SHAPE), weight), ("v", whole(SHAPE), weight.float())]


def save_for_ever(folder: Path, background: bool) -> None:
    """Continue from the newest checkpoint, as a run does; every save is acknowledged in a file outside."""
    torch.set_num_threads(1)
    manager = CheckpointManager(folder / "checkpoints", CheckpointConfig(keep=2, background=background))
    found = manager.latest()
    step = found.step if found else 0
    with Saver(manager) as saver:
        while True:
            step += 1
            saver.save(step, {"model": content(step)}, {"step": step}, {"valid/loss": float(step % 7)})
            if step > background:
                with (folder / "acknowledged").open("a") as stream:
                    stream.write(f"{step - background}\n")


def acknowledged(folder: Path) -> int:
    path = folder / "acknowledged"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(lines[-1]) if lines else 0


def check(folder: Path) -> None:
    at_least = acknowledged(folder)
    found = CheckpointManager(folder / "checkpoints").latest()
    if found is None:
        assert at_least == 0
        return
    assert found.step in (at_least, at_least + 1)
    assert found.state == {"step": found.step}
    assert found.problems() == []
    read = found.reader("model")
    for name, box, tensor in content(found.step):
        assert torch.equal(read(name, box), tensor)


def kill_often(folder: Path, kills: int, seed: int, background: bool) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "framework.checkpoint.manager"])
    draw = random.Random(seed)
    for _ in range(kills):
        before = acknowledged(folder)
        process = context.Process(target=save_for_ever, args=(folder, background))
        process.start()
        deadline = time.monotonic() + 60
        while acknowledged(folder) == before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.08))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        check(folder)


@pytest.mark.parametrize("background", [False, True])
def test_a_few_kills(tmp_path: Path, background: bool) -> None:
    kill_often(tmp_path, kills=4, seed=1, background=background)
    assert acknowledged(tmp_path) >= 4


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("background", [False, True])
def test_many_kills(tmp_path: Path, background: bool) -> None:
    kill_often(tmp_path, kills=150, seed=int.from_bytes(os.urandom(4), "little"), background=background)
