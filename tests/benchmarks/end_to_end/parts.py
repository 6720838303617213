"""The parts, their sizes on a card and in a test, and the table that all of them write."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from cuda_ext import library
from cuda_ext.roofline import ceilings
from cuda_ext.table import Table
from framework.core import runtime
from tests.benchmarks.end_to_end import decoding, ppo, training
from tests.benchmarks.end_to_end.card import Bench

LAPS, TINY_LAPS = 5, 1
PARTS: dict[str, tuple[Callable[[Bench, Any], None], Sequence[Any], Sequence[Any]]] = {
    "training": (training.run, training.TASKS, training.TINY),
    "decoding": (decoding.run, decoding.TASKS, decoding.TINY),
    "ppo": (ppo.run, ppo.TASKS, ppo.TINY),
}


def run(parts: Sequence[str], tiny: bool, folder: Path) -> Path:
    """Measure `parts`; returns the Markdown table's path."""
    transformers.utils.logging.disable_progress_bar()
    here = runtime.start("cpu" if tiny else "cuda")
    if tiny:
        name, limits = "CPU, tiny sizes", ceilings("cpu", size=256, gigabytes=0.01)
    else:
        name, limits = torch.get_device_module("cuda").get_device_name(here.device), ceilings("cuda")
    facts = limits.facts() | {"kernels": library.why_not(0) or "built"}
    bench = Bench(here, Table(folder, name, facts), limits.product, TINY_LAPS if tiny else LAPS)
    for part in parts:
        measure, on_card, in_test = PARTS[part]
        for task in in_test if tiny else on_card:
            measure(bench, task)
    return bench.table.path
