"""From a recipe to running processes: a training stage takes every GPU that torch sees, and says so first.

Under torchrun this process is one rank already, and other stages have one process: they run right here.
"""

import importlib
import json
from collections.abc import Sequence

from framework.cluster.ranks import run_ranks
from framework.core.runtime import in_world, num_gpus, places
from framework.stages.config import RunConfig, TrainingRun
from framework.stages.job import Run


def launch(config: RunConfig) -> Run:
    """Run a stage, here or on the ranks that its recipe asks for."""
    if not isinstance(config, TrainingRun) or in_world():
        return run(config)
    devices = device_map(config)
    print(f"{config.stage}: {', '.join(f'rank {rank} on {place}' for rank, place in enumerate(devices))}", flush=True)
    if len(devices) == 1:
        return run(config)
    run_ranks(config.stage, run, config, len(devices), logs=config.folder / "logs")
    return Run(config.folder, json.loads((config.folder / "summary.json").read_text(encoding="utf-8")))


def run(config: RunConfig) -> Run:
    """The stage itself, in this process."""
    finished: Run = importlib.import_module(f"framework.stages.{config.stage}").run(config)
    return finished


def device_map(config: TrainingRun) -> Sequence[str]:
    """Where each rank will stand, by rank. UsageError where the layout or the batch cannot be shared out so."""
    world = config.cluster.workers
    if not isinstance(world, int):
        world = 1 if config.device == "cpu" or config.parallel.name == "single" else max(1, num_gpus())
    config.batch.micro(config.parallel.data_size(world))
    return places(config.device, world)
