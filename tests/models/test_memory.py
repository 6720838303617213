"""What loading a folder costs: a model in the files' own dtype is the mapped files, and hardly anything beside."""

import ctypes
import gc
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from framework.models import hub
from framework.models.config import ModelConfig
from framework.models.init import parameter_shapes

CONFIG = ModelConfig(vocab_size=4096, hidden_size=768, num_layers=12, num_heads=12, tied=False)


def held() -> int:
    """Bytes of this process in memory, mapped files' with them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def peak_of(work: Callable[[], torch.nn.Module], tell: "multiprocessing.Queue[int]") -> None:
    """The most that `work` and a look at all that it gave hold at any time, less what was there before; what the parent
    left free is given back first, or it would go meanwhile."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, seen, over = held(), SimpleQueue[int](), threading.Event()

    def watch() -> None:
        most = 0
        while not over.is_set():
            most = max(most, held())
        seen.put(most)

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = work()
    assert all(float(parameter.mean()) == pytest.approx(0.5) for parameter in kept.parameters())
    over.set()
    watcher.join()
    tell.put(seen.get() - before)


@pytest.mark.parametrize("shards", [1, 4])
def test_loading_holds_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """At most 1.1 times the weights, in one file or several."""
    shapes = parameter_shapes(CONFIG)
    size = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    monkeypatch.setattr(hub, "_SHARD_BYTES", size // shards + 1)
    hub.save_weights(CONFIG, ((name, torch.full(shape, 0.5)) for name, shape in shapes.items()), tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) >= shards
    fork = multiprocessing.get_context("fork")
    tell = fork.Queue()
    process = fork.Process(target=peak_of, args=(lambda: hub.load(tmp_path), tell))
    process.start()
    peak = tell.get(timeout=60)
    process.join()
    assert 0.9 * size < peak <= 1.1 * size
