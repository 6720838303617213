"""Supervised fine-tuning: conversations in, a model that answers out."""

from framework.data.denoising import with_prompts
from framework.data.sft import open_rows
from framework.stages.config import SftRun
from framework.stages.job import Run, open_job
from framework.stages.pretrain import token_loss
from framework.stages.samples import run_tasks
from framework.stages.training import fit, open_both, open_start


def run(config: SftRun) -> Run:
    """Train on the assistant's turns of data.train, validate, export model/, run the tasks before and after."""
    with open_job(config, {"init_from": config.init_from}) as job:
        if job.finished:
            return job.result()
        start = open_start(config, job.runtime.world_size)
        rows = open_both(job, config, open_rows, start.tokenizer)
        figures = fit(job, config, start, rows, token_loss, shape=with_prompts)
        if rows.valid is not None:
            job.learned("held-out nats per response token", figures["valid/loss"], figures["valid/loss/before"])
        figures |= run_tasks(job, config, str(config.folder / "model"))
        return job.finish(figures)
