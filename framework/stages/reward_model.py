"""The reward model: pairs in, a scorer of answers out (Stiennon et al. 2020, section 3.4; Ouyang et al. 2022)."""

import math
from functools import partial

from torch import Tensor

from framework.core.records import Counts, Metrics, PreferenceBatch, Rows, Scores
from framework.data.preference import open_rows
from framework.objectives.preference import pairwise_ranking_loss
from framework.stages.baselines import pair_accuracy
from framework.stages.config import RewardModelRun
from framework.stages.job import Run, open_job
from framework.stages.training import Figures, fit, open_both, open_start


def ranking_loss(scores: Scores, rows: Rows, counts: Counts, *, center_coefficient: float) -> tuple[Tensor, Metrics]:
    """Bradley–Terry on the class head: scores.classes [2B, 1] holds the chosen rows, then the rejected ones."""
    assert isinstance(rows, PreferenceBatch)
    assert scores.classes is not None
    chosen, rejected = scores.classes.squeeze(-1).chunk(2)
    loss, metrics = pairwise_ranking_loss(
        chosen, rejected, counts.pairs, margin=rows.margin, center_coefficient=center_coefficient
    )
    squares = scores.classes.detach().square()
    return loss, metrics | {"score_square": (squares.sum(), squares.new_tensor(squares.numel()))}


def score_scale(figures: Figures) -> dict[str, float]:
    """Mean and deviation of the scores of both answers, for the model's config.json: whoever uses the model subtracts
    and divides, so that a score of 1 is one deviation whatever the recipe (Stiennon et al. 2020, section 3.4)."""
    part = "valid" if "valid/score_square" in figures else "train"
    mean = (figures[f"{part}/score_chosen"] + figures[f"{part}/score_rejected"]) / 2
    variance = figures[f"{part}/score_square"] - mean**2
    return {"score_mean": mean, "score_std": math.sqrt(max(variance, 1e-12))}


def run(config: RewardModelRun) -> Run:
    """Train on data.train, measure accuracy on unseen pairs beside a baseline that sees style alone, export model/."""
    with open_job(config, {"init_from": config.init_from}) as job:
        if job.finished:
            return job.result()
        start = open_start(config, job.runtime.world_size)
        rows = open_both(job, config, open_rows, start.tokenizer)
        loss = partial(ranking_loss, center_coefficient=config.center_coefficient)
        figures = fit(job, config, start, rows, loss, num_classes=1, describe=score_scale)
        if rows.valid is not None:
            what = "unseen pairs right"
            if config.evaluation.baselines:
                style = pair_accuracy(rows.train, rows.valid, start.model.vocab_size, job.stop)
                figures["baseline/length_and_bigram_accuracy"] = style
                what = f"{what} (length and bigrams alone: {style:.2f})"
            job.learned(what, figures["valid/accuracy"], figures["valid/accuracy/before"])
        return job.finish(figures)
