"""What the tests of this room save, and how they look at it."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.format import Shards
from framework.checkpoint.manager import CheckpointManager
from framework.checkpoint.manifest import Checkpoint
from framework.core.records import whole


def content(step: int) -> Shards:
    """Tensors that tell their step."""
    weight = torch.arange(600.0).reshape(20, 30) + step
    return [("model/w", whole((20, 30)), weight), ("optim/step", (), torch.tensor(step))]


def saved(folder: Path, *steps: int, **config: Any) -> CheckpointManager:
    manager = CheckpointManager(folder, CheckpointConfig(**config))
    for step in steps:
        manager.save(step, {"model": content(step)}, {"step": step, "kl": 0.1 + 0.2})
    return manager


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def holds(checkpoint: Checkpoint | None, step: int) -> bool:
    assert checkpoint is not None
    read = checkpoint.reader("model")
    return checkpoint.step == step and all(torch.equal(read(name, box), t) for name, box, t in content(step))


def in_processes(work: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> list[int | None]:
    """Exit codes of functions that ran side by side, each in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "framework.checkpoint.manager"])
    processes = [context.Process(target=function, args=arguments) for function, arguments in work]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        process.kill()
    return [process.exitcode for process in processes]
