"""Supervised fine-tuning: conversations in, a model that answers out."""

from framework.core.config import require
from framework.data.denoising import Shape, with_prompts
from framework.data.sft import open_rows
from framework.models.config import Architecture
from framework.stages.config import SftRun
from framework.stages.job import Run, open_job
from framework.stages.pretrain import token_loss
from framework.stages.samples import run_tasks
from framework.stages.training import Start, fit, open_both, open_start


def run(config: SftRun) -> Run:
    """Train on the assistant's turns of data.train, validate, export model/, run the tasks before and after."""
    with open_job(config, {"init_from": config.init_from}) as job:
        if job.finished:
            return job.result()
        start = open_start(config, job.runtime.world_size)
        shape = shape_of(start)
        rows = open_both(job, config, open_rows, start.tokenizer)
        figures = fit(job, config, start, rows, token_loss, shape=shape)
        if rows.valid is not None:
            job.learned("held-out nats per response token", figures["valid/loss"], figures["valid/loss/before"])
        figures |= run_tasks(job, config, str(config.folder / "model"))
        return job.finish(figures)


def shape_of(start: Start) -> Shape | None:
    """Makes a conversation's prompt the prefix of a model that has one. UsageError for one that writes no text."""
    sees = start.model.architecture
    require(
        sees is not Architecture.ENCODER,
        f"sft teaches a model to answer, and one of architecture={sees} writes no text; take a causal or prefix model",
    )
    return (lambda rows, places: with_prompts(rows)) if sees is Architecture.PREFIX else None
