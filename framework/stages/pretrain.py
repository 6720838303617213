"""Pretraining: plain text in, a language model out. Read from top to bottom; the loop stands in `engine/loop.py`."""

from torch import Tensor

from framework.core.config import require
from framework.core.records import Counts, Metrics, Rows
from framework.data.config import Objective
from framework.data.denoising import Shape, shaped_by
from framework.data.loader import RowSource
from framework.data.pretrain import open_rows
from framework.data.spans import Marks
from framework.models.config import Architecture, ModelConfig, Position
from framework.objectives.language import next_token_loss
from framework.stages.baselines import bigram_nats
from framework.stages.config import PretrainRun
from framework.stages.job import Run, open_job
from framework.stages.samples import run_tasks
from framework.stages.training import Figures, Start, fit, open_both, open_start


def token_loss(log_probs: Tensor, entropy: Tensor | None, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
    """Cross-entropy of every label that counts, over the global number of them. Also the loss of sft."""
    return next_token_loss(log_probs, rows.inputs().loss_mask, counts.tokens)


token_loss.pointwise = True  # type: ignore[attr-defined]

_SUITS = {
    Architecture.CAUSAL: [Objective.CAUSAL],
    Architecture.PREFIX: [Objective.PREFIX],
    Architecture.ENCODER: [Objective.MASKED],
    Architecture.ENCODER_DECODER: [Objective.SPANS],
}


def run(config: PretrainRun) -> Run:
    """Train on data.train, validate on data.valid, export model/."""
    with open_job(config, {"init_from": config.init_from, "tokenizer": config.tokenizer}) as job:
        if job.finished:
            return job.result()
        start = open_start(config, job.runtime.world_size)
        objective, shape = language_of(config, start)
        rows = open_both(job, config, open_rows, start.tokenizer)
        figures = fit(job, config, start, rows, token_loss, shape=shape)
        if rows.valid is not None and objective is not Objective.CAUSAL:
            job.learned("held-out nats per predicted token", figures["valid/loss"], figures["valid/loss/before"])
        elif rows.valid is not None:
            figures |= per_byte(figures, rows.valid)
            what = "held-out nats per byte"
            if config.evaluation.baselines:
                nats = bigram_nats(rows.train, rows.valid, start.model.vocab_size, job.stop)
                figures["baseline/bigram_nats_per_byte"] = bigram = nats / rows.valid.num_bytes
                what = f"{what} (a bigram: {bigram:.3f})"
            job.learned(what, figures["valid/nats_per_byte"], figures["valid/nats_per_byte/before"])
        figures |= run_tasks(job, config, str(config.folder / "model"))
        return job.finish(figures)


def suited(model: ModelConfig) -> list[Objective]:
    """What a model can learn from plain text, the usual one first."""
    return [Objective.BLANKS] if model.position is Position.ROTARY_2D else _SUITS[model.architecture]


def language_of(config: PretrainRun, start: Start) -> tuple[Objective, Shape]:
    """The objective of the recipe, and what makes its rows; UsageError where the model or the tokenizer is not fit."""
    suits = suited(start.model)
    objective = suits[0] if config.language.objective is Objective.AUTO else config.language.objective
    require(
        objective in suits,
        f"language.objective={objective} does not go with model.architecture={start.model.architecture}, which learns "
        f"by {' or '.join(map(str, suits))}; leave language.objective out, or choose another model.architecture",
    )
    mask_id = start.tokenizer.mask_id
    require(
        objective not in (Objective.MASKED, Objective.BLANKS) or mask_id is not None,
        f"language.objective={objective} needs a tokenizer with a mask token: train one with "
        "tokenizer.mask=true, or take one that has it (BERT's)",
    )
    require(
        objective is not Objective.SPANS or bool(start.tokenizer.sentinel_ids),
        "language.objective=spans needs a tokenizer with sentinels: train one with tokenizer.sentinels=100, or take "
        "one that has <extra_id_0> (T5's)",
    )
    return objective, shaped_by(config.language, objective, Marks.of(start.tokenizer), config.seed)


def per_byte(figures: Figures, valid: RowSource) -> Figures:
    """Losses in nats per UTF-8 byte of the held-out text, end tokens paid for: comparable between tokenizers."""
    scale = valid.num_tokens / valid.num_bytes
    return {f"valid/nats_per_byte{when}": figures[f"valid/loss{when}"] * scale for when in ("", "/before")}
