"""Evaluation: a model and tasks in, scores with their standard errors out."""

from framework.stages.config import EvaluateRun
from framework.stages.job import Run, open_job
from framework.stages.samples import run_tasks


def run(config: EvaluateRun) -> Run:
    """Run every task of the recipe against the model of init_from."""
    with open_job(config, {"init_from": config.init_from}) as job:
        if job.finished:
            return job.result()
        return job.finish(run_tasks(job, config, config.init_from))
