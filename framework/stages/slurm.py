"""`framework slurm STAGE WORDS...`, which launch/slurm calls on a job's first node: the stage on all of its nodes.

Training stages and doctor run under torchrun, ppo and pipelines with it on a Ray over the nodes; what has one process
runs on the first node.
"""

from collections.abc import Callable, Sequence
from functools import partial

from framework.cluster.config import RanksConfig
from framework.cluster.slurm import Work, control, lead, run_job, train
from framework.core.errors import UsageError
from framework.stages.config import PpoRun, RunConfig, TrainingRun


def slurm(words: list[str], compose: Callable[[str, Sequence[str]], tuple[RunConfig, ...]]) -> int:
    """The exit code of the job. A wrong recipe is refused before any node is asked for."""
    if not words:
        raise UsageError("slurm takes a stage and its words: sbatch launch/slurm pretrain experiment=...")
    if words[0] == "doctor":
        return run_job(partial(train, words, "auto"), RanksConfig.start_deadline_s)
    configs = compose(words[0], words[1:])
    deadlines = [one.cluster.start_deadline_s for one in configs if isinstance(one, TrainingRun | PpoRun)]
    return run_job(_work(words, configs), max(deadlines, default=RanksConfig.start_deadline_s))


def _work(words: Sequence[str], configs: Sequence[RunConfig]) -> Work:
    if isinstance(configs[0], TrainingRun):
        return partial(train, words, _processes(configs[0]))
    for config in configs:
        if isinstance(config, PpoRun) and not config.cluster.address and not _stays_in_process(words):
            section = "cluster" if len(configs) == 1 else "ppo.cluster"
            return partial(control, words, section, config.cluster.start_deadline_s)
    return partial(lead, words)


def _processes(config: TrainingRun) -> int | str:
    """Ranks a node: as many as a plain command would start on it."""
    if isinstance(config.cluster.workers, int):
        return config.cluster.workers
    return 1 if config.device == "cpu" or config.parallel.name == "single" else "auto"


def _stays_in_process(words: Sequence[str]) -> bool:
    return any(word.endswith(("cluster=in_process", "cluster.kind=in_process")) for word in words)
