"""Supervised fine-tuning: conversations in, a model that answers out; plain text beside them where the recipe asks."""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from framework.core.config import require
from framework.core.records import Counts, Metrics, Rows
from framework.data import pretrain
from framework.data.config import LanguageConfig
from framework.data.denoising import Marks, shaped_by, with_prompts
from framework.data.sft import open_rows
from framework.stages.config import SftRun
from framework.stages.job import Job, Run, located, open_job
from framework.stages.pretrain import suited, token_loss
from framework.stages.samples import run_tasks
from framework.stages.training import Mixed, Start, fit, open_both, open_start


def text_loss(
    log_probs: Tensor, entropy: Tensor | None, rows: Rows, counts: Counts, *, coefficient: float
) -> tuple[Tensor, Metrics]:
    """The texts' part: coefficient x their nats a token, over their own global count. The metric has no coefficient."""
    loss, metrics = token_loss(log_probs, entropy, rows, counts)
    return coefficient * loss, {"mix_loss": metrics["loss"]}


def run(config: SftRun) -> Run:
    """Train on the assistant's turns of data.train, validate, export model/, run the tasks before and after."""
    with open_job(config, {"init_from": config.init_from}) as job:
        if job.finished:
            return job.result()
        start = open_start(config, job.runtime.world_size)
        rows = open_both(job, config, open_rows, start.tokenizer)
        figures = fit(job, config, start, rows, token_loss, shape=with_prompts, mixed=mixed(job, config, start))
        if rows.valid is not None:
            job.learned("held-out nats per response token", figures["valid/loss"], figures["valid/loss/before"])
        figures |= run_tasks(job, config, str(config.folder / "model"))
        return job.finish(figures)


def mixed(job: Job, config: SftRun, start: Start) -> Mixed | None:
    """The texts of `mix.train`, packed into rows as pretraining packs them; None where none are asked for."""
    mix, size = config.mix, config.mix.size or config.batch.size
    if not (mix.train and mix.coefficient):
        return None
    ranks = config.parallel.data_size(job.runtime.world_size)
    require(size % ranks == 0, f"mix.size={size} is not divisible by {ranks} data ranks; choose a multiple of {ranks}")
    data = replace(config.data, train=mix.train, valid=[], weights=[], temperature=0.0, max_epochs=[], format="auto")
    with job.preparing("mixed-in") as told:
        found = located(data, job.say, "mix")
        rows = pretrain.open_rows(found, "train", start.tokenizer, config.prepared, config.seed, told)
    require(
        size <= len(rows), f"mix.train makes only {len(rows)} rows, fewer than mix.size={size}; choose at most that"
    )
    job.say(f"beside them {len(rows):,} rows of text, {rows.num_tokens:,} tokens, {size} a step x {mix.coefficient:g}")
    loss: Any = partial(text_loss, coefficient=mix.coefficient)
    loss.pointwise = True
    shape = shaped_by(LanguageConfig(), suited(start.model)[0], Marks.of(start.tokenizer), config.seed)
    return Mixed(rows, size, loss, shape)
