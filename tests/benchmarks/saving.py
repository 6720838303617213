"""Checkpoints written and read beside `torch.save` + fsync and `torch.load`: the same tensors, the weights and AdamW
moments of a Llama in fp32.
Ours hashes every file (sha256) and every tensor beside the writing, syncs files and folders, writes a manifest, renames
it into place and drops the checkpoint before; reading verifies all of it first. The rival's file replaces its last one.
A reading lap begins with the files out of the page cache, as after a restart, and fills memory that is there. Beside
the writing stands the copy to host memory alone: all that a step waits for where training goes on meanwhile.
"""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.manager import CheckpointManager
from framework.checkpoint.saver import HostMemory
from framework.core import runtime
from framework.core.records import Box, whole
from framework.models.config import ModelConfig
from framework.models.init import parameter_shapes
from tests.benchmarks.contest import Laps, Run, compete, options, report

PART = "trainer"


@dataclass(frozen=True)
class Task:
    """The same for all."""

    width: int
    layers: int
    threads: int


def tensors(task: Task) -> dict[str, Tensor]:
    """Random, by logical name."""
    model = ModelConfig(vocab_size=8192, hidden_size=task.width, num_layers=task.layers, num_heads=8)
    generator = torch.Generator().manual_seed(0)
    kinds = ("model", "optim/mean", "optim/square")
    shapes = parameter_shapes(model).items()
    return {f"{kind}/{name}": torch.randn(shape, generator=generator) for kind in kinds for name, shape in shapes}


def shards(held: dict[str, Tensor]) -> Iterator[tuple[str, Box, Tensor]]:
    """As an engine hands them out."""
    return ((name, whole(tensor.shape), tensor) for name, tensor in held.items())


def save(place: Path, held: dict[str, Tensor]) -> None:
    """As the training stages do with checkpoint.background=false."""
    manager = CheckpointManager(place / "checkpoints", CheckpointConfig(keep=1))
    manager.save(1, {PART: shards(held)}, {"step": 1})


def load(place: Path, held: dict[str, Tensor]) -> None:
    """As a continued run does: verify, then fill."""
    found = CheckpointManager(place / "checkpoints").latest()
    assert found is not None
    read = found.reader(PART)
    for name, tensor in held.items():
        tensor.copy_(read(name, whole(tensor.shape)))


def torch_save(place: Path, held: dict[str, Tensor]) -> None:
    """What a loop of one's own would do, with care: synced, and replaced by a rename."""
    with (place / "new.pt").open("wb") as stream:
        torch.save(held, stream)
        stream.flush()
        os.fsync(stream.fileno())
    (place / "new.pt").rename(place / "state.pt")


def torch_load(place: Path, held: dict[str, Tensor]) -> None:
    """The counterpart."""
    for name, tensor in torch.load(place / "state.pt").items():
        held[name].copy_(tensor)


def forget(place: Path) -> None:
    """Have the system drop the files of `place` from its cache; they are on the disk already."""
    for path in place.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


Act = Callable[[Path, dict[str, Tensor]], None]


def writing(place: Path, laps: Laps, task: Task, act: Act | None) -> None:
    """A lap is one save; without `act`, one copy."""
    runtime.start("cpu", task.threads)
    held, memory = tensors(task), HostMemory()
    size = _ready(laps, held)
    while True:
        if act is None:
            memory.hold({PART: shards(held)})
        else:
            act(place, held)
        laps.done(size, 0)


def reading(place: Path, laps: Laps, task: Task, write: Act, act: Act) -> None:
    """A lap is one reading of everything."""
    runtime.start("cpu", task.threads)
    right = tensors(task)
    write(place, right)
    held = {name: torch.zeros_like(tensor) for name, tensor in right.items()}
    act(place, held)
    assert all(torch.equal(tensor, right[name]) for name, tensor in held.items())
    del right
    size = _ready(laps, held)
    while True:
        forget(place)
        act(place, held)
        laps.done(size, 0)


def _ready(laps: Laps, held: dict[str, Tensor]) -> int:
    """Kilobytes of a lap."""
    size = sum(tensor.nbytes for tensor in held.values())
    laps.ready({"bytes": size})
    return size // 1000


def contestants(task: Task) -> dict[str, dict[str, Run]]:
    """By contest, ours first."""
    return {
        "Saving": {
            "checkpoint": functools.partial(writing, task=task, act=save),
            "torch.save + fsync": functools.partial(writing, task=task, act=torch_save),
            "the copy that a step waits for": functools.partial(writing, task=task, act=None),
        },
        "Loading": {
            "checkpoint, verified": functools.partial(reading, task=task, write=save, act=load),
            "torch.load": functools.partial(reading, task=task, write=torch_save, act=torch_load),
        },
    }


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    args = options(__doc__ or "", argv, rounds=9, width=512, layers=8, threads=1)
    task = Task(args.width, args.layers, args.threads)
    facts: dict[str, Any] = {"width": task.width, "layers": task.layers, "threads": task.threads}
    for title, rivals in contestants(task).items():
        load_average = f"{os.getloadavg()[0]:.1f}"
        with tempfile.TemporaryDirectory() as scratch:
            found = compete(rivals, Path(scratch), args.rounds)
        report(title, found, facts | {"load average before": load_average}, args.out, unit="kB")


if __name__ == "__main__":
    main()
