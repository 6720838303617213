"""A torch.profiler trace of a few early steps, for chrome://tracing or Perfetto, at the turn of a switch."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.profiler


@contextlib.contextmanager
def profiling(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Yields what to call after every step. Steps 3 to 5, past the first allocations, go to `folder`/trace-RANK.json;
    nothing happens where `folder` is None."""
    if folder is None:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"trace-{os.environ.get('RANK', 0)}.json"
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler.step
