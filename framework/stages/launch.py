"""From a recipe to running processes: a training stage takes every GPU that torch sees, and says so first.

Under torchrun this process is one rank already, and other stages have one process: they run right here.
"""

import importlib
import json
import os
from collections.abc import Sequence

from framework.cluster.ranks import run_ranks
from framework.core.runtime import check_devices, in_world, num_gpus, places, standing, start
from framework.parallel.words import layout_in_words, node_in_words
from framework.stages.config import RunConfig, TrainingRun
from framework.stages.job import Run
from framework.stages.ops import check_ops


def launch(config: RunConfig) -> Run:
    """Run a stage, here or on the ranks that its recipe asks for."""
    check_ops(config)
    if not isinstance(config, TrainingRun):
        return run(config)
    if in_world():
        _show_world(config)
        return run(config)
    devices = device_map(config)
    _show(config, layout_in_words(config.parallel, len(devices)), "layout: ")
    _show(config, node_in_words(dict(enumerate(devices)), config.parallel, len(devices)))
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
    _check_world(config, world)
    return places(config.device, world)


def _show_world(config: TrainingRun) -> None:
    """The map from rank 0, once all ranks have met. UsageError where they cannot work so."""
    _check_world(config, int(os.environ["WORLD_SIZE"]))
    check_devices(config.device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    here = start(config.device, config.threads, config.deterministic)
    nodes, world = standing(here), here.world_size
    if here.is_main:
        _show(config, layout_in_words(config.parallel, world), "layout: ")
    for node, devices in nodes.items():
        _show(config, node_in_words(devices, config.parallel, world), f"node {node}: ")


def _show(config: TrainingRun, line: str, what: str = "") -> None:
    print(f"{config.stage}: {what}{line}", flush=True)


def _check_world(config: TrainingRun, world: int) -> None:
    config.batch.micro(config.parallel.data_size(world))
